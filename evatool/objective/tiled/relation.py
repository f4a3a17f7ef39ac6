"""Losses against a teacher's embeddings other than its similarities across towers, by tiles.

Source: relations within a tower: similarity-preserving distillation (arXiv 1907.09682), on cosines as DINOv3's Gram
loss (arXiv 2508.10104) has them; interactive contrastive: CLIP-KD's ICL (arXiv 2307.12732), with the student's
temperature in the place of one more learned factor. Parity: tests/objective/test_distill_tiles.py.
"""

# b this rank's samples, N global batch, E student's and T teacher's embedding, t side of a tile

from __future__ import annotations

from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evatool.distributed.collectives import around_ring, world_size
from evatool.model.features import FeaturePair
from evatool.objective.tiled.log_sum_exp import RunningSum
from evatool.objective.tiled.sigmoid import sigmoid_loss
from evatool.objective.tiled.tiles import Positives, exact, find_positives, own_diagonal, tile_side, tiles


def relation_loss(student: FeaturePair, teacher: FeaturePair) -> Tensor:
    """Squared difference between the student's and the teacher's cosine of two images, and of two captions.

    The mean over all pairs of the global batch, averaged over both towers; in [0, 4]. Neither width nor rotation of
    the embeddings matters. All ranks must call it together; gradients as `infonce_loss`.

    Args:
        student, teacher: (b, E) and (b, T) image and text features, unit length; as many on every rank.
    """
    parts: list[Tensor] = [_Relation.apply(ours, theirs) for ours, theirs in zip(student, teacher, strict=True)]
    return (parts[0] + parts[1]) / 2


def interactive_loss(
    student: FeaturePair,
    teacher: FeaturePair,
    scale: Tensor,
    caption_id: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """The contrastive loss between the student's embeddings and the teacher's of the other tower.

    Student images choose among the teacher's captions and student captions among the teacher's images; both averaged.
    All ranks must call it together; gradients as `infonce_loss`, none to the teacher.

    Args:
        student, teacher: (b, T) image and text features at the teacher's width, unit length.
        scale: scalar, the student's exponentiated temperature.
        caption_id: as in `infonce_loss`.
        bias: makes it a sigmoid loss in the place of the softmax; the captions' part then sums over images.
    """
    image, text = student
    parts: list[Tensor]
    if bias is not None:
        parts = [
            sigmoid_loss(image, teacher[1], scale, bias, caption_id)[0],
            sigmoid_loss(text, teacher[0], scale, bias, caption_id)[0],
        ]
    else:
        positives = find_positives(caption_id)
        parts = [
            _OneSided.apply(image, teacher[1], scale, positives),
            _OneSided.apply(text, teacher[0], scale, positives),
        ]
    return (parts[0] + parts[1]) / 2


class _Relation(torch.autograd.Function):
    """The relation loss of one tower, and its gradient with respect to the student's features.

    With D_ij = x_i . x_j - t_i . t_j over the N^2 pairs of the global batch, of which this rank has b N as rows:

        L_rank = sum over its rows i, all j of D_ij^2 / (b N)        the mean over ranks is the mean over N^2 pairs
        dL / dx_i = sum_j 2 (w_rank(i) + w_rank(j)) D_ij x_j,        w = (dL / dL_rank) / (b N)

    since x_i stands in row i of its own rank's loss and in column i of every other's, and D is symmetric.
    """

    @staticmethod
    def forward(ctx: Any, features: Tensor, teacher: Tensor) -> Tensor:
        size, side = len(features), tile_side(features.device)
        total = features.new_zeros((), dtype=torch.float64)
        with exact(features.device):
            for _, (block, t_block), _ in around_ring([features, teacher], []):
                for rows, columns in tiles(size, side):
                    apart = (features[rows] @ block[columns].T).sub_(teacher[rows] @ t_block[columns].T)
                    total += apart.square_().sum(dtype=torch.float64)
        ctx.save_for_backward(features, teacher)
        return (total / (size * size * world_size())).to(features.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None]:
        features, teacher = ctx.saved_tensors
        size, side = len(features), tile_side(features.device)
        # A pair on two ranks is in both their losses, each with its own weight.
        own_weight = (2 * grads[0] / (size * size * world_size())).reshape(1)
        grad_features = torch.zeros_like(features)
        with exact(features.device):
            for _, (block, t_block, their_weight), _ in around_ring([features, teacher, own_weight], []):
                for rows, columns in tiles(size, side):
                    apart = (features[rows] @ block[columns].T).sub_(teacher[rows] @ t_block[columns].T)
                    grad_features[rows].addmm_(apart.mul_(own_weight + their_weight), block[columns])
        return grad_features, None


class _OneSided(torch.autograd.Function):
    """Softmax loss of this rank's anchors among the keys of all ranks; gradient to anchors and scale alone.

    With S_ij = scale a_i . k_j, p = softmax of each row and q_ij the share of key j in the target of anchor i:

        L = mean_i (lse(S_i) - sum_j q_ij S_ij)        G = dL / dS = (p - q) dL / b
        da = scale G k,                                d scale = sum_i a_i . (G k)_i

    Keys are a teacher's and get no gradient, so nothing has to travel back round the ring.
    """

    @staticmethod
    def forward(ctx: Any, anchors: Tensor, keys: Tensor, scale: Tensor, positives: Positives) -> Tensor:
        size, side = len(anchors), tile_side(anchors.device)
        sums, target = RunningSum.none_yet(anchors), anchors.new_zeros(len(anchors))
        with exact(anchors.device):
            scaled = anchors * scale
            for owner, (block, *ids), _ in around_ring([keys, *positives.ids], []):
                for rows, columns in tiles(size, side):
                    tile = scaled[rows] @ block[columns].T
                    sums.see(tile, 1, rows)
                    if ids:
                        target[rows] += tile.mul_(positives.shares(ids[0], rows, columns, tile.dtype)).sum(1)
                    elif own_diagonal(owner, rows, columns):
                        target[rows] = tile.diagonal()
            log_sum = sums.log()
        ctx.save_for_backward(anchors, keys, scale, log_sum)
        ctx.positives = positives
        return (log_sum - target).mean()

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, None, Tensor, None]:
        anchors, keys, scale, log_sum = ctx.saved_tensors
        positives: Positives = ctx.positives
        size, side = len(anchors), tile_side(anchors.device)
        grad_anchors = torch.zeros_like(anchors)
        with exact(anchors.device):
            scaled = anchors * scale
            for owner, (block, *ids), _ in around_ring([keys, *positives.ids], []):
                for rows, columns in tiles(size, side):
                    grad = (scaled[rows] @ block[columns].T).sub_(log_sum[rows, None]).exp_()
                    if ids:
                        grad.sub_(positives.shares(ids[0], rows, columns, grad.dtype))
                    elif own_diagonal(owner, rows, columns):
                        grad.diagonal().sub_(1)
                    grad_anchors[rows].addmm_(grad, block[columns])
            grad_anchors.mul_(grads[0] / size)
            grad_scale = torch.linalg.vecdot(grad_anchors, anchors).sum(dtype=torch.float64)
        return grad_anchors * scale, None, grad_scale.to(scale.dtype).reshape(scale.shape), None
