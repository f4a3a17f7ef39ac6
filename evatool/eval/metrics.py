"""A metric: what is averaged, over what, and what chance gives. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from evatool.eval.intervals import (
    Interval,
    bootstrap_class_mean,
    bootstrap_mean,
    class_mean,
    paired_difference,
    resampled_means,
)


@dataclass(frozen=True)
class Metric:
    """The values that one metric averages, in an order that is the same for every model on the set.

    Attributes:
        values: (n,) bool, or float in [0, 1].
        chance: expected mean of a guess.
        clusters: (n,) values of one cluster are drawn together when resampling.
        classes: (n,) the metric is the mean over these of each one's mean.
    """

    metric: str
    values: NDArray[Any]
    chance: float
    clusters: NDArray[np.int32] | None = None
    classes: NDArray[np.int32] | None = None

    @property
    def value(self) -> float:
        """The metric."""
        return float(np.mean(self.values)) if self.classes is None else class_mean(self.values, self.classes)

    def interval(self, *, num_resamples: int, seed: int) -> Interval:
        """The metric with its 95 % interval."""
        if self.classes is not None:
            return bootstrap_class_mean(self.values, self.classes, num_resamples=num_resamples, seed=seed)
        return bootstrap_mean(self.values, num_resamples=num_resamples, seed=seed, clusters=self.clusters)

    def difference_to(self, later: Metric, *, num_resamples: int, seed: int) -> Interval:
        """`later` less this one over the same samples, with its 95 % interval."""
        if self.classes is not None:
            change = later.values.astype(np.float64) - self.values
            return bootstrap_class_mean(
                change, self.classes, num_resamples=num_resamples, seed=seed, support=(-1.0, 1.0)
            )
        return paired_difference(
            self.values, later.values, num_resamples=num_resamples, seed=seed, clusters=self.clusters
        )

    def resamples(self, *, num_resamples: int, seed: tuple[int, ...]) -> NDArray[np.float64]:
        """(num_resamples,) values of the metric over resampled samples."""
        return resampled_means(
            self.values, num_resamples=num_resamples, seed=seed, clusters=self.clusters, classes=self.classes
        )

    def change(self, later: Metric) -> Metric:
        """`later` less this one, sample by sample."""
        change = later.values.astype(np.float64) - self.values
        return Metric(self.metric, change, 0.0, self.clusters, self.classes)
