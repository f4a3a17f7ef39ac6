"""Zero-shot classification: clip-benchmark's prompts and arithmetic, metrics and memory of our own.

clip-benchmark's own functions are the reference of the tests and not called: its `accuracy` raises on numpy 2.4
(CLIP_benchmark#147), its classifier encodes 77 tokens a prompt and one class at a time, and it keeps every logit.
"""

from __future__ import annotations

import functools
from collections.abc import Callable, Sequence
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatool.core.errors import DataError
from evatool.eval.encode import Encoding, ImageMemory, fail_on_all_ranks, gather_arrays, image_batches, own_numbers
from evatool.eval.predictions import ClassificationResult
from evatool.eval.tasks.base import ClipModel, EvaluationSet
from evatool.eval.text_classifier import TensorStore, check_prompts, text_classifier

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
    memory: ImageMemory | None = None,
    trim_text: bool = False,
    lockstep: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> ClassificationResult:
    """Zero-shot answers: class = largest dot product with the mean of the class's prompts' features, in float32.

    Equal logits rank by class id, as `argmax` does. Logits are reduced batch by batch: memory does not grow with N x C.
    Every rank must call it, with a set that was opened for its rank; each gets the answers of all.

    Args:
        tokenizer: list of texts -> (T, L) int64.
        device: where the model is.
        stores: text classifiers of this model that are kept, see `text_classifier`.
        memory: features of pictures seen in other sets, see `image_batches`.
        trim_text, lockstep: see `Encoding`.
        on_batch: called with the number of pictures after each batch.
    Raises:
        DataError: no class names or templates, a template without `{c}`, a class id out of range, an empty set.
        NumericalError: features that are not finite.
    """
    how = Encoding(device, trim_text, lockstep)
    classnames, templates = list(eval_set.classnames or []), list(eval_set.templates or [])
    check_prompts(eval_set.name, classnames, templates)
    weights = text_classifier(model, tokenizer, classnames, templates, how, name=eval_set.name, stores=stores)
    parts: list[dict[str, np.ndarray]] = []
    with fail_on_all_ranks():
        check = functools.partial(check_labels, num_classes=len(classnames), name=eval_set.name)
        batches = image_batches(model, eval_set.loader, how, where=eval_set.name, check=check, memory=memory)
        for features, target in batches:
            parts.append(_predictions(LOGIT_SCALE * features @ weights, target.to(features.device)))
            if on_batch:
                on_batch(len(target))
    own = {name: np.concatenate([part[name] for part in parts]) for name in parts[0]} if parts else {}
    whole = gather_arrays(own, own_numbers(eval_set.loader, len(own.get("labels", ()))))
    if not whole:
        raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
    return ClassificationResult(num_classes=len(classnames), **whole)


def _predictions(logits: Tensor, target: Tensor) -> dict[str, np.ndarray]:
    """What is kept of (B, C) logits."""
    top, values = _first(logits, max(NUM_KEPT, 2))
    own = logits.gather(1, target[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device)[None] < target[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    margin = values[:, 0] - values[:, 1] if values.shape[1] > 1 else torch.full_like(values[:, 0], torch.inf)
    return {
        "labels": target.cpu().numpy().astype(np.int32),
        "top": top[:, :NUM_KEPT].cpu().numpy().astype(np.int32),
        "rank": rank.cpu().numpy().astype(np.int32),
        "margin": margin.cpu().numpy().astype(np.float32),
    }


def _first(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the largest logits of each row, ties to the smaller id: `argmax` over and over, which for few
    of many classes costs a fraction of a stable sort."""
    left, ids = logits.clone(), []
    for _ in range(min(count, logits.shape[1])):
        ids.append(left.argmax(dim=1, keepdim=True))
        left.scatter_(1, ids[-1], -torch.inf)
    top = torch.cat(ids, dim=1)
    return top, logits.gather(1, top)


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
