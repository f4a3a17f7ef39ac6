"""Encoded pictures that go into shards: judged by their header before a byte of pixels is decoded.

Training and evaluation accept more: `evatool.data.image.decode`. Accepted here are JPEG, PNG and WebP with
one frame and 8 bits a channel in grey, palette or RGB, with or without alpha. Everything else is named by one of
`CAUSES` rather than guessed at: a converted CMYK or 16-bit picture depends on a colour profile or a value range that
a caption file does not give.
"""

from __future__ import annotations

import io
import struct
import threading
import warnings
from collections.abc import Iterator
from contextlib import contextmanager
from dataclasses import dataclass

import numpy as np
from PIL import Image, UnidentifiedImageError

from evatool.data.image.announced import excess, without_exif

MAX_PIXELS = 89_478_485
"""Pillow's own warning limit; the default of `shards.max_pixels`."""

EXTENSIONS = {"JPEG": "jpg", "PNG": "png", "WEBP": "webp"}
"""Accepted formats by Pillow's name, and the member name each has in a shard."""

IMAGE_MEMBERS = (*EXTENSIONS.values(), "jpeg")
"""Members of a sample that can be its image, by extension; the first of them that a sample has is read."""

CAUSES = {
    "zero-byte": "the file is empty",
    "not-a-picture": "the header is of no known picture format",
    "unsupported-format": "a picture, but not JPEG, PNG or WebP",
    "too-large": "the header announces more pixels than the limit",
    "animated": "more than one frame",
    "cmyk": "CMYK colours",
    "16-bit": "more than 8 bits a channel",
    "color-mode": "neither grey, palette nor RGB",
    "truncated": "the pixel data end early or are damaged",
}
"""Why a picture cannot be used."""

WIDE_MODES = ("I", "F")
"""Begin the names of Pillow's modes of more than 8 bits: "I;16", "I;16B", "I" and "F"."""

PLAIN_MODES = frozenset({"1", "L", "LA", "La", "P", "PA", "RGB", "RGBA", "RGBa", "RGBX"})
"""Pillow's modes of 8-bit grey, palette and RGB, with or without alpha."""

HEADER_ERRORS = (OSError, SyntaxError, ValueError, TypeError, LookupError, EOFError, RuntimeError, struct.error)
"""Exceptions that Pillow raises at damaged headers."""

FORMATS = frozenset({"JPEG", "MPO", "PNG", "WEBP", "GIF", "BMP", "DIB", "TIFF", "JPEG2000", "AVIF", "PPM"})
"""Formats that are read at all, by Pillow's name; some of the others it hands to other programs."""

JPEG_START = b"\xff\xd8\xff"
_STRIP_PIXELS = 2**18
_NAMED_BYTES = 2**20

_limit_lock = threading.Lock()


class BadImage(Exception):
    """A picture that cannot be used.

    Args:
        cause: a key of `CAUSES`.
        detail: the value seen.
    """

    def __init__(self, cause: str, detail: str = "") -> None:
        super().__init__(f"{cause}: {detail or CAUSES[cause]}")
        self.cause, self.detail = cause, detail or CAUSES[cause]


@dataclass(frozen=True)
class ImageHeader:
    """Format and size of a picture. `extension` is the member's name in a shard, by content, not file name."""

    extension: str
    width: int
    height: int

    @property
    def decoded_bytes(self) -> int:
        """Size as uint8 RGB."""
        return 3 * self.width * self.height


def read_header(data: bytes, max_pixels: int = MAX_PIXELS) -> ImageHeader:
    """Judge an encoded picture by its header; no pixel is decoded.

    Raises: BadImage with the cause.
    """
    with open_image(data) as image:
        check_size(*image.size, max_pixels)
        return _judge(image, data)


def encode_png(pixels: np.ndarray) -> bytes:
    """uint8 (H, W, 3) as a PNG file."""
    out = io.BytesIO()
    Image.fromarray(pixels).save(out, "PNG", compress_level=3)  # twice as fast as the default for a tenth more bytes
    return out.getvalue()


