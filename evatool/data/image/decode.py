"""Encoded pictures to RGB pixels, for training and evaluation.

Which images are used is decided as open_clip's and clip-benchmark's readers decide it, in every mode and with every
decoder: whatever Pillow turns into RGB. So CMYK is converted, 16-bit values are brought to 8 bits, of an animation the
first frame counts, alpha is dropped, EXIF orientation is not applied and a file's name says nothing. Refused are images
of more pixels than the limit, before any is decoded, formats outside `FORMATS`, some of which Pillow hands to other
programs, and JPEGs whose data end early, which Pillow fills up with grey. What decoding may cost: docs/limits.md.
Training can leave nonstandard images out before (`evatool.data.image.nonstandard`), and what goes into shards is judged
more strictly (`evatool.data.image.header`).
"""

from __future__ import annotations

import functools
import logging
import struct
import zlib
from typing import Any, Literal

import numpy as np
import torch
from torch import Tensor

from evatool.core.image_input import Interpolation, Resize
from evatool.data.image.announced import JpegFrame, jpeg_frame, png_ends_early, webp_ends_early
from evatool.data.image.header import (
    FORMATS,
    JPEG_START,
    MAX_PIXELS,
    BadImage,
    check_size,
    converted_pixels,
    open_image,
    read_header,
)
from evatool.data.image.resize import place_of, put_in_place

log = logging.getLogger(__name__)

Mode = Literal["exact", "fast", "scaled"]
"""`exact`: Pillow's pixels and Pillow's bicubic, byte for byte. `fast`: the same pixels, resized by torch: mostly
within two grey levels of Pillow, up to 17 were seen where hard edges are enlarged. `scaled`: JPEGs far larger than
needed are decoded at 1/2 or 1/4. JPEGs are decoded by simplejpeg where it is installed, to Pillow's pixels."""

MAX_FULL_PIXELS = 20_000_000
"""An image of more pixels is decoded at 1/2, 1/4 or 1/8 in every mode, so that it takes at most 4 bytes for each of its
pixels and 64 MB: by the decoder of JPEGs, else as means of squares."""

MOST_PIXELS = {"WEBP": MAX_FULL_PIXELS, "TIFF": 16_000_000, "AVIF": 7_000_000, "JPEG2000": 4_000_000}
"""Limits for formats whose decoders take more than 4 bytes a pixel."""

SCALES = (4, 2)
"""Divisors of a scaled decode. libjpeg-turbo's inverse DCTs between them have no vector code and save no time."""

_FREE_BYTES = 56 * 2**20  # beside 4 bytes a pixel
_COUNTED_PNG_PIXELS = 14_000_000  # above, memory is taken only for data that were counted
_PILLOW_WEBP_PIXELS = 5_000_000  # above, Pillow's 16 bytes a pixel are too many
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
    Above `MAX_FULL_PIXELS` the sides are divided further.
    Raises: BadImage with the cause: zero-byte, not-a-picture, unsupported-format, too-large or truncated.
    """
    assert (mode == "scaled") == (min_side is not None), "a scaled decode, and no other, needs min_side"
    frame = jpeg_frame(data) if data[:3] == JPEG_START else None
    if frame is not None:
        check_size(frame.width, frame.height, max_pixels)
        if len(data) - frame.scan_start < frame.least_bytes:
            raise BadImage("truncated", f"{len(data)} bytes for {frame.width} x {frame.height} pixels of a JPEG")
    simplejpeg = fast_jpeg_decoder()
    if simplejpeg is not None and data[:3] == JPEG_START:
        pixels = _decode_jpeg(simplejpeg, data, max_pixels, min_side, frame)
        if pixels is not None:
            return pixels
    with open_image(data) as image:
        if image.format not in FORMATS:
            raise BadImage("unsupported-format", f"{image.format}")
        width, height = image.size
        check_size(width, height, min(max_pixels, MOST_PIXELS.get(image.format, max_pixels)))
        if image.format == "WEBP" and webp_ends_early(data):
            raise BadImage("truncated", f"less data than {width} x {height} pixels")
        if image.format == "WEBP" and width * height > _PILLOW_WEBP_PIXELS:
            return _decode_large_webp(data)
        if image.format == "PNG" and width * height > _COUNTED_PNG_PIXELS and _is_short_png(data):
            raise BadImage("truncated", f"less data than {width} x {height} pixels")
        scale = _scale_of_large(width, height)
        # CMYK is not drafted: asked for RGB, libjpeg would convert it in another way than Pillow.
        if image.format in ("JPEG", "MPO") and image.mode in ("RGB", "L"):
            scale = max(scale_for(width, height, min_side), _jpeg_scale(frame, 7) if frame else scale)
            image.draft(image.mode, (width // scale, height // scale))
            scale = 1
        elif frame is not None and frame.coefficient_bytes > _FREE_BYTES:
            raise BadImage("too-large", f"a progressive JPEG in CMYK of {width} x {height} pixels")
        return converted_pixels(image, scale)


def decode_rgb(data: bytes, max_pixels: int = MAX_PIXELS) -> np.ndarray:
    """An encoded image as uint8 (H, W, 3), after the same judgement as `read_header`.

    Alpha is dropped as `Image.convert("RGB")` does, which is what open_clip and clip-benchmark see.
    Raises: BadImage with the cause.
    """
    read_header(data, max_pixels)
    return decode_image(data, max_pixels, "exact")


def _scale_of_large(width: int, height: int) -> int:
    """Divisor at which an image has at most `MAX_FULL_PIXELS`: 1, 2, 4 or 8."""
    return next((s for s in (1, 2, 4) if width * height <= MAX_FULL_PIXELS * s * s), 8)


def _jpeg_scale(frame: JpegFrame, bytes_per_pixel: int) -> int:
    """Divisor at which a JPEG's pixels and coefficients fit beside each other. Raises: BadImage where none does."""
    pixels = frame.width * frame.height
    for scale in (1, 2, 4, 8):
        needed = frame.coefficient_bytes + bytes_per_pixel * pixels // scale**2
        if pixels <= MAX_FULL_PIXELS * scale**2 and needed <= 4 * pixels + _FREE_BYTES:
            return scale
    raise BadImage("too-large", f"a progressive JPEG of {frame.width} x {frame.height} pixels")


