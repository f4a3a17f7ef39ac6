"""Distillation of similarities: the student's softmax or sigmoid over the global batch against the teacher's, by tiles.

Neither model's N x N similarities are ever held, nor a gathered copy of the features: as the contrastive loss
(`tiles`), with the teacher's features beside the student's and two log-sum-exps more a sample.
Source: softmax: CLIP-KD's CRD (arXiv 2307.12732), open_clip `DistillClipLoss`; sigmoid: SigLIP's questions (arXiv
2303.15343), answered by the teacher. Parity: tests/objective/test_distill_tiles.py.
"""

# b this rank's samples, N global batch, E student's and T teacher's embedding, t side of a tile

from __future__ import annotations

from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor
from torch.autograd.function import once_differentiable

from evatool.distributed.collectives import around_ring
from evatool.model.features import FeaturePair
from evatool.objective.tiled.log_sum_exp import RunningSum, shared_sums
from evatool.objective.tiled.tiles import exact, tile_side, tiles


def softmax_divergence(
    student: FeaturePair, scale: Tensor, teacher: FeaturePair, teacher_scale: float, temperature: float = 1.0
) -> Tensor:
    """KL divergence from the teacher's to the student's softmax over the global batch, both directions averaged.

    All ranks must call it together. Its mean over ranks is that of the global batch, and its gradient reaches the
    student's features on every rank, as `infonce_loss`; the teacher gets none.

    Args:
        student, teacher: (b, E) and (b, T).
        scale: scalar, the student's exponentiated temperature.
        teacher_scale: the teacher's.
        temperature: divides both models' similarities; the result is multiplied by its square (Hinton's rule), so that
            the gradient's size hardly depends on it.
    Returns: scalar, this rank's mean.
    """
    loss: Tensor = _SoftmaxDivergence.apply(*student, scale / temperature, *teacher, teacher_scale / temperature)
    return loss * temperature**2


def sigmoid_divergence(
    student: FeaturePair,
    scale: Tensor,
    bias: Tensor,
    teacher: FeaturePair,
    teacher_scale: float,
    teacher_bias: float,
    temperature: float = 1.0,
) -> Tensor:
    """KL divergence from the teacher's to the student's yes or no to "is this the image's caption?", for every pair.

    Summed over the captions of the global batch and averaged over this rank's images, like `sigmoid_loss`; otherwise
    like `softmax_divergence`.

    Args:
        bias, teacher_bias: added to scaled similarities. A teacher that was trained with a softmax has none of its
            own: then it says how many captions of a batch the teacher finds right.
    """
    known = *teacher, teacher_scale / temperature, teacher_bias / temperature
    loss: Tensor = _SigmoidDivergence.apply(*student, scale / temperature, bias / temperature, *known)
    return loss * temperature**2


class _SoftmaxDivergence(torch.autograd.Function):
    """The divergence, and its gradient with respect to the student's image features, text features and scale.

    With S_ij = scale x_i . y_j of the student, T_ij of the teacher, and p = softmax of each row (then column):

        KL_i = sum_j pT_ij (T_ij - S_ij) - lse(T_i) + lse(S_i)        the first sum is the mean of (T - S) under pT
        dKL_i / dS_ij = pS_ij - pT_ij
        d loss / dS_ij = (row's pS - pT) w_own + (column's pS - pT) w_of_the_column's_rank,    w = dL / (2 b)

    and from G = d loss / dS:  dx = scale G y,   dy = scale G^T x,   d scale = sum_ij G_ij x_i . y_j
    """

    @staticmethod
    def forward(
        ctx: Any, image: Tensor, text: Tensor, scale: Tensor, t_image: Tensor, t_text: Tensor, t_scale: float
    ) -> Tensor:
        size, side = len(image), tile_side(image.device)
        # Of each image, and of each caption (these travel): the student's sum, the teacher's with its mean of
        # (teacher - student) similarity.
        own = RunningSum.none_yet(image), RunningSum.none_yet(image, has_values=True)
        ours = RunningSum.none_yet(text), RunningSum.none_yet(text, has_values=True)
        with exact(image.device):
            scaled, t_scaled = image * scale, t_image * t_scale
            carried_state = [*ours[0].tensors, *ours[1].tensors]
            for _, (block, t_block), carried in around_ring([text, t_text], carried_state):
                theirs = shared_sums(carried[:2]), shared_sums(carried[2:])
                for rows, columns in tiles(size, side):
                    tile = scaled[rows] @ block[columns].T
                    t_tile = t_scaled[rows] @ t_block[columns].T
                    apart = t_tile - tile
                    for dim, span, (student, teacher) in ((1, rows, own), (0, columns, theirs)):
                        student.see(tile, dim, span)
                        teacher.see(t_tile, dim, span, apart)
            sums = [s.log() for s in (*own, *ours)]
            per_image = own[1].mean() - sums[1] + sums[0]
            per_text = ours[1].mean() - sums[3] + sums[2]
        ctx.save_for_backward(image, text, scale, t_image, t_text, *sums)
        ctx.t_scale = t_scale
        return (per_image.mean() + per_text.mean()) / 2

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, t_image, t_text, row, t_row, column, t_column = ctx.saved_tensors
        size, side = len(image), tile_side(image.device)
        # Each rank weighs its own loss, so its weight travels with its captions.
        own_weight = (grads[0] / (2 * size)).reshape(1)
        grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
        with exact(image.device):
            scaled, t_scaled = image * scale, t_image * ctx.t_scale
            travelling = [text, t_text, column, t_column, own_weight]
            for _, (block, t_block, their, t_their, their_weight), (grad_block,) in around_ring(
                travelling, [grad_text]
            ):
                for rows, columns in tiles(size, side):
                    tile = scaled[rows] @ block[columns].T
                    t_tile = t_scaled[rows] @ t_block[columns].T
                    grad = (tile - row[rows, None]).exp_().sub_((t_tile - t_row[rows, None]).exp_()).mul_(own_weight)
                    tile.sub_(their[columns]).exp_().sub_(t_tile.sub_(t_their[columns]).exp_())
                    grad.addcmul_(tile, their_weight)
                    grad_image[rows].addmm_(grad, block[columns])
                    grad_block[columns].addmm_(grad.T, scaled[rows])
            grad_scale = torch.linalg.vecdot(grad_image, image).sum(dtype=torch.float64)
        return grad_image * scale, grad_text, grad_scale.to(scale.dtype).reshape(scale.shape), None, None, None