@contextmanager
def open_image(data: bytes) -> Iterator[Image.Image]:
    """The picture with its header read and no pixel decoded, of whatever size and format.

    Raises: BadImage where there is no header of a picture.
    """
    if not data:
        raise BadImage("zero-byte")
    reason = excess(data)
    if reason is not None:
        raise BadImage("too-large", reason)
    if data[:3] == JPEG_START:
        data = without_exif(data)
    try:
        image = _open_without_limit(data)
    except UnidentifiedImageError as err:
        raise BadImage("not-a-picture") from err
    except HEADER_ERRORS as err:
        raise BadImage("truncated", _one_line(err)) from err
    with image:
        yield image


def check_size(width: int, height: int, max_pixels: int) -> None:
    """Raises: BadImage for more pixels than the limit."""
    if width * height > max_pixels:
        raise BadImage("too-large", f"{width} x {height} pixels, limit {max_pixels}")


def converted_pixels(image: Image.Image, reduce: int = 1) -> np.ndarray:
    """The first frame as uint8 (H, W, 3), as `Image.convert("RGB")` makes it; strip by strip, to hold it only once.

    Args:
        reduce: each pixel is the mean of a square of this side; H and W are divided by it, rounded up.
    Raises: BadImage.
    """
    try:
        image.load()
        width, height = image.size
        rows = max(1, _STRIP_PIXELS // width // reduce) * reduce
        pixels = np.empty((-(-height // reduce), -(-width // reduce), 3), np.uint8)
        for top in range(0, height, rows):
            strip = image if rows >= height else image.crop((0, top, width, min(top + rows, height)))
            strip = strip.convert("RGB") if strip.mode != "RGB" else strip
            pixels[top // reduce : (top + rows) // reduce] = np.asarray(strip.reduce(reduce) if reduce > 1 else strip)
        return pixels
    except Exception as err:  # damaged pixel data make Pillow's decoders raise nearly anything
        raise BadImage("truncated", _one_line(err)) from err


def _open_without_limit(data: bytes) -> Image.Image:
    # Pillow's own limit is one number for the whole process and raises above twice its value; ours is the recipe's,
    # checked by `_judge` before any pixel is decoded. Opening reads the header only.
    with _limit_lock, warnings.catch_warnings():
        warnings.simplefilter("ignore")  # e.g. corrupt EXIF: no reason to refuse
        saved, Image.MAX_IMAGE_PIXELS = Image.MAX_IMAGE_PIXELS, None
        try:
            # Small files of any format, so that it can be named; of large ones only those whose opening is bounded.
            formats = None if len(data) <= _NAMED_BYTES else sorted(FORMATS - {"MPO"})  # Pillow opens MPO as JPEG
            return Image.open(io.BytesIO(data), formats=formats)
        finally:
            Image.MAX_IMAGE_PIXELS = saved


def _judge(image: Image.Image, data: bytes) -> ImageHeader:
    try:
        is_animated = getattr(image, "is_animated", False)  # `n_frames` would look at each of a million
    except HEADER_ERRORS as err:
        raise BadImage("truncated", _one_line(err)) from err
    if is_animated:
        raise BadImage("animated", f"{image.format} with more than one frame")
    if image.mode == "CMYK":
        raise BadImage("cmyk", f"{image.format} in CMYK")
    if image.mode.startswith(WIDE_MODES) or png_bit_depth(data) > 8:
        raise BadImage("16-bit", f"{image.format} in mode {image.mode}, more than 8 bits a channel")
    if image.format not in EXTENSIONS:
        raise BadImage("unsupported-format", f"{image.format}")
    if image.mode not in PLAIN_MODES:
        raise BadImage("color-mode", f"{image.format} in mode {image.mode}")
    return ImageHeader(EXTENSIONS[image.format], *image.size)


def png_bit_depth(data: bytes) -> int:
    """Bits a channel of a PNG by its header; 0 for other formats."""
    # Pillow opens a 16-bit RGB PNG as mode "RGB" and drops the low bytes without a word, so the header is read here.
    if data[:8] == b"\x89PNG\r\n\x1a\n" and data[12:16] == b"IHDR" and len(data) > 24:
        return data[24]
    return 0


def _one_line(err: BaseException) -> str:
    return " ".join(str(err).split()) or type(err).__name__
