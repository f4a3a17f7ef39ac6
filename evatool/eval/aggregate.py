"""Figures over several sets: averages and gaps, each with an interval, and paired between models. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evatool.eval.intervals import Interval, quantile_interval
from evatool.eval.metrics import Measure, measure_named
from evatool.eval.predictions import Answers
from evatool.eval.suite import Suite

AVERAGE = "average"
"""Metric of the rows that hold these figures; their set is the figure's name."""


@dataclass(frozen=True)
class Combined:
    """A weighted sum over sets."""

    name: str
    title: str
    about: str
    metric: str  # of each set
    weights: dict[str, float]  # by set

    def value(self, measures: Mapping[str, Measure]) -> float:
        """The figure."""
        return sum(weight * measures[name].value for name, weight in self.weights.items())

    def chance(self, measures: Mapping[str, Measure]) -> float:
        """What a guess would give."""
        return sum(weight * measures[name].chance for name, weight in self.weights.items())

    def interval(self, measures: Mapping[str, Measure], *, num_resamples: int, seed: int) -> Interval:
        """The figure with its 95 % interval: every set is resampled by itself."""
        drawn: NDArray[np.float64] = np.zeros(num_resamples)
        for number, (name, weight) in enumerate(self.weights.items()):
            drawn += weight * measures[name].resamples(num_resamples=num_resamples, seed=(seed, number))
        return quantile_interval(self.value(measures), drawn)


def combined_figures(suite: Suite) -> list[Combined]:
    """The averages and gaps of a suite, in its order."""
    kinds = ("classification", "retrieval")
    found = []
    for average in suite.averages:
        names = average.sets or [s.name for s in suite.sets if s.kind in kinds]
        weights = {name: 1 / len(names) for name in names}
        about = f"Mean over {len(names)} sets, each counting the same"
        found.append(Combined(average.name, average.title, about, average.metric, weights))
    for gap in suite.gaps:
        weights = {gap.base: 1.0} | {name: -1 / len(gap.sets) for name in gap.sets}
        found.append(Combined(gap.name, gap.title, gap.about, gap.metric, weights))
    return found


def measures_for(figure: Combined, answers: Mapping[str, Answers], whole: Sequence[str]) -> dict[str, Measure] | None:
    """The figure's metric on each of its sets; None unless all were measured, and none is only a part of its set.

    Args:
        answers: by set.
        whole: sets that have the samples that the suite states.
    """
    found = {name: measure_named(answers[name], figure.metric) for name in figure.weights if name in answers}
    measures = {name: measure for name, measure in found.items() if measure is not None and name in whole}
    return measures if len(measures) == len(figure.weights) else None


def paired(before: Mapping[str, Measure], after: Mapping[str, Measure]) -> dict[str, Measure]:
    """Changes sample by sample on every set."""
    return {name: before[name].change(after[name]) for name in before}
