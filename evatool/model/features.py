"""Image and text features of unit length, and the temperature that their similarities are scaled by."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn

FeaturePair = tuple[Tensor, Tensor]
"""(image, text) features of this rank's samples, unit length, float32 or wider; as many on every rank."""


def l2_normalize(features: Tensor) -> Tensor:
    """Features at unit length along the last axis; half precision becomes float32 first, wider types stay."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def logit_scale(model: nn.Module) -> Tensor:
    """The exponentiated temperature of a CLIP model as a scalar with gradient, float32 or wider."""
    log_scale = model.logit_scale
    assert isinstance(log_scale, Tensor)
    return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp().squeeze()


def set_logit_scale(model: nn.Module, scale: float) -> Tensor:
    """Set a CLIP model's temperature to the inverse of `scale`; returns its parameter, the logarithm of `scale`."""
    log_scale = model.logit_scale
    assert isinstance(log_scale, Tensor)
    nn.init.constant_(log_scale, math.log(scale))
    return log_scale
