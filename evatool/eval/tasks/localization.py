"""Localisation, what single patches know: zero-shot segmentation by patch tokens, and texts that look for their patch.

Contrastive training rewards the class token alone, and its patches often lie about where things are: that is what
these metrics show. A patch's class is the one that covers more than half of it.
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any, ClassVar

import numpy as np
from numpy.typing import NDArray

from evatool.core.errors import DataError, EvatoolError
from evatool.eval.predictions import ScoreResult
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.base import EvalTask, Predicted

if TYPE_CHECKING:
    from torch import Tensor

    from evatool.eval.encoder import EvaluationSet, SetEncoder

# B scenes of a batch, S input side, N = G x G patches, C classes, E embedding

_SCENE_SCORES = ("patch_top1", "segmentation_miou", "chance", "chance_miou")


class Localization(EvalTask[ScoreResult]):
    """Scores of patch tokens on a set with masks.

    `patch_top1` and `segmentation_miou` have one score a scene: which of the scene's own classes a patch, or a pixel of
    the patches' similarities drawn larger, is closest to; pixels of no class are left out. `patch_retrieval@1` has one
    a class: whether the closest of the set's patches that show one class is one of its own.

    Batches of the set are (images, masks (B, S, S) int32: 0 background, k + 1 class k).
    """

    kind: ClassVar[str] = "localisation"
    result = ScoreResult
    wording = TaskWording(
        main_metrics=("patch_top1", "segmentation_miou"),
        labels={
            "patch_top1": "patches named right",
            "segmentation_miou": "segmentation mIoU",
            "patch_retrieval@1": "text → patch R@1",
        },
        headline="names the patches of {n} scenes right",
    )

    def open_targets(self, encoder: SetEncoder, eval_set: EvaluationSet) -> Tensor:
        """(E, C) text classifier of the set's prompts. Raises: EvatoolError for a model without patch tokens."""
        if encoder.patch_tokens is None:
            raise EvatoolError(
                f"{encoder.name} gives no patch tokens",
                where=eval_set.name,
                expected="a model that load_clip reads",
                fix="leave the set out with eval.sets, or evaluate the model from its file",
            )
        return encoder.text_classifier(eval_set)

    def predict(self, encoder: SetEncoder, eval_set: EvaluationSet, targets: Tensor) -> Predicted[ScoreResult]:
        """Scores of every scene, and of every class that a patch shows.

        Raises: DataError where the masks show nothing; NumericalError for tokens that are not finite.
        """
        import torch

        from evatool.eval.tasks.patch_scores import patch_labels, raise_best_scores, scene_scores

        num_classes = targets.shape[1]
        best = torch.full((2, num_classes), -torch.inf, device=encoder.device)  # own patches, others'
        counts = torch.zeros(num_classes, device=encoder.device)  # patches that show each class

        def score_scenes(tokens: Tensor, masks: Tensor) -> dict[str, NDArray[Any]]:
            masks = masks.to(encoder.device)
            logits = tokens @ targets  # (B, N, C)
            labels = patch_labels(masks, round(tokens.shape[1] ** 0.5))
            scenes = [scene_scores(*scene) for scene in zip(logits, labels, masks, strict=True)]
            counts.add_(raise_best_scores(best, logits.flatten(0, 1), labels.flatten()))
            columns = np.asarray(scenes, dtype=np.float64).T
            return dict(zip(_SCENE_SCORES, columns, strict=True))

        scenes = encoder.over_batches(
            eval_set, score_scenes, check=_check_masks, encode=encoder.patch_tokens, what="patch tokens"
        )
        best, counts = encoder.max_over_ranks(best), encoder.sum_over_ranks(counts)
        if not scenes or not float(counts.sum()):
            raise DataError(f"the masks of {eval_set.name} show no class on any patch", fix="make the set again")
        shown = counts > 0
        scores = {
            "patch_top1": scenes["patch_top1"],
            "segmentation_miou": scenes["segmentation_miou"],
            "patch_retrieval@1": (best[0] > best[1])[shown].cpu().numpy(),
        }
        chance = {
            "patch_top1": float(scenes["chance"].mean()),
            "segmentation_miou": float(scenes["chance_miou"].mean()),
            "patch_retrieval@1": float((counts[shown] / counts.sum()).mean()),
        }
        return Predicted(ScoreResult(scores, chance).rounded())


def _check_masks(masks: Tensor) -> None:
    if not bool((masks > 0).flatten(1).any(dim=1).all()):
        raise DataError("a mask shows no class", expected="at least one pixel of a class", fix="make the set again")
