"""Zero-shot classification with clip-benchmark's classifier and forward pass, metrics of our own.

clip-benchmark's `accuracy` is never called: it raises on numpy 2.4 (CLIP_benchmark#147), and only per-sample answers
allow intervals and paired comparisons.
"""

from __future__ import annotations

from collections.abc import Callable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.errors import DataError, NumericalError
from evatool.eval.sets import ClipModel, EvaluationSet

# N samples, C classes, E embedding

NUM_KEPT = 5
Classifiers = dict[tuple[tuple[str, ...], tuple[str, ...]], Tensor]
"""Text classifiers of one model by (class names, templates): sets that share both share the work."""


@dataclass(frozen=True)
class ClassificationResult:
    """Per-sample answers of one model on one set, in the set's order."""

    labels: NDArray[np.int32]  # (N,) right class
    top: NDArray[np.int32]  # (N, min(5, C)) classes by falling logit
    rank: NDArray[np.int32]  # (N,) classes ranked before the right one; 0 is right at the first try
    num_classes: int

    def correct(self, k: int) -> NDArray[np.bool_]:
        """(N,) True where the right class is among the first k."""
        return self.rank < k

    @property
    def largest_class_share(self) -> float:
        """Accuracy of always naming the commonest class."""
        return float(np.bincount(self.labels).max() / self.labels.size)


def classify(
    model: ClipModel,
    tokenizer: Callable[[Any], Tensor],
    eval_set: EvaluationSet,
    *,
    device: str = "cpu",
    classifiers: Classifiers | None = None,
    on_batch: Callable[[int], None] | None = None,
) -> ClassificationResult:
    """Zero-shot answers in float32: class = largest dot product with the mean of the class's prompts' features.

    Equal logits rank by class id, as `argmax` does. Logits are reduced batch by batch: memory does not grow with N x C.

    Args:
        tokenizer: list of texts -> (T, L) int64.
        device: where the model is, as a string; that is what clip-benchmark's functions take.
        classifiers: filled and reused over the sets of one model.
        on_batch: called with the number of pictures after each batch.
    Raises:
        DataError: no class names or templates, a template without `{c}`, a class id out of range, an empty set.
        NumericalError: features that are not finite.
    """
    from clip_benchmark.metrics import zeroshot_classification as benchmark

    classnames, templates = list(eval_set.classnames or []), list(eval_set.templates or [])
    _check_prompts(eval_set.name, classnames, templates)
    classifiers = {} if classifiers is None else classifiers
    key = (tuple(classnames), tuple(templates))
    with _without_bars(benchmark):
        if key not in classifiers:
            weights = benchmark.zero_shot_classifier(model, tokenizer, classnames, templates, device, amp=False)
            _check_finite(weights, eval_set.name, "text features")
            classifiers[key] = weights
        labels, tops, ranks = [], [], []
        for batch in eval_set.loader:
            _check_labels(batch[1], len(classnames), eval_set.name)
            # one batch a call: run_classification keeps every logit it made until it returns
            logits, target = benchmark.run_classification(model, classifiers[key], [batch], device, amp=False)
            _check_finite(logits, eval_set.name, "logits")
            labels.append(target.numpy().astype(np.int32))
            tops.append(_best_classes(logits))
            ranks.append(_rank_of(logits, target))
            if on_batch:
                on_batch(len(target))
    if not labels:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    return ClassificationResult(np.concatenate(labels), np.concatenate(tops), np.concatenate(ranks), len(classnames))


@contextmanager
def _without_bars(module: Any) -> Iterator[None]:
    """clip-benchmark's functions without their tqdm bars, which would tear the live display of the command line."""
    bars = module.tqdm
    module.tqdm = lambda items, *_, **__: items
    try:
        yield
    finally:
        module.tqdm = bars


def _best_classes(logits: Tensor) -> NDArray[np.int32]:
    """(N, min(5, C)) class ids by falling logit; a stable sort, so that ties go to the smaller id."""
    order = torch.sort(logits, dim=1, descending=True, stable=True).indices
    return order[:, :NUM_KEPT].numpy().astype(np.int32)


def _rank_of(logits: Tensor, target: Tensor) -> NDArray[np.int32]:
    """(N,) classes with a larger logit than the target's, or an equal one and a smaller id."""
    own = logits.gather(1, target[:, None])
    earlier = torch.arange(logits.shape[1])[None] < target[:, None]
    return ((logits > own) | ((logits == own) & earlier)).sum(dim=1).numpy().astype(np.int32)


def _check_prompts(name: str, classnames: Sequence[str], templates: Sequence[str]) -> None:
    if not classnames:
        raise DataError(
            f"evaluation set {name} has no class names",
            expected="one class name a line in classnames.txt, in the order of the class ids",
            fix=f"add classnames.txt to the folder of {name}, or set dataset_type.txt to retrieval",
        )
    if not templates:
        raise DataError(
            f"evaluation set {name} has no prompt templates",
            expected="one prompt a line with {c} for the class name, such as: a photo of a {c}.",
            fix=f"add zeroshot_classification_templates.txt to the folder of {name}",
        )
    for number, template in enumerate(templates, start=1):
        if "{c}" not in template:
            raise DataError(
                f"prompt template {template!r} of {name} names no class",
                where=f"zeroshot_classification_templates.txt, line {number}",
                expected="{c} where the class name goes",
                fix="every class would get the same prompt: mend or remove the line",
            )


def _check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    if labels.ndim != 1:
        raise DataError(
            f"evaluation set {name} has {labels.ndim}-dimensional labels",
            expected="one class id a picture; sets with several labels a picture are not evaluated",
            fix="remove it from the suite with `sets`",
        )
    outside = labels[(labels < 0) | (labels >= num_classes)]
    if outside.numel():
        raise DataError(
            f"class id {int(outside[0])} of evaluation set {name} is out of range",
            expected=f"ids from 0 to {num_classes - 1}: classnames.txt has {num_classes} lines",
            fix="count the lines of classnames.txt against the .cls files; ids start at 0",
        )


def _check_finite(values: Tensor, name: str, what: str) -> None:
    if not bool(torch.isfinite(values).all()):
        raise NumericalError(
            f"the model gives {what} that are not finite on {name}",
            expected="finite numbers",
            fix="evaluate an earlier checkpoint; the weights themselves are likely not finite",
        )
