"""Pictures that Pillow can turn into RGB, but whose colours or frames that leaves in doubt: found by their header.

open_clip's reader, and so EVA's training, converts them without a word. `data-prepare` refuses them. Training does what
`data.nonstandard` says, and counts them either way.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np

from evatool.data.image.announced import jpeg_frame
from evatool.data.image.decode import Mode, decode_image
from evatool.data.image.header import (
    FORMATS,
    HEADER_ERRORS,
    JPEG_START,
    PLAIN_MODES,
    WIDE_MODES,
    BadImage,
    check_size,
    open_image,
    png_bit_depth,
)

NonstandardPolicy = Literal["convert", "skip"]

_BITS_PER_SAMPLE = 258  # TIFF's tag


@dataclass(frozen=True)
class TrainingImages:
    """Decodes pictures for training.

    Args:
        policy: the recipe's `data.nonstandard`.
        mode, min_side: arguments of `decode_image`.
    """

    policy: NonstandardPolicy
    mode: Mode
    min_side: int | None

    def __call__(self, data: bytes, max_pixels: int) -> tuple[np.ndarray, str | None]:
        """The pixels, uint8 (H, W, 3), and why they had to be converted; None for an ordinary picture.

        Raises: BadImage with the cause; also for a nonstandard picture, where the policy is to skip those.
        """
        cause = nonstandard_cause(data, max_pixels)
        if cause is not None and self.policy == "skip":
            raise BadImage(*cause)
        pixels = decode_image(data, max_pixels, self.mode, min_side=self.min_side)
        return pixels, None if cause is None else cause[0]


def nonstandard_cause(data: bytes, max_pixels: int) -> tuple[str, str] | None:
    """(cause, what was seen) by the header: animated, cmyk, 16-bit or color-mode; None for an ordinary picture.

    Ordinary are 8-bit grey, palette and RGB with or without alpha, however they are stored: progressive JPEGs, too, and
    phone pictures with a second one behind the first (MPO). What has no header is left to the decoder to name.
    Raises: BadImage for more pixels than the limit.
    """
    if data[:3] == JPEG_START:
        frame = jpeg_frame(data)
        return ("cmyk", "JPEG in CMYK") if frame is not None and frame.components == 4 else None
    try:
        with open_image(data) as image:
            if image.format not in FORMATS:
                return None
            check_size(*image.size, max_pixels)
            if getattr(image, "is_animated", False):
                return "animated", f"{image.format} with more than one frame"
            if image.mode == "CMYK":
                return "cmyk", f"{image.format} in CMYK"
            tags = getattr(image, "tag_v2", {})
            bits = max([png_bit_depth(data), *tags.get(_BITS_PER_SAMPLE, ())])
            if image.mode.startswith(WIDE_MODES) or bits > 8:
                return "16-bit", f"{image.format} in mode {image.mode}, more than 8 bits a channel"
            if image.mode not in PLAIN_MODES:
                return "color-mode", f"{image.format} in mode {image.mode}"
            return None
    except BadImage as err:
        if err.cause == "too-large":
            raise
        return None
    except HEADER_ERRORS:
        return None
