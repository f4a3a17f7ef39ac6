"""Per-class accuracy, what the worst classes are taken for, and which misses to show. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import numpy as np

from evatool.eval.predictions import ClassificationResult

_SHOWN = 8  # classes at either end
_COLUMNS = 6  # wrong answers told apart


@dataclass(frozen=True)
class ClassRow:
    """One class."""

    name: str
    right: int
    n: int
    taken_for: list[tuple[str, int]]  # wrong classes by falling count, at most three


@dataclass(frozen=True)
class ClassPanel:
    """The classes of a set that one model does best and worst on."""

    set: str
    title: str
    worst: list[ClassRow]
    best: list[ClassRow]
    num_classes: int
    deciles: list[int]  # classes by accuracy: 0 to 10 %, 10 to 20 %, ... 90 to 100 %
    confusion: list[list[int]]  # rows: the worst classes; columns: right, the commonest wrong answers, all others
    wrong: list[str]  # names of those commonest wrong answers; empty where no two samples share one


def class_panel(
    name: str, title: str, predictions: ClassificationResult, classnames: Sequence[str]
) -> ClassPanel | None:
    """Classes with the smallest and largest accuracy; None where no class has two samples, so that none can be told.

    A class is shown at one end only, and never right is not among the best.

    Among equals the class with more samples comes first, then the one with the smaller id.
    """
    counts = np.bincount(predictions.labels, minlength=predictions.num_classes)
    if counts.max() < 2:
        return None
    right = np.bincount(predictions.labels[predictions.correct(1)], minlength=predictions.num_classes)
    shown = np.flatnonzero(counts > 0)
    accuracy = right[shown] / counts[shown]
    upwards = shown[np.lexsort((shown, -counts[shown], accuracy))]
    downwards = shown[np.lexsort((shown, -counts[shown], -accuracy))]
    half = min(_SHOWN, len(shown) // 2 or 1)
    worst = upwards[:half]
    confusion, wrong = _confusion(predictions, worst)
    best = [k for k in downwards if right[k] and k not in worst][:_SHOWN]
    return ClassPanel(
        set=name,
        title=title,
        worst=[_row(k, predictions, classnames, right, counts) for k in worst],
        best=[_row(k, predictions, classnames, right, counts) for k in best],
        num_classes=len(shown),
        deciles=np.bincount(np.minimum((10 * accuracy).astype(int), 9), minlength=10).tolist(),
        confusion=confusion,
        wrong=[classnames[k] for k in wrong],
    )


def missed_samples(predictions: ClassificationResult, count: int) -> list[int]:
    """Wrong samples to look at: those the model is surest of, at most one a class it names.

    Ties go to the earlier sample.
    """
    wrong = np.flatnonzero(~predictions.correct(1))
    chosen: list[int] = []
    named: set[int] = set()
    for i in wrong[np.argsort(-predictions.margin[wrong], kind="stable")].tolist():
        if int(predictions.top[i, 0]) not in named:
            named.add(int(predictions.top[i, 0]))
            chosen.append(i)
        if len(chosen) == count:
            break
    return chosen


def _row(
    k: int, predictions: ClassificationResult, classnames: Sequence[str], right: np.ndarray, counts: np.ndarray
) -> ClassRow:
    answered = predictions.top[predictions.labels == k, 0]
    wrong, times = np.unique(answered[answered != k], return_counts=True)
    order = np.lexsort((wrong, -times))[:3]
    return ClassRow(
        classnames[k], int(right[k]), int(counts[k]), [(classnames[wrong[i]], int(times[i])) for i in order]
    )


def _confusion(predictions: ClassificationResult, rows: np.ndarray) -> tuple[list[list[int]], list[int]]:
    """How often each class was named right, as each of the commonest wrong answers, and as anything else."""
    of_rows = np.isin(predictions.labels, rows) & ~predictions.correct(1)
    named, times = np.unique(predictions.top[of_rows, 0], return_counts=True)
    order = np.lexsort((named, -times))
    columns = [int(named[i]) for i in order if times[i] > 1][:_COLUMNS]
    table = []
    for k in rows:
        answered = predictions.top[predictions.labels == k, 0]
        counts = [int((answered == k).sum()), *(int((answered == c).sum()) if c != k else 0 for c in columns)]
        table.append([*counts, len(answered) - sum(counts)])
    return table, columns
