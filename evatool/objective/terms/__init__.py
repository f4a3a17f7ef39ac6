"""Losses of a CLIP objective, one a file; a list of them is what the model learns from."""
