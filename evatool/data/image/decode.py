"""Encoded pictures to RGB pixels, for training and evaluation.

Which pictures are used is decided as open_clip's and clip-benchmark's readers decide it, in every mode and with every
decoder: whatever Pillow turns into RGB. So CMYK is converted, 16-bit values are brought to 8 bits, of an animation the
first frame counts, alpha is dropped, EXIF orientation is not applied and a file's name says nothing. Refused are
pictures of more pixels than the limit, before any is decoded, and formats outside `FORMATS`, some of which Pillow hands
to other programs. Training can leave nonstandard ones out before (`evatool.data.image.nonstandard`), and what goes into
shards is judged more strictly (`evatool.data.image.header`).
"""

from __future__ import annotations

import functools
import logging
from typing import Any, Literal

import numpy as np
import torch
import torch.nn.functional as F
from PIL import Image
from torch import Tensor

from evatool.data.image.header import MAX_PIXELS, BadImage, check_size, converted_pixels, open_image

log = logging.getLogger(__name__)

Mode = Literal["exact", "fast", "scaled"]
"""`exact`: Pillow's pixels and Pillow's bicubic, byte for byte. `fast`: the same pixels from a faster decoder, resized
by torch, within two grey levels of Pillow. `scaled`: JPEGs far larger than needed are decoded at 1/2 or 1/4."""

FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM"})
"""Accepted formats by Pillow's name."""

SCALES = (4, 2)
"""Divisors of a scaled decode. libjpeg-turbo's inverse DCTs between them have no vector code and save no time."""

_JPEG_START = b"\xff\xd8\xff"
_RGB_JPEGS = frozenset({"YCbCr", "RGB", "Gray"})  # simplejpeg's names; the others (CMYK, YCCK) are Pillow's to convert

# H and W sides of a picture as stored, S output side in pixels


def decode_image(
    data: bytes, max_pixels: int = MAX_PIXELS, mode: Mode = "fast", *, min_side: int | None = None
) -> np.ndarray:
    """An encoded picture as uint8 (H, W, 3).

    Args:
        max_pixels: limit by the header.
        mode: "fast" and "exact" give equal pixels; "scaled" gives ceil(H / 2), ceil(W / 2), or a quarter, of a JPEG
            whose shorter side has room for it.
        min_side: for "scaled": pixels that the shorter side needs.
    Raises: BadImage with the cause: zero-byte, not-a-picture, unsupported-format, too-large or truncated.
    """
    assert (mode == "scaled") == (min_side is not None), "a scaled decode, and no other, needs min_side"
    simplejpeg = None if mode == "exact" else fast_jpeg_decoder()
    if simplejpeg is not None and data[:3] == _JPEG_START:
        pixels = _decode_jpeg(simplejpeg, data, max_pixels, min_side)
        if pixels is not None:
            return pixels
    with open_image(data) as image:
        if image.format not in FORMATS:
            raise BadImage("unsupported-format", f"{image.format}")
        width, height = image.size
        check_size(width, height, max_pixels)
        scale = scale_for(width, height, min_side)
        # CMYK is not drafted: asked for RGB, libjpeg would convert it in another way than Pillow.
        if scale > 1 and image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            image.draft(image.mode, (width // scale, height // scale))
        return converted_pixels(image)


def scale_for(width: int, height: int, min_side: int | None) -> int:
    """Divisor at which the shorter side still has `min_side` pixels: 4, 2 or 1."""
    if min_side is None:
        return 1
    return next((scale for scale in SCALES if min(width, height) >= scale * min_side), 1)


@functools.cache
def fast_jpeg_decoder() -> Any:
    """The module `simplejpeg`; None, said once in the log, where it is not installed."""
    try:
        import simplejpeg
    except ImportError:
        log.warning("simplejpeg is not installed: JPEGs are decoded by Pillow, slower; `pip install simplejpeg`")
        return None
    return simplejpeg


def _decode_jpeg(simplejpeg: Any, data: bytes, max_pixels: int, min_side: int | None) -> np.ndarray | None:
    """The pixels, or None where Pillow is to decide: simplejpeg refuses what it had to repair, Pillow some of that."""
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height, max_pixels)
        if colors not in _RGB_JPEGS:
            return None
        scale = scale_for(width, height, min_side)
        if scale == 1:
            pixels: np.ndarray = simplejpeg.decode_jpeg(data)
            return pixels
        sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        scaled: np.ndarray = simplejpeg.decode_jpeg(data, min_factor=scale, **sides)
        return scaled
    except ValueError:
        return None


def decode_eval_image(
    data: bytes,
    size: int,
    resize_mode: Literal["shortest", "squash"] = "shortest",
    decode: Literal["exact", "fast"] = "exact",
) -> Tensor:
    """An encoded picture as uint8 (3, S, S) for evaluation.

    Args:
        size: S.
        resize_mode: `shortest`: shorter side to S, then the central square; `squash`: both sides to S.
        decode: `exact`: the bytes of open_clip's transform before `ToTensor`; `fast`: near them.
    Raises: BadImage with the cause.
    Source: torchvision/transforms/transforms.py, Resize and CenterCrop on a Pillow picture, as
    open_clip/transform.py composes them.
    """
    pixels = decode_image(data, mode=decode)
    height, width = pixels.shape[:2]
    if resize_mode == "squash":
        target_h = target_w = size
    else:
        long = int(size * max(height, width) / min(height, width))
        target_h, target_w = (size, long) if height <= width else (long, size)
    if (height, width) == (target_h, target_w):
        resized = torch.from_numpy(pixels).permute(2, 0, 1)
    elif decode == "exact":
        resized = resize_exact(pixels, target_h, target_w)
    else:
        resized = resize_fast(torch.from_numpy(pixels).permute(2, 0, 1), target_h, target_w)
    top, left = round((target_h - size) / 2), round((target_w - size) / 2)
    return resized[:, top : top + size, left : left + size].contiguous()


def resize_exact(pixels: np.ndarray, height: int, width: int) -> Tensor:
    """uint8 (H, W, 3) to uint8 (3, height, width) by Pillow's bicubic."""
    resized = Image.fromarray(pixels).resize((width, height), Image.Resampling.BICUBIC)
    return torch.from_numpy(np.array(resized)).permute(2, 0, 1)


def resize_fast(image: Tensor, height: int, width: int) -> Tensor:
    """uint8 (3, H, W), fastest with channels last in memory, to uint8 (3, height, width): antialiased bicubic.

    The operator behind torchvision's uint8 resize: within two grey levels of Pillow's bicubic.
    """
    return F.interpolate(image[None], size=(height, width), mode="bicubic", antialias=True)[0]
