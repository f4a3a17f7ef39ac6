"""Ranks, exchanges between them, and the engines that carry out a training step."""
