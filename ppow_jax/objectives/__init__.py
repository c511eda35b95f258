"""What a drafter is trained for: one objective a file, on the seam in `base`."""
