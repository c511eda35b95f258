"""The target, the drafter, their building blocks and the tokenizer."""
