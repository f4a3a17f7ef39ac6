"""Predictions of a model on a set, sample by sample: enough for metrics, intervals and comparisons. No torch."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, ClassVar, Literal, Self

import numpy as np
from numpy.typing import NDArray

from evatool.core.renamed_keys import PREDICTION_ARRAYS, rename
from evatool.eval.metrics import Metric

# N samples, C classes, I images, T distinct captions, Q queries

RECALL_AT = (1, 5, 10)
Direction = Literal["text_to_image", "image_to_text"]
DIRECTIONS: tuple[Direction, ...] = ("text_to_image", "image_to_text")
NEAR_TIE = 1e-4
"""Two best logits closer than this may change places between two correct float32 evaluations."""
PER_CLASS = "mean_per_class"


class Predictions(ABC):
    """One model's predictions on one set, in an order that is the same for every model.

    They say which metrics they give, and how they are stored; `evatool compare` works on them alone. A task whose
    metrics are means of one score a sample returns `ScoreResult` and needs no class of its own.
    """

    layout: ClassVar[str]
    """Name of the stored form, written beside the arrays."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples that were predicted."""

    @abstractmethod
    def metrics(self) -> list[Metric]:
        """Every metric with what it averages, sample by sample, and what chance gives."""

    def metric(self, name: str) -> Metric | None:
        """The metric of that name; None where these predictions do not give it."""
        return next((m for m in self.metrics() if m.metric == name), None)

    @abstractmethod
    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        """Arrays to store by name, as small as they may be, and values for JSON that `from_arrays` needs."""

    @classmethod
    @abstractmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Self:
        """Predictions from what `to_arrays` gave. Raises: KeyError, TypeError or ValueError where they do not fit."""

    @property
    def near_ties(self) -> NDArray[np.int64]:
        """Positions of samples whose prediction another correct evaluation could change; none unless overridden."""
        return np.zeros(0, dtype=np.int64)

    @property
    def largest_class_share(self) -> float | None:
        """Accuracy of always naming the commonest class; None where there are no classes."""
        return None


@dataclass(frozen=True)
class ClassificationResult(Predictions):
    """Per-sample predictions of one model on one set, in the set's order."""

    layout: ClassVar[str] = "classification"

    labels: NDArray[np.int32]  # (N,) right class
    top: NDArray[np.int32]  # (N, min(5, C)) classes by falling logit
    rank: NDArray[np.int32]  # (N,) classes ranked before the right one; 0 is right at the first try
    num_classes: int
    margin: NDArray[np.float32]  # (N,) best logit less the second best; infinite with one class

    @property
    def num_samples(self) -> int:
        return len(self.labels)

    def correct(self, k: int) -> NDArray[np.bool_]:
        """(N,) True where the right class is among the first k."""
        return self.rank < k

    def metrics(self) -> list[Metric]:
        """Top-1, with more than five classes top-5, and mean-per-class recall where a class has several samples."""
        tops = (1, 5) if self.num_classes > 5 else (1,)
        found = [Metric(f"top{k}", self.correct(k), k / self.num_classes) for k in tops]
        return [*found, self._per_class()] if np.bincount(self.labels).max() > 1 else found

    def metric(self, name: str) -> Metric | None:
        """The metric of that name; mean-per-class recall also where every class has one sample and it equals top-1."""
        return self._per_class() if name == PER_CLASS else super().metric(name)

    def _per_class(self) -> Metric:
        return Metric(PER_CLASS, self.correct(1), 1 / self.num_classes, classes=self.labels)

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        small = np.min_scalar_type(self.num_classes)
        arrays: dict[str, NDArray[Any]] = {
            "labels": self.labels.astype(small),
            "top": self.top.astype(small),
            "rank": self.rank.astype(small),
            "margin": self.margin.astype(np.float16),
        }
        return arrays, {"num_classes": self.num_classes}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Self:
        labels, top, rank = (arrays[name].astype(np.int32) for name in ("labels", "top", "rank"))
        return cls(labels, top, rank, about["num_classes"], arrays["margin"].astype(np.float32))

    @property
    def near_ties(self) -> NDArray[np.int64]:
        """Samples whose two best logits differ by less than 1e-4."""
        return np.flatnonzero(self.margin < NEAR_TIE)

    @property
    def largest_class_share(self) -> float:
        """Accuracy of always naming the commonest class."""
        return float(np.bincount(self.labels).max() / self.labels.size)


