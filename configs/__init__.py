"""The ready-made experiments, installed as `ppow_jax.configs`: `--config=NAME` finds them by name."""
