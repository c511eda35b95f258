"""Prompts in, target-written responses out, batches for training."""