class _SigmoidDivergence(torch.autograd.Function):
    """The divergence, and its gradient with respect to the student's image features, text features, scale and bias.

    With s = scale x . y + bias of the student, t of the teacher, p = sigmoid(t), q = sigmoid(s), for each pair:

        KL = p log(p / q) + (1 - p) log((1 - p) / (1 - q)) = softplus(s) - softplus(t) - p (s - t)
        dKL / ds = q - p

    summed over pairs and divided by b; x, y, scale and bias get theirs by the chain rule as in `_SoftmaxDivergence`.
    """

    @staticmethod
    def forward(
        ctx: Any,
        image: Tensor,
        text: Tensor,
        scale: Tensor,
        bias: Tensor,
        t_image: Tensor,
        t_text: Tensor,
        t_scale: float,
        t_bias: float,
    ) -> Tensor:
        size, side = len(image), tile_side(image.device)
        total = image.new_zeros((), dtype=torch.float64)
        with exact(image.device):
            scaled, t_scaled = image * scale, t_image * t_scale
            for _, (block, t_block), _ in around_ring([text, t_text], []):
                for rows, columns in tiles(size, side):
                    tile = torch.addmm(bias, scaled[rows], block[columns].T)
                    t_tile = (t_scaled[rows] @ t_block[columns].T).add_(t_bias)
                    # p log(p / q) + (1 - p) log((1 - p) / (1 - q)), where neither p nor q is ever rounded to 0 or 1
                    apart = F.softplus(tile) - F.softplus(t_tile)
                    total += apart.sub_(t_tile.sigmoid() * (tile - t_tile)).sum(dtype=torch.float64)
        ctx.save_for_backward(image, text, scale, bias, t_image, t_text)
        ctx.t_scale, ctx.t_bias = t_scale, t_bias
        return (total / size).to(image.dtype)

    @staticmethod
    @once_differentiable
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor | None, ...]:
        image, text, scale, bias, t_image, t_text = ctx.saved_tensors
        size, side = len(image), tile_side(image.device)
        weight = grads[0] / size
        grad_image, grad_text = torch.zeros_like(image), torch.zeros_like(text)
        grad_bias = image.new_zeros((), dtype=torch.float64)
        with exact(image.device):
            scaled, t_scaled = image * scale, t_image * ctx.t_scale
            for _, (block, t_block), (grad_block,) in around_ring([text, t_text], [grad_text]):
                for rows, columns in tiles(size, side):
                    grad = torch.addmm(bias, scaled[rows], block[columns].T).sigmoid_()
                    grad.sub_((t_scaled[rows] @ t_block[columns].T).add_(ctx.t_bias).sigmoid_()).mul_(weight)
                    grad_bias += grad.sum(dtype=torch.float64)
                    grad_image[rows].addmm_(grad, block[columns])
                    grad_block[columns].addmm_(grad.T, scaled[rows])
            grad_scale = torch.linalg.vecdot(grad_image, image).sum(dtype=torch.float64)
        scalars = (grad.to(x.dtype).reshape(x.shape) for grad, x in ((grad_scale, scale), (grad_bias, bias)))
        return grad_image * scale, grad_text, *scalars, None, None, None, None
