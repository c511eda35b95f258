"""Benchmarks: `python -m ppow_jax.bench COMMAND`."""