@dataclass(frozen=True)
class RetrievalResult(Predictions):
    """Ranks of one model on one set. A rank counts the wrong candidates before the best right one; 0 is a hit at 1."""

    layout: ClassVar[str] = "retrieval"

    text_to_image: NDArray[np.int32]  # (T,)
    image_to_text: NDArray[np.int32]  # (I,)
    num_right_images: NDArray[np.int32]  # (T,) right images of each caption
    num_right_captions: NDArray[np.int32]  # (I,) right captions of each image
    image_of_text: NDArray[np.int32]  # (T,) first image of each caption; captions of one image are one cluster

    @property
    def num_samples(self) -> int:
        return len(self.image_to_text)

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
        """(I,) shares whose mean is the mean of all six recalls: both directions of an image belong together."""
        num_texts, num_images = len(self.text_to_image), len(self.image_to_text)
        total = np.zeros(num_images)
        for k in RECALL_AT:
            hits = self.hits("text_to_image", k).astype(np.float64)
            total += np.bincount(self.image_of_text, weights=hits, minlength=num_images) * num_images / num_texts
            total += self.hits("image_to_text", k)
        mean: NDArray[np.float64] = total / (2 * len(RECALL_AT))
        return mean

    def metrics(self) -> list[Metric]:
        """Recall at 1, 5 and 10 in both directions, and their mean; captions of one image are drawn together."""
        found = []
        for direction in DIRECTIONS:
            clusters = self.image_of_text if direction == "text_to_image" else None
            for k in RECALL_AT:
                name = f"{direction}_recall@{k}"
                found.append(Metric(name, self.hits(direction, k), self.chance(direction, k), clusters))
        chance = float(np.mean([m.chance for m in found]))
        return [*found, Metric("mean_recall", self.recall_by_image(), chance)]

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        return {name: getattr(self, name).astype(np.int32) for name in self._names()}, {}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Self:
        renamed = rename(arrays, PREDICTION_ARRAYS, "kept predictions")
        return cls(**{name: renamed[name] for name in cls._names()})

    @classmethod
    def _names(cls) -> list[str]:
        return [field.name for field in fields(cls)]


@dataclass(frozen=True)
class ScoreResult(Predictions):
    """Scores in [0, 1] by metric, one a sample (or scene, or query); each metric is the mean of its scores."""

    layout: ClassVar[str] = "scores"

    scores: dict[str, NDArray[Any]]
    chance: dict[str, float]

    @property
    def num_samples(self) -> int:
        """Scores of the first metric."""
        return len(next(iter(self.scores.values()), ()))

    def metrics(self) -> list[Metric]:
        """One metric for each of the scores."""
        return [Metric(metric, scores, self.chance[metric]) for metric, scores in self.scores.items()]

    def rounded(self) -> ScoreResult:
        """These scores as they are stored, in half precision, so that a resumed run gives the same numbers."""
        return ScoreResult(
            {metric: np.asarray(v).astype(np.float16).astype(np.float32) for metric, v in self.scores.items()},
            self.chance,
        )

    def to_arrays(self) -> tuple[dict[str, NDArray[Any]], dict[str, Any]]:
        arrays = {metric: values.astype(np.float16) for metric, values in self.scores.items()}
        return arrays, {"chance": self.chance}

    @classmethod
    def from_arrays(cls, arrays: Mapping[str, NDArray[Any]], about: Mapping[str, Any]) -> Self:
        chance = about["chance"]
        return cls({metric: arrays[metric].astype(np.float32) for metric in chance}, chance)


def _chance_of_hit(num_right: NDArray[np.int32], num_candidates: int, k: int) -> float:
    """1 - C(P - r, k) / C(P, k), averaged over queries with r right ones among P candidates."""
    total = 0.0
    for r, queries in zip(*np.unique(num_right, return_counts=True), strict=True):
        drawn = np.arange(min(k, num_candidates))
        miss = np.prod(np.clip(num_candidates - r - drawn, 0, None) / (num_candidates - drawn))
        total += float(queries) * (1.0 - float(miss))
    return total / num_right.size
