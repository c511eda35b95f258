"""Files in and out: target weights, drafter checkpoints."""
