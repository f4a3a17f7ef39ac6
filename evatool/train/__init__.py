"""The training loop: counts steps and calls objective, engine and hooks in order. Knows no recipe and no task."""
