"""Loaded models and opened evaluation sets to numbers with intervals, kept predictions and reports."""
