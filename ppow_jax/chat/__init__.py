"""A chat in the terminal that shows what the drafter proposes and what of it the target keeps."""
