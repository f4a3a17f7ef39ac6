"""Sigmoid loss over the global batch: each pair is a yes-or-no question; tile by tile, with exact gradients.

Source: SigLIP (arXiv 2303.15343), open_clip `SigLipLoss`. Parity: tests/objective/test_tiled_losses.py.
"""

# b this rank's samples, N global batch, E embedding, t side of a tile

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evatool.distributed.collectives import around_ring, rank
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


def sigmoid_loss(
    image_features: Tensor, text_features: Tensor, scale: Tensor, bias: Tensor, caption_id: Tensor | None = None
) -> tuple[Tensor, dict[str, Tensor]]:
    """Sigmoid loss of this rank's images against all captions; all ranks must call it together.

    -log sigmoid(scale x cosine + bias) of each right pair and -log sigmoid(-(scale x cosine + bias)) of each wrong one,
    summed over the captions and averaged over the images. Gradients as `infonce_loss`.

    Args:
        image_features, text_features: (b, E) unit length, float32 or wider; the same b on every rank.
        scale: scalar, the exponentiated temperature.
        bias: scalar; about -ln N where scale and features start, so that the many wrong pairs weigh little.
        caption_id: (b,) int64: every equal caption is right; None: only the own one.
    Returns: the loss; `i2t_top1` and `t2i_top1` as `infonce_loss`.
    """
    positives = find_positives(caption_id)
    loss, i2t, t2i = _Sigmoid.apply(image_features, text_features, scale, bias, positives)
    return loss, {"i2t_top1": i2t, "t2i_top1": t2i}


class _Sigmoid(torch.autograd.Function):
    """The loss of this rank and its gradient with respect to image features, text features, scale and bias.

    With s_ij = scale x_i . y_j + bias and z_ij = 1 for a right pair, -1 for a wrong one:

        L_rank = -1 / b sum over its images i, all captions j of log sigmoid(z_ij s_ij)
        G_ij = dL / ds_ij = w (-z_ij) sigmoid(-z_ij s_ij),        w = (dL / dL_rank) / b
        dx = scale G y      dy = scale G^T x      d scale = sum_i x_i . (G y)_i      d bias = sum_ij G_ij

    A pair is in its image's rank's loss alone, so unlike in `_InfoNce` no weight travels with the captions. The code
    flips the sign of the right pairs, takes sigmoid(-z s) of all, and flips the same ones back.
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, positives: Positives
    ) -> tuple[Tensor, Tensor, Tensor]:
        size, side = len(image), tile_side(image.device)
        per_image, per_text = Best.none_yet(image), Best.none_yet(text)
        total = image.new_zeros((), dtype=torch.float64)
        with exact(image.device):
            scaled = image * scale
            carried_state = [per_text.value, per_text.index]
            for owner, (block, *ids), carried in around_ring([text, *positives.ids], carried_state):
                theirs = Best(*carried)
                for rows, columns in tiles(size, side):
                    tile = torch.addmm(bias, scaled[rows], block[columns].T)
                    per_image.see(tile, 1, rows, owner * size + columns.start)
                    theirs.see(tile, 0, columns, rank() * size + rows.start)
                    _flip_positives(tile.neg_(), positives, ids, owner, rows, columns)
                    total -= F.logsigmoid(tile).sum(dtype=torch.float64)
        ctx.save_for_backward(image, text, scale, bias)
        ctx.positives = positives
        hits = accuracy(per_image, positives), accuracy(per_text, positives)
        ctx.mark_non_differentiable(*hits)
        return (total / size).to(image.dtype), *hits

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, Tensor, Tensor, Tensor, None]:
        image, text, scale, bias = ctx.saved_tensors
        positives: Positives = ctx.positives
        size, side = len(image), tile_side(image.device)
        weight = grads[0] / size
        grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
        grad_bias = image.new_zeros((), dtype=torch.float64)
        with exact(image.device):
            scaled = image * scale
            for owner, (block, *ids), (grad_block,) in around_ring([text, *positives.ids], [grad_text]):
                for rows, columns in tiles(size, side):
                    grad = torch.addmm(bias, scaled[rows], block[columns].T)
                    _flip_positives(grad, positives, ids, owner, rows, columns)
                    grad.sigmoid_().mul_(weight)
                    _flip_positives(grad, positives, ids, owner, rows, columns)
                    grad_bias += grad.sum(dtype=torch.float64)
                    grad_image[rows].addmm_(grad, block[columns])
                    grad_block[columns].addmm_(grad.T, scaled[rows])
            grad_scale = torch.linalg.vecdot(grad_image, image).sum(dtype=torch.float64)
        scalars = (grad.to(x.dtype).reshape(x.shape) for grad, x in ((grad_scale, scale), (grad_bias, bias)))
        return grad_image * scale, grad_text, *scalars, None


def _flip_positives(
    tile: Tensor, positives: Positives, ids: list[Tensor], owner: int, rows: slice, columns: slice
) -> None:
    """Change the sign of the right pairs of a tile, in place."""
    if ids:
        tile.copy_(torch.where(positives.equal(ids[0], rows, columns), -tile, tile))
    elif own_diagonal(owner, rows, columns):
        tile.diagonal().neg_()
