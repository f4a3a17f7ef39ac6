"""What a model answered on a set, sample by sample: enough for every metric, interval and comparison. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from numpy.typing import NDArray

# N samples, C classes, I pictures, T distinct captions, Q queries

RECALL_AT = (1, 5, 10)
Direction = Literal["text_to_image", "image_to_text"]
DIRECTIONS: tuple[Direction, ...] = ("text_to_image", "image_to_text")
NEAR_TIE = 1e-4
"""Two best logits closer than this may change places between two correct float32 evaluations."""


@dataclass(frozen=True)
class ClassificationResult:
    """Per-sample answers of one model on one set, in the set's order."""

    labels: NDArray[np.int32]  # (N,) right class
    top: NDArray[np.int32]  # (N, min(5, C)) classes by falling logit
    rank: NDArray[np.int32]  # (N,) classes ranked before the right one; 0 is right at the first try
    num_classes: int
    margin: NDArray[np.float32]  # (N,) best logit less the second best; infinite with one class

    def correct(self, k: int) -> NDArray[np.bool_]:
        """(N,) True where the right class is among the first k."""
        return self.rank < k

    @property
    def near_ties(self) -> NDArray[np.int64]:
        """Samples whose two best logits differ by less than 1e-4."""
        return np.flatnonzero(self.margin < NEAR_TIE)

    @property
    def largest_class_share(self) -> float:
        """Accuracy of always naming the commonest class."""
        return float(np.bincount(self.labels).max() / self.labels.size)


@dataclass(frozen=True)
class RetrievalResult:
    """Ranks of one model on one set. A rank counts the wrong candidates before the best right one; 0 is a hit at 1."""

    text_to_image: NDArray[np.int32]  # (T,)
    image_to_text: NDArray[np.int32]  # (I,)
    num_right_images: NDArray[np.int32]  # (T,) right pictures of each caption
    num_right_captions: NDArray[np.int32]  # (I,) right captions of each picture
    image_of_text: NDArray[np.int32]  # (T,) first picture of each caption; captions of one picture are one cluster

    def rank(self, direction: Direction) -> NDArray[np.int32]:
        """(Q,) ranks of one direction."""
        return self.text_to_image if direction == "text_to_image" else self.image_to_text

    def hits(self, direction: Direction, k: int) -> NDArray[np.bool_]:
        """(Q,) True where a right candidate is among the first k."""
        return self.rank(direction) < k

    def chance(self, direction: Direction, k: int) -> float:
        """Recall at k of candidates in random order, averaged over the queries."""
        if direction == "text_to_image":
            return _chance_of_hit(self.num_right_images, len(self.image_to_text), k)
        return _chance_of_hit(self.num_right_captions, len(self.text_to_image), k)

    def recall_by_image(self) -> NDArray[np.float64]:
        """(I,) shares whose mean is the mean of all six recalls: both directions of a picture belong together."""
        num_texts, num_images = len(self.text_to_image), len(self.image_to_text)
        total = np.zeros(num_images)
        for k in RECALL_AT:
            hits = self.hits("text_to_image", k).astype(np.float64)
            total += np.bincount(self.image_of_text, weights=hits, minlength=num_images) * num_images / num_texts
            total += self.hits("image_to_text", k)
        mean: NDArray[np.float64] = total / (2 * len(RECALL_AT))
        return mean


@dataclass(frozen=True)
class ScoreResult:
    """Scores in [0, 1] by metric, one a sample (or scene, or query)."""

    scores: dict[str, NDArray[np.float32]]
    chance: dict[str, float]


Predictions = ClassificationResult | RetrievalResult | ScoreResult


def _chance_of_hit(num_right: NDArray[np.int32], num_candidates: int, k: int) -> float:
    """1 - C(P - r, k) / C(P, k), averaged over queries with r right ones among P candidates."""
    total = 0.0
    for r, queries in zip(*np.unique(num_right, return_counts=True), strict=True):
        drawn = np.arange(min(k, num_candidates))
        miss = np.prod(np.clip(num_candidates - r - drawn, 0, None) / (num_candidates - drawn))
        total += float(queries) * (1.0 - float(miss))
    return total / num_right.size
