"""Pixel statistics and the one place where uint8 pictures become float inputs. Imports torch."""

from __future__ import annotations

import torch
from torch import Tensor, nn

from evatool.core.image_input import CLIP_MEAN, CLIP_STD, ImageInput


def normalize_images(
    image: Tensor,
    mean: tuple[float, ...] = CLIP_MEAN,
    std: tuple[float, ...] = CLIP_STD,
    dtype: torch.dtype = torch.float32,
) -> Tensor:
    """uint8 pictures (B, 3, H, W) in 0..255 as normalised floats of the same shape; float inputs pass unchanged."""
    if image.is_floating_point():
        return image.to(dtype)
    # (x / 255 - mean) / std as one multiply-add
    scale = torch.tensor([1 / (255 * s) for s in std], device=image.device).view(1, -1, 1, 1)
    shift = torch.tensor([-m / s for m, s in zip(mean, std, strict=True)], device=image.device).view(1, -1, 1, 1)
    return torch.addcmul(shift, image.float(), scale).to(dtype)


def normalize_for(model: nn.Module, image: Tensor, dtype: torch.dtype = torch.float32) -> Tensor:
    """`normalize_images` by the statistics of `model`, which its builder notes at `image_input`; EVA's without them."""
    wanted = getattr(model, "image_input", None) or ImageInput()
    return normalize_images(image, wanted.mean, wanted.std, dtype)
