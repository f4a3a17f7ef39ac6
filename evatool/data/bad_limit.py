"""How many bad samples are allowed, and how their causes are counted in messages: for preparation and for training."""

from __future__ import annotations

from collections.abc import Iterable


def num_allowed(max_fraction: float, total: int) -> int:
    """The largest number of bad samples among `total` that a recipe's `max_bad_fraction` allows."""
    return int(max_fraction * total + 1e-9)  # 0.29 of 100 is 29, whatever binary fractions say


def count_by_cause(causes: Iterable[tuple[str, int]]) -> str:
    """Counts in words, in the order in which they come: "3 zero-byte, 1 cmyk"."""
    return ", ".join(f"{count} {cause}" for cause, count in causes)
