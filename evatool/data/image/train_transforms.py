"""Random transforms of training pictures, uint8 in and out, each a function of the sample's key alone.

The crop is taken picture by picture; everything else is done on the whole batch at output size. With EVA-CLIP's
transform (a crop and nothing else) the pixels equal torchvision's `resized_crop` of the same box: of the uint8 tensor,
or in exact mode of the Pillow picture, as EVA's release has it.
"""

from __future__ import annotations

import math
from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evatool.data.image.decode import Mode
from evatool.data.image.resize import resize_exact, resize_fast
from evatool.data.train import shuffle
from evatool.recipe.schema import AugmentSection

# B batch, S output side in pixels, H and W sides of a source picture

_CROP_TRIES = 10
_LUMA = (0.299, 0.587, 0.114)  # ITU-R BT.601, as Pillow and torchvision
_HUE_SHARE = 0.25  # hue turns at most a quarter of the strength, as in SimCLR's jitter (0.8, 0.8, 0.8, 0.2)


class TrainTransform:
    """Crop, flip, rotation, colour. One call makes every view of a picture from the same draws.

    Args:
        section: strengths; what is 0 there costs nothing here.
        sizes: output side of each view.
        decode: how the pictures were decoded; in "exact" mode the crops are resized by Pillow.
    """

    def __init__(self, section: AugmentSection, sizes: Sequence[int], decode: Mode = "fast") -> None:
        self.section, self.sizes, self.decode = section, tuple(sizes), decode

    @property
    def min_side(self) -> int | None:
        """Pixels that the shorter side of a picture decoded in "scaled" mode must keep; None in the other modes.

        A square crop of the least area then has as many pixels as the largest view.
        """
        if self.decode != "scaled":
            return None
        return math.ceil(max(self.sizes) / math.sqrt(self.section.crop_scale[0]))

    def __call__(self, images: Sequence[Tensor], keys: np.ndarray, num_views: int | None = None) -> list[Tensor]:
        """Views of a batch.

        Args:
            images: B tensors (3, H, W) uint8, of any sizes.
            keys: uint64 (B,), from `shuffle.sample_keys`.
            num_views: make only the first this many views.
        Returns: for each output size a tensor (B, 3, S, S) uint8; equal sizes share one tensor.
        """
        shapes = np.array([p.shape[-2:] for p in images])
        boxes = crop_boxes(shapes, keys, self.section.crop_scale, self.section.crop_ratio)
        sizes = self.sizes[:num_views]
        views = {size: self._finish(_crop_all(images, boxes, size, self.decode), keys) for size in set(sizes)}
        return [views[size] for size in sizes]

    def _finish(self, image: Tensor, keys: np.ndarray) -> Tensor:
        section = self.section
        if section.horizontal_flip:
            image = _flip(image, shuffle.uniforms(keys, shuffle.STREAM_FLIP, 1)[:, 0] < section.horizontal_flip)
        if section.rotate_degrees:
            turn = 2 * shuffle.uniforms(keys, shuffle.STREAM_ROTATE, 1)[:, 0] - 1
            image = _rotate(image, np.radians(section.rotate_degrees * turn))
        if section.color_jitter or section.grayscale:
            image = self._recolor(image, keys)
        return image

    def _recolor(self, image: Tensor, keys: np.ndarray) -> Tensor:
        section = self.section
        gray = shuffle.uniforms(keys, shuffle.STREAM_GRAY, 1)[:, 0] < section.grayscale
        draws = 2 * shuffle.uniforms(keys, shuffle.STREAM_COLOR, 4) - 1
        rows = np.arange(len(keys)) if section.color_jitter else np.flatnonzero(gray)
        if len(rows) == 0:
            return image
        brightness, contrast, saturation = np.maximum(0.0, 1 + section.color_jitter * draws[rows, :3]).T
        angle = 2 * math.pi * _HUE_SHARE * section.color_jitter * draws[rows, 3]
        matrix = _color_matrix(brightness * contrast, np.where(gray[rows], 0.0, saturation), angle)
        chosen = torch.from_numpy(rows)
        source = image[chosen].flatten(2).float()  # (B, 3, S * S)
        luma = torch.tensor(_LUMA).view(1, 3, 1)
        mean = (source.mean(2, keepdim=True) * luma).sum(1, keepdim=True)
        offset = mean * torch.from_numpy(((1 - contrast) * brightness).astype(np.float32)).view(-1, 1, 1)
        out = torch.baddbmm(offset.expand(-1, 3, 1), torch.from_numpy(matrix), source)
        out = out.clamp_(0, 255).round_().to(torch.uint8).view(-1, *image.shape[1:])
        if len(rows) == len(image):
            return out
        return image.index_copy(0, chosen, out)