def _is_short_png(data: bytes) -> bool:
    try:
        return png_ends_early(data)
    except (zlib.error, struct.error):
        return True


def _decode_large_webp(data: bytes) -> np.ndarray:
    """The pixels by torchvision, which holds them once; Pillow keeps four copies of a WebP's."""
    from torchvision.io import ImageReadMode, decode_webp  # here: its models take a second to import

    try:
        decoded = decode_webp(torch.frombuffer(bytearray(data), dtype=torch.uint8), ImageReadMode.RGB)
    except RuntimeError as err:
        raise BadImage("truncated", str(err).splitlines()[0]) from err
    return np.asarray(decoded.permute(1, 2, 0).contiguous().numpy())


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


def _decode_jpeg(
    simplejpeg: Any, data: bytes, max_pixels: int, min_side: int | None, frame: JpegFrame | None
) -> np.ndarray | None:
    """The pixels, or None where Pillow is to decide: simplejpeg refuses what it had to repair, Pillow some of that.

    Raises: BadImage for data that end early, whatever mark stands at their end: Pillow would fill them up with grey.
    """
    try:
        height, width, colors, _ = simplejpeg.decode_jpeg_header(data)
        check_size(width, height, max_pixels)
        if colors not in _RGB_JPEGS:
            return None
        scale = max(scale_for(width, height, min_side), _jpeg_scale(frame, 3) if frame else 1)
        if scale == 1:
            pixels: np.ndarray = simplejpeg.decode_jpeg(data)
            return pixels
        sides = {"min_height": -(-height // scale), "min_width": -(-width // scale)}
        scaled: np.ndarray = simplejpeg.decode_jpeg(data, min_factor=scale, **sides)
        return scaled
    except ValueError as err:
        if "premature end" in str(err).lower():
            raise BadImage("truncated", str(err)) from err
        return None


def decode_eval_image(
    data: bytes,
    size: int | tuple[int, int],
    resize_mode: Resize = "shortest",
    decode: Literal["exact", "fast"] = "exact",
    interpolation: Interpolation = "bicubic",
    fill: int = 0,
) -> Tensor:
    """An encoded picture as uint8 (3, H, W) for evaluation.

    Args:
        size: the input's sides (H, W); one number for a square.
        resize_mode, interpolation, fill: as `ImageInput` has them.
        decode: `exact`: the bytes of open_clip's transform before `ToTensor`; `fast`: near them.
    Raises: BadImage with the cause.
    """
    pixels = decode_image(data, mode=decode)
    place = place_of(pixels.shape[0], pixels.shape[1], size, resize_mode)
    if resize_mode == "shortest" and place.size[0] != place.size[1]:
        interpolation = "bicubic"  # open_clip's transform forgets it there
    return put_in_place(pixels, place, decode, interpolation, fill if resize_mode == "longest" else 0)
