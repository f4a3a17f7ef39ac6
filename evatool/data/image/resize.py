"""Decoded pictures at the size of a model's input, as open_clip's evaluation transforms make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evatool.core.image_input import Interpolation, Resize

MOST_RESIZED_PIXELS = 2**24
"""Where the whole picture would have more pixels at its new size, only what the crop keeps of it is computed: of 2 x
30,000 pixels the shorter side at 224 makes 224 x 3,360,000, and 224 x 224 of them are wanted."""

_PILLOW = {"bicubic": Image.Resampling.BICUBIC, "bilinear": Image.Resampling.BILINEAR}

# H and W sides of the input, h and w sides of a picture as it was decoded


@dataclass(frozen=True)
class Placement:
    """Where a picture comes to lie in the input.

    Attributes:
        rows, columns: sides that the picture is resized to.
        top, left: pixels that the crop leaves out there; below 0 where the input is filled instead.
        size: the input's sides (H, W).
    """

    rows: int
    columns: int
    top: int
    left: int
    size: tuple[int, int]


def place_of(height: int, width: int, size: int | tuple[int, int], resize: Resize) -> Placement:
    """The place of a picture of `height` x `width` pixels in an input of `size`.

    Source: torchvision/transforms/functional.py, `resize` and `center_crop`, and open_clip/transform.py,
    `ResizeKeepRatio` and `center_crop_or_pad`, as `image_transform` of the latter composes them.
    """
    goal = (size, size) if isinstance(size, int) else size
    if resize == "squash":
        rows, columns = goal
    elif resize == "shortest" and goal[0] == goal[1]:
        long = int(goal[0] * max(height, width) / min(height, width))
        rows, columns = (goal[0], long) if height <= width else (long, goal[0])
    else:
        ratios = height / goal[0], width / goal[1]
        ratio = max(ratios) if resize == "longest" else min(ratios)
        rows, columns = max(1, round(height / ratio)), max(1, round(width / ratio))
    return Placement(rows, columns, _offset(rows, goal[0]), _offset(columns, goal[1]), goal)


def _offset(side: int, goal: int) -> int:
    return -((goal - side) // 2) if side < goal else round((side - goal) / 2)


def put_in_place(
    pixels: np.ndarray, place: Placement, decode: Literal["exact", "fast"], interpolation: Interpolation, fill: int
) -> Tensor:
    """uint8 (h, w, 3) to uint8 (3, H, W): resized, then cropped, or filled where the picture does not reach."""
    rows, columns, top, left = place.rows, place.columns, place.top, place.left
    if rows * columns > MOST_RESIZED_PIXELS:
        return _resized_part(pixels, place, interpolation)
    if pixels.shape[:2] == (rows, columns):
        resized = torch.from_numpy(pixels).permute(2, 0, 1)
    elif decode == "exact":
        resized = resize_exact(pixels, rows, columns, interpolation)
    else:
        resized = resize_fast(torch.from_numpy(pixels).permute(2, 0, 1), rows, columns, interpolation)
    height, width = place.size
    kept = resized[:, max(top, 0) : max(top, 0) + height, max(left, 0) : max(left, 0) + width]
    if kept.shape[1:] == (height, width):
        return kept.contiguous()
    filled = torch.full((3, height, width), fill, dtype=torch.uint8)
    filled[:, max(-top, 0) :, max(-left, 0) :][:, : kept.shape[1], : kept.shape[2]] = kept
    return filled


def _resized_part(pixels: np.ndarray, place: Placement, interpolation: Interpolation) -> Tensor:
    """What the crop keeps, computed alone: Pillow weighs pixels beside the box as it does within a whole picture."""
    (height, width), scale_y, scale_x = place.size, pixels.shape[0] / place.rows, pixels.shape[1] / place.columns
    top, bottom = max(place.top, 0), min(max(place.top, 0) + height, place.rows)
    left, right = max(place.left, 0), min(max(place.left, 0) + width, place.columns)
    box = (left * scale_x, top * scale_y, right * scale_x, bottom * scale_y)
    part = Image.fromarray(pixels).resize((right - left, bottom - top), _PILLOW[interpolation], box)
    assert part.size == (width, height), "a picture that is so large at its new size fills the input"
    return torch.from_numpy(np.array(part)).permute(2, 0, 1).contiguous()


def resize_exact(pixels: np.ndarray, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """uint8 (h, w, 3) to uint8 (3, height, width) by Pillow."""
    resized = Image.fromarray(pixels).resize((width, height), _PILLOW[interpolation])
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_fast(image: Tensor, height: int, width: int, interpolation: Interpolation = "bicubic") -> Tensor:
    """uint8 (3, h, w), fastest with channels last in memory, to uint8 (3, height, width), antialiased.

    The operator behind torchvision's uint8 resize, near Pillow's.
    """
    return F.interpolate(image[None], size=(height, width), mode=interpolation, antialias=True)[0]


def mask_in_place(mask: np.ndarray, place: Placement) -> Tensor:
    """A mask (h, w) as its picture lies: int32 (H, W), each pixel from the nearest one, 0 where nothing lies."""
    (height, width), (rows, columns) = mask.shape, (place.rows, place.columns)
    from_rows = (np.arange(place.size[0]) + 0.5 + place.top) * height / rows
    from_columns = (np.arange(place.size[1]) + 0.5 + place.left) * width / columns
    inside = ((from_rows >= 0) & (from_rows < height))[:, None] & ((from_columns >= 0) & (from_columns < width))
    near = mask[from_rows.clip(0, height - 1).astype(np.int64)][:, from_columns.clip(0, width - 1).astype(np.int64)]
    return torch.from_numpy(np.where(inside, near, 0).astype(np.int32))
