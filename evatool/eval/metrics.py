"""Per-sample answers to metrics: what is averaged, over what, and what chance gives. No torch."""

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
from evatool.eval.predictions import (
    DIRECTIONS,
    RECALL_AT,
    ClassificationResult,
    Direction,
    Predictions,
    RetrievalResult,
    ScoreResult,
)

PER_CLASS = "mean_per_class"


@dataclass(frozen=True)
class Metric:
    """One metric's answers, in an order that is the same for every model on the set.

    Attributes:
        values: (n,) bool, or float in [0, 1].
        chance: expected mean of a guess.
        clusters: (n,) answers drawn together when resampling.
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


def metrics_of(answers: Predictions) -> list[Metric]:
    """The metrics of one model's answers on one set.

    Classification: top-1, with more than five classes top-5, and mean-per-class recall where a class has several
    samples. Retrieval: recall at 1, 5 and 10 in both directions, and the mean of the six. Else the scores kept.
    """
    match answers:
        case ClassificationResult():
            tops = (1, 5) if answers.num_classes > 5 else (1,)
            found = [Metric(f"top{k}", answers.correct(k), k / answers.num_classes) for k in tops]
            if np.bincount(answers.labels).max() > 1:
                found.append(Metric(PER_CLASS, answers.correct(1), 1 / answers.num_classes, classes=answers.labels))
            return found
        case RetrievalResult():
            found = [_recall(answers, direction, k) for direction in DIRECTIONS for k in RECALL_AT]
            chance = float(np.mean([m.chance for m in found]))
            return [*found, Metric("mean_recall", answers.recall_by_image(), chance)]
        case ScoreResult():
            return [Metric(metric, scores, answers.chance[metric]) for metric, scores in answers.scores.items()]


def metric_named(answers: Predictions, metric: str) -> Metric | None:
    """One of them, if these answers have it; mean-per-class recall is top-1 where every class has one sample."""
    if metric == PER_CLASS and isinstance(answers, ClassificationResult):
        return Metric(PER_CLASS, answers.correct(1), 1 / answers.num_classes, classes=answers.labels)
    return next((m for m in metrics_of(answers) if m.metric == metric), None)


def _recall(answers: RetrievalResult, direction: Direction, k: int) -> Metric:
    clusters = answers.image_of_text if direction == "text_to_image" else None
    return Metric(f"{direction}_recall@{k}", answers.hits(direction, k), answers.chance(direction, k), clusters)
