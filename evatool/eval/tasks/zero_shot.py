"""Zero-shot classification: clip-benchmark's prompts and arithmetic, metrics and memory of our own.

clip-benchmark's own functions are the reference of the tests and not called: its `accuracy` raises on numpy 2.4
(CLIP_benchmark#147), its classifier encodes 77 tokens a prompt and one class at a time, and it keeps every logit.
"""

from __future__ import annotations

import functools
from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evatool.core.errors import DataError
from evatool.eval.predictions import ClassificationResult
from evatool.eval.report.class_accuracy import class_panel, missed_samples
from evatool.eval.report.gallery import missed_image
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.base import EvalTask, Examples, Predicted

if TYPE_CHECKING:
    from torch import Tensor

    from evatool.eval.encoder import EvaluationSet, SetEncoder

# N samples, C classes, E embedding, B of a batch

NUM_KEPT = 5
LOGIT_SCALE = 100.0  # clip-benchmark's, whatever the model's own temperature is
_MISSES_SHOWN = 8  # images a set


class ZeroShotClassification(EvalTask[ClassificationResult]):
    """Class = largest dot product with the mean of the class's prompts' features, in float32.

    Equal logits rank by class id, as `argmax` does. Logits are reduced batch by batch: memory does not grow with N x C.
    Batches of the set are (images, class ids (B,) int64).
    """

    kind: ClassVar[str] = "classification"
    result = ClassificationResult
    wording = TaskWording(
        main_metrics=("top1",),
        labels={"top#": "top-#", "mean_per_class": "mean per class"},
        headline="names {hits} of {n} pictures right at the first try",
        unnamed=("top1",),
    )
    in_averages = True
    takes_probes = True

    def open_targets(self, encoder: SetEncoder, eval_set: EvaluationSet) -> Tensor:
        """(E, C) text classifier of the set's prompts."""
        return encoder.text_classifier(eval_set)

    def predict(self, encoder: SetEncoder, eval_set: EvaluationSet, targets: Tensor) -> Predicted[ClassificationResult]:
        """Class ranks of every sample.

        Raises: DataError for an empty set or a class id out of range; NumericalError for features not finite.
        """
        num_classes = len(eval_set.classnames)
        check = functools.partial(check_labels, num_classes=num_classes, name=eval_set.name)

        def rank_classes(features: Tensor, labels: Tensor) -> dict[str, NDArray[Any]]:
            return rank_logits(LOGIT_SCALE * features @ targets, labels.to(features.device))

        arrays = encoder.over_batches(eval_set, rank_classes, check=check)
        if not arrays:
            raise DataError(f"evaluation set {eval_set.name} has no samples", fix="prepare the set again")
        return Predicted(ClassificationResult(num_classes=num_classes, **arrays))

    def examples(self, predictions: ClassificationResult, eval_set: Any, title: str) -> Examples:
        """The classes done best and worst, and the wrong images that the model is surest of."""
        missed = [
            missed_image(
                eval_set.image(i),
                eval_set.samples.keys[i],
                eval_set.classnames[predictions.labels[i]],
                eval_set.classnames[predictions.top[i, 0]],
            )
            for i in missed_samples(predictions, _MISSES_SHOWN)
        ]
        return Examples(class_panel(eval_set.name, title, predictions, eval_set.classnames), missed)


def rank_logits(logits: Tensor, labels: Tensor) -> dict[str, NDArray[Any]]:
    """The part of (B, C) logits that is kept, by the names of `ClassificationResult`.

    Args:
        labels: (B,) right classes, on the device of the logits.
    """
    import torch

    top, values = _first(logits, max(NUM_KEPT, 2))
    own = logits.gather(1, labels[:, None])
    earlier = torch.arange(logits.shape[1], device=logits.device)[None] < labels[:, None]
    rank = ((logits > own) | ((logits == own) & earlier)).sum(dim=1)
    margin = values[:, 0] - values[:, 1] if values.shape[1] > 1 else torch.full_like(values[:, 0], torch.inf)
    return {
        "labels": labels.cpu().numpy().astype(np.int32),
        "top": top[:, :NUM_KEPT].cpu().numpy().astype(np.int32),
        "rank": rank.cpu().numpy().astype(np.int32),
        "margin": margin.cpu().numpy().astype(np.float32),
    }


def _first(logits: Tensor, count: int) -> tuple[Tensor, Tensor]:
    """Ids and values of the largest logits of each row, ties to the smaller id: `argmax` over and over, which for few
    of many classes costs a fraction of a stable sort."""
    import torch

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
