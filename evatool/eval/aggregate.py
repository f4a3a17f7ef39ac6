"""Figures over several sets: averages and gaps, each with an interval, and paired between models. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evatool.eval.intervals import Interval, quantile_interval
from evatool.eval.metrics import Metric
from evatool.eval.predictions import Predictions
from evatool.eval.suite import Suite
from evatool.eval.tasks.build import task_of


@dataclass(frozen=True)
class Combined:
    """A weighted sum over sets."""

    name: str
    title: str
    about: str
    metric: str  # of each set
    weights: dict[str, float]  # by set

    def value(self, metrics: Mapping[str, Metric]) -> float:
        """The figure."""
        return sum(weight * metrics[name].value for name, weight in self.weights.items())

    def chance(self, metrics: Mapping[str, Metric]) -> float:
        """The weighted sum of what a guess would give on each set."""
        return sum(weight * metrics[name].chance for name, weight in self.weights.items())

    def interval(self, metrics: Mapping[str, Metric], *, num_resamples: int, seed: int) -> Interval:
        """The figure with its 95 % interval: every set is resampled by itself."""
        drawn: NDArray[np.float64] = np.zeros(num_resamples)
        for number, (name, weight) in enumerate(self.weights.items()):
            drawn += weight * metrics[name].resamples(num_resamples=num_resamples, seed=(seed, number))
        return quantile_interval(self.value(metrics), drawn)


def combined_metrics(suite: Suite) -> list[Combined]:
    """The averages and gaps of a suite, in its order."""
    found = []
    for average in suite.averages:
        names = average.sets or [s.name for s in suite.sets if task_of(s.kind).in_averages]
        weights = {name: 1 / len(names) for name in names}
        about = f"Mean over {len(names)} sets, each counting the same"
        found.append(Combined(average.name, average.title, about, average.metric, weights))
    for gap in suite.gaps:
        weights = {gap.base: 1.0} | {name: -1 / len(gap.sets) for name in gap.sets}
        found.append(Combined(gap.name, gap.title, gap.about, gap.metric, weights))
    return found


def metrics_for(
    figure: Combined, predictions: Mapping[str, Predictions], whole: Sequence[str]
) -> dict[str, Metric] | None:
    """The figure's metric on each of its sets; None unless all were measured, and none is only a part of its set.

    Args:
        predictions: by set.
        whole: sets that have the samples that the suite states.
    """
    found = {name: predictions[name].metric(figure.metric) for name in figure.weights if name in predictions}
    metrics = {name: metric for name, metric in found.items() if metric is not None and name in whole}
    return metrics if len(metrics) == len(figure.weights) else None


def paired(before: Mapping[str, Metric], after: Mapping[str, Metric]) -> dict[str, Metric]:
    """Changes sample by sample on every set."""
    return {name: before[name].change(after[name]) for name in before}