def crop_boxes(
    shapes: np.ndarray, keys: np.ndarray, scale: tuple[float, float], ratio: tuple[float, float]
) -> np.ndarray:
    """A random crop of each picture as int (B, 4): top, left, height, width.

    torchvision's `RandomResizedCrop`, all pictures and all ten tries at once:

        area   a = H W (scale_0 + (scale_1 - scale_0) u)      draws 0 .. 9 of u
        aspect r = ratio_0 (ratio_1 / ratio_0) ** u           draws 10 .. 19
        h, w   = round(sqrt(a / r)), round(sqrt(a r))         the first try with 0 < h <= H and 0 < w <= W counts
        corner = floor(u (H - h + 1)), floor(u (W - w + 1))   draws 20 and 21: every place with the same chance

    Where no try fits, the largest centred crop within the aspect bounds.

    Args:
        shapes: int (B, 2), height and width.
        keys: uint64 (B,), from `shuffle.sample_keys`.
        scale: least and largest area, as shares of the picture's.
        ratio: least and largest width over height.
    """
    height, width = shapes[:, :1].astype(float), shapes[:, 1:].astype(float)
    draws = shuffle.uniforms(keys, shuffle.STREAM_CROP, 2 * _CROP_TRIES + 2)
    area = height * width * (scale[0] + (scale[1] - scale[0]) * draws[:, :_CROP_TRIES])
    low, high = math.log(ratio[0]), math.log(ratio[1])
    aspect = np.exp(low + (high - low) * draws[:, _CROP_TRIES : 2 * _CROP_TRIES])
    tried_w, tried_h = np.rint(np.sqrt(area * aspect)), np.rint(np.sqrt(area / aspect))
    fits = (tried_w > 0) & (tried_w <= width) & (tried_h > 0) & (tried_h <= height)
    first = fits.argmax(1)
    rows = np.arange(len(shapes))
    found = fits[rows, first]
    whole_h, whole_w = _central_box(height[:, 0], width[:, 0], ratio)
    box_h = np.where(found, tried_h[rows, first], whole_h)
    box_w = np.where(found, tried_w[rows, first], whole_w)
    room_h, room_w = height[:, 0] - box_h, width[:, 0] - box_w
    top = np.where(found, np.floor(draws[:, -2] * (room_h + 1)), room_h // 2)
    left = np.where(found, np.floor(draws[:, -1] * (room_w + 1)), room_w // 2)
    return np.stack([top, left, box_h, box_w], axis=1).astype(np.int64)


def _central_box(height: np.ndarray, width: np.ndarray, ratio: tuple[float, float]) -> tuple[np.ndarray, np.ndarray]:
    aspect = width / height
    box_w = np.where(aspect > ratio[1], np.rint(height * ratio[1]), width)
    box_h = np.where(aspect < ratio[0], np.rint(width / ratio[0]), height)
    return np.maximum(box_h, 1), np.maximum(box_w, 1)


def _crop_all(images: Sequence[Tensor], boxes: np.ndarray, size: int, decode: Mode) -> Tensor:
    out = torch.empty((len(images), 3, size, size), dtype=torch.uint8)
    for i, (image, (top, left, height, width)) in enumerate(zip(images, boxes.tolist(), strict=True)):
        crop = image[:, top : top + height, left : left + width]
        if decode == "exact":
            out[i] = resize_exact(crop.permute(1, 2, 0).contiguous().numpy(), size, size)
        else:
            out[i] = resize_fast(crop, size, size)
    return out


def _flip(image: Tensor, chosen: np.ndarray) -> Tensor:
    rows = torch.from_numpy(np.flatnonzero(chosen))
    return image.index_copy(0, rows, image[rows].flip(-1)) if len(rows) else image


def _rotate(image: Tensor, angle: np.ndarray) -> Tensor:
    """Turn each picture about its centre (radians), bicubic, corners white."""
    size = image.shape[-1]
    cos = torch.from_numpy(np.cos(angle).astype(np.float32)).view(-1, 1, 1)
    sin = torch.from_numpy(np.sin(angle).astype(np.float32)).view(-1, 1, 1)
    centres = (2 * torch.arange(size) + 1) / size - 1  # of pixels, in -1 .. 1
    x, y = centres.view(1, 1, size), centres.view(1, size, 1)
    grid = torch.empty(len(image), size, size, 2)  # as `affine_grid` makes it, in a seventh of the time
    torch.sub(cos * x, sin * y, out=grid[..., 0])
    torch.add(sin * x, cos * y, out=grid[..., 1])
    # Outside the picture the sampler reads 0: shifted by 255, that is white.
    shifted = image.float().sub_(255)
    turned = F.grid_sample(shifted, grid, mode="bicubic", padding_mode="zeros", align_corners=False)
    return turned.add_(255).clamp_(0, 255).round_().to(torch.uint8)


def _color_matrix(gain: np.ndarray, saturation: np.ndarray, angle: np.ndarray) -> np.ndarray:
    """(B, 3, 3) float32: gain, then saturation about the luma, then a hue rotation about the grey axis."""
    identity, luma = np.eye(3), np.broadcast_to(np.array(_LUMA), (3, 3))
    saturate = saturation[:, None, None] * identity + (1 - saturation)[:, None, None] * luma
    # Rodrigues' rotation about (1, 1, 1) / sqrt(3): grey stays grey.
    axis = np.array([[0, -1, 1], [1, 0, -1], [-1, 1, 0]]) / math.sqrt(3)
    cos, sin = np.cos(angle)[:, None, None], np.sin(angle)[:, None, None]
    hue = cos * identity + sin * axis + (1 - cos) * np.full((3, 3), 1 / 3)
    return np.asarray(gain[:, None, None] * (hue @ saturate), dtype=np.float32)
