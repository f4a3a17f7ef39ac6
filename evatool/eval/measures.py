"""Per-sample answers to metrics: what is averaged, over what, and what chance gives."""

from __future__ import annotations

from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from evatool.eval.intervals import Interval, bootstrap_mean, paired_difference
from evatool.eval.retrieval import DIRECTIONS, RECALL_AT, RetrievalResult
from evatool.eval.zero_shot import ClassificationResult

Answers = ClassificationResult | RetrievalResult


@dataclass(frozen=True)
class Measure:
    """One metric's right and wrong answers, in an order that is the same for every model on the set."""

    metric: str
    hits: NDArray[np.bool_]  # (n,)
    chance: float  # expected share of hits of a guess
    clusters: NDArray[np.int32] | None = None  # (n,) answers drawn together when resampling

    def interval(self, *, num_resamples: int, seed: int) -> Interval:
        """Share of hits with its 95 % interval."""
        return bootstrap_mean(self.hits, num_resamples=num_resamples, seed=seed, clusters=self.clusters)

    def difference_to(self, later: Measure, *, num_resamples: int, seed: int) -> Interval:
        """`later` less this one over the same samples, with its 95 % interval."""
        return paired_difference(self.hits, later.hits, num_resamples=num_resamples, seed=seed, clusters=self.clusters)


def measures_of(answers: Answers) -> list[Measure]:
    """Top-1 and, with more than five classes, top-5; or recall at 1, 5 and 10 in both directions."""
    if isinstance(answers, ClassificationResult):
        tops = (1, 5) if answers.num_classes > 5 else (1,)
        return [Measure(f"top{k}", answers.correct(k), k / answers.num_classes) for k in tops]
    return [
        Measure(
            f"{direction}_recall@{k}",
            answers.hits(direction, k),
            answers.chance(direction, k),
            answers.picture_of_text if direction == "text_to_image" else None,
        )
        for direction in DIRECTIONS
        for k in RECALL_AT
    ]
