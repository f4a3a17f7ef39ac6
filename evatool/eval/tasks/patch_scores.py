"""Scores of patch tokens against masks: which patch shows which class, and how often the right one is named."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

# B scenes of a batch, S input side, N = G x G patches, C classes, K classes of a scene


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


def scene_scores(logits: Tensor, labels: Tensor, mask: Tensor) -> tuple[float, float, float, float]:
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


def _iou(guess: Tensor, truth: Tensor) -> Tensor:
    return (guess & truth).sum() / (guess | truth).sum()


def raise_best_scores(best: Tensor, logits: Tensor, labels: Tensor) -> Tensor:
    """Raise the best scores of own and of other patches for each class; returns the patches of each class."""
    logits, labels = logits[labels >= 0], labels[labels >= 0]
    if len(labels):
        is_own = F.one_hot(labels, best.shape[1]).bool()
        best[0] = torch.maximum(best[0], logits.masked_fill(~is_own, -torch.inf).amax(dim=0))
        best[1] = torch.maximum(best[1], logits.masked_fill(is_own, -torch.inf).amax(dim=0))
    return torch.bincount(labels, minlength=best.shape[1]).float()
