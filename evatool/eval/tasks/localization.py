"""What single patches know: zero-shot segmentation by patch tokens, and texts that look for their patch.

Contrastive training rewards the class token alone, and its patches often lie about where things are: that is what
these figures show. A patch's class is the one that covers more than half of it.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evatool.core.errors import DataError
from evatool.distributed import collectives
from evatool.eval.encode import Encoding, fail_on_all_ranks, gather_arrays, own_numbers, stepped_batches
from evatool.eval.predictions import ScoreResult
from evatool.eval.tasks.base import ClipModel, EvaluationSet
from evatool.eval.text_classifier import TensorStore, text_classifier

# B scenes of a batch, S input side, N = G x G patches, C classes, E embedding, K classes of a scene


def localize(
    model: ClipModel,
    patch_tokens: Callable[[Tensor], Tensor],
    tokenizer: Callable[[list[str]], Tensor],
    eval_set: EvaluationSet,
    *,
    device: str = "cpu",
    stores: Sequence[TensorStore] = (),
    trim_text: bool = False,
    lockstep: bool = False,
    on_batch: Callable[[int], None] | None = None,
) -> ScoreResult:
    """Scores of patch tokens on a set with masks; every rank must call it and gets all.

    `patch_top1` and `segmentation_miou` have one score a scene: which of the scene's own classes a patch, or a pixel of
    the patches' similarities drawn larger, is closest to; pixels of no class are left out. `patch_retrieval@1` has one
    a class: whether the closest of the set's patches that show one class is one of its own.

    Args:
        patch_tokens: (B, 3, S, S) -> (B, N, E) in the space of the text features.
        trim_text, lockstep: see `Encoding`.
    Raises: DataError for a set without prompts, or whose masks show nothing.
    """
    how = Encoding(device, trim_text, lockstep)
    weights = text_classifier(
        model, tokenizer, eval_set.classnames, eval_set.templates, how, name=eval_set.name, stores=stores
    )
    scenes: list[tuple[float, float, float, float]] = []
    best = torch.full((2, weights.shape[1]), -torch.inf, device=device)  # own patches, others'
    counts = torch.zeros(weights.shape[1], device=device)
    with fail_on_all_ranks(), torch.no_grad():
        batches = stepped_batches(
            patch_tokens, eval_set.loader, how, where=eval_set.name, what="patch tokens", check=_check_masks
        )
        for tokens, masks in batches:
            masks = masks.to(device)
            logits = tokens @ weights  # (B, N, C)
            labels = patch_labels(masks, round(tokens.shape[1] ** 0.5))
            scenes += [_scene(*scene) for scene in zip(logits, labels, masks, strict=True)]
            counts += _look(best, logits.flatten(0, 1), labels.flatten())
            if on_batch:
                on_batch(len(masks))
    columns = np.asarray(scenes, dtype=np.float64).reshape(-1, 4).T
    own = dict(zip(("patch_top1", "segmentation_miou", "chance", "chance_miou"), columns, strict=True))
    whole = gather_arrays(own, own_numbers(eval_set.loader, len(scenes)))
    best, counts = collectives.all_reduce_max(best), collectives.all_reduce_sum(counts)
    if not whole or not float(counts.sum()):
        raise DataError(f"the masks of {eval_set.name} show no class on any patch", fix="make the set again")
    shown = counts > 0
    hits = (best[0] > best[1])[shown].cpu().numpy()
    scores = {
        "patch_top1": whole["patch_top1"],
        "segmentation_miou": whole["segmentation_miou"],
        "patch_retrieval@1": hits,
    }
    chance = {
        "patch_top1": float(whole["chance"].mean()),
        "segmentation_miou": float(whole["chance_miou"].mean()),
        "patch_retrieval@1": float((counts[shown] / counts.sum()).mean()),
    }
    # rounded as they are kept, so that a resumed run gives the same numbers
    return ScoreResult({k: np.asarray(v).astype(np.float16).astype(np.float32) for k, v in scores.items()}, chance)


def patch_labels(masks: Tensor, side: int) -> Tensor:
    """(B, N) class of each patch: the one that covers more than half of it, -1 where none does.

    Args:
        masks: (B, S, S) integers, 0 background, k + 1 class k.
        side: G, patches along a side; S need not be a multiple.
    """
    size = masks.shape[-1]
    edges = torch.linspace(0, size, side + 1).round().int().tolist()
    labels = torch.full((len(masks), side * side), -1, dtype=torch.int64, device=masks.device)
    for row in range(side):
        for column in range(side):
            cell = masks[:, edges[row] : edges[row + 1], edges[column] : edges[column + 1]].flatten(1)
            commonest = cell.mode(dim=1).values
            covers = 2 * (cell == commonest[:, None]).sum(dim=1) > cell.shape[1]
            labels[:, row * side + column] = torch.where(covers, commonest.long() - 1, -1)
    return labels


def _scene(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[float, float, float, float]:
    """patch_top1, segmentation_miou, and what a guess among the scene's classes would give for each."""
    classes = mask.unique()
    classes = classes[classes > 0].long() - 1
    own = logits[:, classes]  # (N, K)
    known = torch.isin(labels, classes)
    right = classes[own.argmax(dim=1)] == labels
    top1 = float(right[known].float().mean()) if bool(known.any()) else 1 / len(classes)
    side = round(len(labels) ** 0.5)
    maps = own.T.reshape(1, len(classes), side, side)
    drawn = classes[F.interpolate(maps, size=mask.shape, mode="bilinear", align_corners=False)[0].argmax(dim=0)]
    truth, guess = mask[mask > 0].long() - 1, drawn[mask > 0]
    ious = [_iou(guess == k, truth == k) for k in classes]
    shares = torch.stack([(truth == k).float().mean() for k in classes])
    each = 1 / len(classes)
    by_guess = shares * each / (shares + each - shares * each)  # of pixels named at random
    return top1, float(torch.stack(ious).mean()), each, float(by_guess.mean())


def _check_masks(masks: Tensor) -> None:
    if not bool((masks > 0).flatten(1).any(dim=1).all()):
        raise DataError("a mask shows no class", expected="at least one pixel of a class", fix="make the set again")


def _iou(guess: Tensor, truth: Tensor) -> Tensor:
    return (guess & truth).sum() / (guess | truth).sum()


def _look(best: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Raise the best scores of own and of other patches for each class; returns the patches of each class."""
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if len(labels):
        is_own = F.one_hot(labels, best.shape[1]).bool()
        best[0] = torch.maximum(best[0], logits.masked_fill(~is_own, -torch.inf).amax(dim=0))
        best[1] = torch.maximum(best[1], logits.masked_fill(is_own, -torch.inf).amax(dim=0))
    return torch.bincount(labels, minlength=best.shape[1]).float()
