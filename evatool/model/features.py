"""Image and text features: the pair that a CLIP model gives for a batch, and features at unit length."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor

FeaturePair = tuple[Tensor, Tensor]
"""(image, text) features of this rank's samples, unit length, float32 or wider; as many on every rank."""


def l2_normalize(features: Tensor) -> Tensor:
    """Features at unit length along the last axis; half precision becomes float32 first, wider types stay."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)
