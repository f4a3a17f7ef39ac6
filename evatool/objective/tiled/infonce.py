"""InfoNCE over the global batch: the softmax loss of CLIP, tile by tile, with exact gradients.

Source: CLIP (arXiv 2103.00020); EVA-CLIP/rei/training/loss.py (docs/reference/eva.md#contrastive-loss). Parity:
tests/objective/test_tiled_losses.py.
"""

# b this rank's samples, N global batch, E embedding, t side of a tile

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from typing import Any

import torch
from torch import Tensor
from torch.autograd.function import once_differentiable

from evatool.distributed.collectives import around_ring, rank
from evatool.objective.tiled.log_sum_exp import RunningSum
from evatool.objective.tiled.tiles import (
    Best,
    Positives,
    accuracy,
    exact,
    find_positives,
    own_diagonal,
    tile_side,
    tiles,
)


def infonce_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor, caption_id: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """InfoNCE of this rank's samples, image to text and text to image averaged; all ranks must call it together.

    The mean over ranks is the loss of the global batch. Its gradient reaches the features of every rank, as
    `all_gather_with_grad` has it: the engine's mean over ranks is the gradient in one process.

    Args:
        image_features, text_features: (b, E) unit length, float32 or wider; the same b on every rank.
        scale: scalar, the exponentiated temperature.
        caption_id: (b,) int64. A sample's target is then uniform over all equal captions of the global batch, which
            serves both directions; None: the target is the own partner.
    Returns: the loss, ln N where all similarities are equal; `i2t_top1` and `t2i_top1`, the share of this rank's
        samples whose best partner in the global batch is a right one.
    """
    positives = find_positives(caption_id)
    loss, i2t, t2i = _InfoNce.apply(image_features, text_features, scale, positives)
    return loss, {"i2t_top1": i2t, "t2i_top1": t2i}


@dataclass
class _Sums:
    """Log-sum-exp, best partner and target of each of b samples, across tiles and ranks."""

    best: Best
    sums: RunningSum  # its largest exponent is the best partner's similarity: one tensor for both
    target: Tensor  # (b,) mean similarity of the right partners

    @classmethod
    def none_yet(cls, features: Tensor) -> _Sums:
        zeros = features.new_zeros(features.shape[:1])
        return cls.of([*Best.none_yet(features).tensors, zeros, zeros.clone()])

    @property
    def tensors(self) -> list[Tensor]:
        return [*self.best.tensors, self.sums.exp_sum, self.target]

    @classmethod
    def of(cls, tensors: Sequence[Tensor]) -> _Sums:
        """The sums whose memory these tensors are, in the order of `tensors`."""
        value, index, exp_sum, target = tensors
        return cls(Best(value, index), RunningSum(value, exp_sum), target)

    def see(self, tile: Tensor, dim: int, span: slice, first: int) -> None:
        """Take in a tile of similarities; arguments as in `Best.see`."""
        before = self.best.value[span].clone()
        self.best.see(tile, dim, span, first)
        self.sums.add(tile, dim, span, before)


class _InfoNce(torch.autograd.Function):
    """The loss of this rank and its gradient with respect to image features, text features and scale.

    With S_ij = scale x_i . y_j between this rank's b images and the N captions of all ranks, and q_ij the share of
    caption j in the target of image i (1 for the own partner, or 1 / count for each equal caption):

        L_rank = (mean_i (lse_j S_ij - sum_j q_ij S_ij) + mean_j (lse_i S_ij - sum_i q_ij S_ij)) / 2

    where the second mean is over this rank's b captions. Image i meets caption j in two losses: in row i of its own
    rank's, and in column j of the rank of j. With w = (dL / dL_rank) / (2 b) of either rank:

        G_ij = w_i (exp(S_ij - lse_row i) - q_ij) + w_j (exp(S_ij - lse_column j) - q_ij)
        dx = scale G y        dy = scale G^T x        d scale = sum_ij G_ij x_i . y_j = sum_i x_i . (G y)_i

    G is computed tile by tile, from S anew and the two log-sum-exps that the forward pass keeps: N numbers, not N^2.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, positives: Positives
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, side = len(image), tile_side(image.device)
        per_image, per_text = _Sums.none_yet(image), _Sums.none_yet(text)
        with exact(image.device):
            scaled = image * scale
            for owner, (block, *ids), carried_state in around_ring([text, *positives.ids], per_text.tensors):
                theirs = _Sums.of(carried_state)
                for rows, columns in tiles(size, side):
                    tile = scaled[rows] @ block[columns].T
                    per_image.see(tile, 1, rows, owner * size + columns.start)
                    theirs.see(tile, 0, columns, rank() * size + rows.start)
                    if ids:
                        tile.mul_(positives.shares(ids[0], rows, columns, tile.dtype))
                        per_image.target[rows] += tile.sum(1)
                        theirs.target[columns] += tile.sum(0)
                    elif own_diagonal(owner, rows, columns):
                        per_image.target[rows] = theirs.target[columns] = tile.diagonal()
            row_lse, column_lse = per_image.sums.log(), per_text.sums.log()
            loss = ((row_lse - per_image.target).mean() + (column_lse - per_text.target).mean()) / 2
        ctx.save_for_backward(image, text, scale, row_lse, column_lse)
        ctx.positives = positives
        hits = accuracy(per_image.best, positives), accuracy(per_text.best, positives)
        ctx.mark_non_differentiable(*hits)
        return loss, *hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, None]:
        image, text, scale, row_lse, column_lse = ctx.saved_tensors
        positives: Positives = ctx.positives
        size, side = len(image), tile_side(image.device)
        # Each rank weighs its own loss, so its weight travels with its captions.
        own_weight = (grads[0] / (2 * size)).reshape(1)
        grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
        with exact(image.device):
            scaled = image * scale
            travelling = [text, column_lse, own_weight, *positives.ids]
            for owner, (block, their_lse, their_weight, *ids), (grad_block,) in around_ring(travelling, [grad_text]):
                for rows, columns in tiles(size, side):
                    tile = scaled[rows] @ block[columns].T
                    grad = (tile - row_lse[rows, None]).exp_().mul_(own_weight)
                    grad.addcmul_(tile.sub_(their_lse[columns]).exp_(), their_weight)
                    if ids:
                        shares = positives.shares(ids[0], rows, columns, tile.dtype)
                        grad.sub_(shares.mul_(own_weight + their_weight))
                    elif own_diagonal(owner, rows, columns):
                        grad.diagonal().sub_(own_weight + their_weight)
                    grad_image[rows].addmm_(grad, block[columns])
                    grad_block[columns].addmm_(grad.T, scaled[rows])
            # Every tile's sum of gradient times similarity, for the price of one product of features.
            grad_scale = torch.linalg.vecdot(grad_image, image).sum(dtype=torch.float64)
        return grad_image * scale, grad_text, grad_scale.to(scale.dtype).reshape(scale.shape), None
