"""The contrastive losses written out densely, in one process: what the tiled ones are compared with."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor


def dense_infonce(image: Tensor, text: Tensor, scale: Tensor, caption_id: Tensor | None = None) -> Tensor:
    """Both directions' cross-entropy against the own partner, or uniformly against all equal captions."""
    logits = scale * image @ text.T
    if caption_id is None:
        targets = torch.arange(len(image))
    else:
        is_positive = caption_id[:, None] == caption_id[None, :]
        targets = is_positive.to(logits.dtype) / is_positive.sum(dim=1, keepdim=True)
    return (F.cross_entropy(logits, targets) + F.cross_entropy(logits.T, targets)) / 2


def dense_sigmoid(image: Tensor, text: Tensor, scale: Tensor, bias: Tensor, caption_id: Tensor | None = None) -> Tensor:
    """SigLIP's pseudocode: signs, log-sigmoid, sum over captions, mean over pictures."""
    ids = torch.arange(len(image)) if caption_id is None else caption_id
    signs = torch.where(ids[:, None] == ids[None, :], 1.0, -1.0).to(image.dtype)
    return -F.logsigmoid(signs * (scale * image @ text.T + bias)).sum(dim=1).mean()


def dense_top1(rows: Tensor, caption_id: Tensor | None = None) -> float:
    """Share of rows whose first best column is a positive."""
    ids = torch.arange(len(rows)) if caption_id is None else caption_id
    return float((ids[rows.argmax(dim=1)] == ids).float().mean())
