"""Distillation's losses written out densely, in one process: what the tiled ones are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FeaturePair = tuple[Tensor, Tensor]


def dense_softmax_divergence(
    student: FeaturePair, scale: Tensor, teacher: FeaturePair, teacher_scale: float, temperature: float = 1.0
) -> Tensor:
    """Hinton's KL (T^2 times that of the softened softmaxes), CLIP-KD's CRD at T = 1; both directions averaged."""
    ours = scale / temperature * student[0] @ student[1].T
    theirs = teacher_scale / temperature * teacher[0] @ teacher[1].T
    parts = [
        (t.softmax(1) * (t.log_softmax(1) - s.log_softmax(1))).sum(1).mean()
        for s, t in ((ours, theirs), (ours.T, theirs.T))
    ]
    return temperature**2 * (parts[0] + parts[1]) / 2


def dense_sigmoid_divergence(
    student: FeaturePair,
    scale: Tensor,
    bias: Tensor,
    teacher: FeaturePair,
    teacher_scale: float,
    teacher_bias: float,
    temperature: float = 1.0,
) -> Tensor:
    """KL between Bernoulli answers to every pair, summed over captions, mean over pictures."""
    ours = (scale * student[0] @ student[1].T + bias) / temperature
    theirs = (teacher_scale * teacher[0] @ teacher[1].T + teacher_bias) / temperature
    right = theirs.sigmoid() * (F.logsigmoid(theirs) - F.logsigmoid(ours))
    wrong = (-theirs).sigmoid() * (F.logsigmoid(-theirs) - F.logsigmoid(-ours))
    return temperature**2 * (right + wrong).sum(1).mean()


def dense_relation(student: FeaturePair, teacher: FeaturePair) -> Tensor:
    """Mean squared difference of the two Gram matrices, both towers averaged."""
    parts = [F.mse_loss(s @ s.T, t @ t.T) for s, t in zip(student, teacher, strict=True)]
    return (parts[0] + parts[1]) / 2


def dense_interactive(
    student: FeaturePair,
    teacher: FeaturePair,
    scale: Tensor,
    caption_id: Tensor | None = None,
    bias: Tensor | None = None,
) -> Tensor:
    """CLIP-KD's ICL, with a uniform target over equal captions; or its sigmoid form."""
    size = len(student[0])
    ids = torch.arange(size) if caption_id is None else caption_id
    is_right = (ids[:, None] == ids[None, :]).to(student[0].dtype)
    parts = []
    for anchors, keys in ((student[0], teacher[1]), (student[1], teacher[0])):
        logits = scale * anchors @ keys.T
        if bias is None:
            parts.append(F.cross_entropy(logits, is_right / is_right.sum(1, keepdim=True)))
        else:
            parts.append(-F.logsigmoid((2 * is_right - 1) * (logits + bias)).sum(1).mean())
    return (parts[0] + parts[1]) / 2
