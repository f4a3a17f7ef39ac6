"""Zero-shot classification: clip-benchmark's prompts and arithmetic, metrics and memory of our own.

clip-benchmark's own functions are the reference of the tests and not called: its `accuracy` raises on numpy 2.4
(CLIP_benchmark#147), its classifier encodes 77 tokens a prompt and one class at a time, and it keeps every logit.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatool.errors import DataError
from evatool.eval.answers import ClassificationResult
from evatool.eval.classifier import TensorStore, check_prompts, text_classifier
from evatool.eval.encode import Encoding, gather_arrays, image_batches, own_numbers, together
from evatool.eval.sets import ClipModel, EvaluationSet

# N samples, C classes, E embedding, B of a batch

NUM_KEPT = 5
LOGIT_SCALE = 100.0  # clip-benchmark's, whatever the model's own temperature is


def classify(
    model: ClipModel,
    tokenizer: Callable[[Any], Tensor],
    eval_set: EvaluationSet,
    *,
    device: str = "cpu",
    stores: Sequence[TensorStore] = (),
    trim_text: bool = False,
    in_step: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> ClassificationResult:
    """Zero-shot answers: class = largest dot product with the mean of the class's prompts' features, in float32.

    Equal logits rank by class id, as `argmax` does. Logits are reduced batch by batch: memory does not grow with N x C.
    Every rank must call it, with a set that was opened for its rank; each gets the answers of all.

    Args:
        tokenizer: list of texts -> (T, L) int64.
        device: where the model is.
        stores: text classifiers of this model that are kept, see `text_classifier`.
        trim_text, in_step: see `Encoding`.
        on_batch: called with the number of pictures after each batch.
    Raises:
        DataError: no class names or templates, a template without `{c}`, a class id out of range, an empty set.
        NumericalError: features that are not finite.
    """
    how = Encoding(device, trim_text, in_step)
    classnames, templates = list(eval_set.classnames or []), list(eval_set.templates or [])
    check_prompts(eval_set.name, classnames, templates)
    weights = text_classifier(model, tokenizer, classnames, templates, how, name=eval_set.name, stores=stores)
    parts: list[dict[str, np.ndarray]] = []
    with together():
        for features, target in image_batches(model, _Checked(eval_set, len(classnames)), how, where=eval_set.name):
            parts.append(_answers(LOGIT_SCALE * features @ weights, target.to(features.device)))
            if on_batch:
                on_batch(len(target))
    own = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    whole = gather_arrays(own, own_numbers(eval_set.loader, len(own.get("labels", ()))))
    if not whole:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    return ClassificationResult(num_classes=len(classnames), **whole)


class _Checked:
    """The loader's batches, their labels checked before the model runs."""

    def __init__(self, eval_set: EvaluationSet, num_classes: int) -> None:
        self.eval_set, self.num_classes = eval_set, num_classes
        self.most_batches = getattr(eval_set.loader, "most_batches", 0)
        self.transform = getattr(eval_set.loader, "transform", None)

    def __iter__(self) -> Any:
        for pictures, labels in self.eval_set.loader:
            check_labels(labels, self.num_classes, self.eval_set.name)
            yield pictures, labels


def _answers(logits: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """What is kept of (B, C) logits."""
    best = torch.sort(logits, dim=1, descending=True, stable=True)  # stable: ties go to the smaller id
    own = logits.gather(1, target[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device)[None] < target[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    two = best.values[:, :2]
    margin = two[:, 0] - two[:, 1] if two.shape[1] == 2 else torch.full_like(two[:, 0], torch.inf)
    return {
        "labels": target.cpu().numpy().astype(np.int32),
        "top": best.indices[:, :NUM_KEPT].cpu().numpy().astype(np.int32),
        "rank": rank.cpu().numpy().astype(np.int32),
        "margin": margin.cpu().numpy().astype(np.float32),
    }


def check_labels(labels: Tensor, num_classes: int, name: str) -> None:
    """Refuse labels that are no class ids. Raises: DataError with the first that is not."""
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
