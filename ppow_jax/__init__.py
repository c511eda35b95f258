"""PPOW in JAX: drafters for speculative decoding, trained on the length of the accepted prefix."""
