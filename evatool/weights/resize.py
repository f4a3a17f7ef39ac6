"""Position tables and patch kernels for another grid or patch size. RoPE is never stored, so never resized."""

from __future__ import annotations

import math
from typing import Literal

import torch
import torch.nn.functional as F
from timm.layers import resample_patch_embed
from torch import Tensor

PatchResize = Literal["bicubic", "pseudo-inverse"]

# P position entries with the class token's first, D width, S patch side


def resize_positions(table: Tensor, grid: tuple[int, int]) -> Tensor:
    """A position table (1, 1 + n, D) for a `grid` of patches: (1, 1 + rows * columns, D) of the same dtype.

    The class token's entry is copied; the rest is bicubic with align_corners off and no antialiasing, computed in
    float32. Source: EVA-CLIP/rei/training/interpolate_patch14_224to336.py (docs/reference/eva.md#resizing).
    Raises ValueError if the old grid is no square.
    """
    class_entry, patches = table[:, :1], table[:, 1:]
    side = math.isqrt(patches.shape[1])
    if side * side != patches.shape[1]:
        raise ValueError(f"{patches.shape[1]} patch positions form no square grid")
    if (side, side) == tuple(grid):
        return table
    image = patches.float().reshape(1, side, side, -1).permute(0, 3, 1, 2)
    image = F.interpolate(image, size=grid, mode="bicubic", align_corners=False)
    resized = image.permute(0, 2, 3, 1).flatten(1, 2).to(table.dtype)
    return torch.cat([class_entry, resized], dim=1)


def resize_patch_kernel(kernel: Tensor, patch_size: int, method: PatchResize = "bicubic") -> Tensor:
    """A patch kernel (D, 3, s, s) for another patch side: (D, 3, S, S) of the same dtype.

    `bicubic` is what EVA released (14 to 16): plain interpolation, no rescaling (docs/reference/eva.md#resizing).
    `pseudo-inverse` is
    FlexiViT's (arXiv 2212.08013), which keeps the patch features of an image that was resized with its patches.
    """
    size = (patch_size, patch_size)
    if tuple(kernel.shape[-2:]) == size:
        return kernel
    if method == "pseudo-inverse":
        resized: Tensor = resample_patch_embed(kernel, list(size)).to(kernel.dtype)
        return resized
    return F.interpolate(kernel.float(), size=size, mode="bicubic", align_corners=False).to(kernel.dtype)
