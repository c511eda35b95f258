"""Compiles the real steps for TPU slices that are not there."""
