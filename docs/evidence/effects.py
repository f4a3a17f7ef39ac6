"""Means, intervals and effects over training seeds. Everything is a plain function of the runs' values."""

from __future__ import annotations

import itertools
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np

LEVEL = 0.95

Values = Mapping[int, float]
"""One figure a seed."""


@dataclass(frozen=True)
class Estimate:
    """A figure with its 95 % interval; the bounds are None where one seed alone was run."""

    value: float
    low: float | None
    high: float | None
    num_seeds: int

    @property
    def verdict(self) -> str:
        """ "gain", "loss", or "no difference" where the interval includes 0 or there is none."""
        if self.low is None or self.high is None or self.low <= 0 <= self.high:
            return "no difference"
        return "gain" if self.low > 0 else "loss"


def mean(values: Values) -> Estimate:
    """Mean over seeds with Student's t interval. Raises: ValueError without a value."""
    if not values:
        raise ValueError("a mean needs at least one seed")
    x = np.array([values[seed] for seed in sorted(values)], dtype=np.float64)
    if x.size < 2:
        return Estimate(float(x[0]), None, None, 1)
    return _interval(float(x.mean()), float(x.std(ddof=1) / np.sqrt(x.size)), x.size - 1, x.size)


def difference(before: Values, after: Values) -> Estimate:
    """`after` less `before`, seed by seed, as `mean`; seeds that only one of them has are left out."""
    return mean({seed: after[seed] - before[seed] for seed in before if seed in after})


Factorial = Mapping[tuple[bool, ...], Values]
"""Arms of a two-level factorial by which factors are on; all combinations, the same seeds each."""


def factorial_effects(arms: Factorial, factors: Sequence[str]) -> dict[str, Estimate]:
    """Main effects and interactions of a two-level factorial with seeds as blocks.

    A main effect is the mean of the arms with the factor less the mean of those without it. An interaction, named
    `A x B`, is half of how much A's effect differs between B on and B off. Intervals: Student's t with the residual of
    the additive model of arms and seeds, (arms - 1)(seeds - 1) degrees of freedom, the same for every effect.

    Raises: ValueError where an arm is missing, or seeds differ between arms.
    """
    levels = list(itertools.product((False, True), repeat=len(factors)))
    missing = [level for level in levels if level not in arms]
    if missing:
        raise ValueError(f"arms of the factorial are missing: {missing}")
    seeds = sorted(arms[levels[0]])
    if any(sorted(arms[level]) != seeds for level in levels):
        raise ValueError("the arms of a factorial need the same seeds")
    table = np.array([[arms[level][seed] for seed in seeds] for level in levels], dtype=np.float64)
    freedom = (len(levels) - 1) * (len(seeds) - 1)
    residual = table - table.mean(axis=1, keepdims=True) - table.mean(axis=0, keepdims=True) + table.mean()
    # An effect is a mean of half of all runs less a mean of the other half.
    error = np.sqrt((residual**2).sum() / freedom * 4 / table.size) if freedom else float("nan")
    signs = np.array([[1.0 if on else -1.0 for on in level] for level in levels])
    effects = {}
    for order in range(1, len(factors) + 1):
        for chosen in itertools.combinations(range(len(factors)), order):
            contrast = signs[:, chosen].prod(axis=1)
            value = float((contrast * table.mean(axis=1)).sum() * 2 / len(levels))
            name = " x ".join(factors[i] for i in chosen)
            effects[name] = _interval(value, float(error), freedom, len(seeds))
    return effects


def _interval(value: float, error: float, freedom: int, num_seeds: int) -> Estimate:
    if freedom < 1:
        return Estimate(value, None, None, num_seeds)
    from scipy import stats

    reach = float(stats.t.ppf((1 + LEVEL) / 2, freedom)) * error
    return Estimate(value, value - reach, value + reach, num_seeds)
