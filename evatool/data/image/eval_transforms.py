"""Encoded pictures to model inputs, as open_clip's and clip-benchmark's evaluation transforms make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
from torch import Tensor

from evatool.core.image_input import ImageInput, Interpolation, Resize
from evatool.data.image.decode import decode_eval_image
from evatool.data.image.resize import mask_in_place, place_of

Decode = Literal["exact", "fast"]


@dataclass(frozen=True)
class EvalTransform:
    """An encoded picture to uint8 (3, H, W).

    Args:
        size: the model's input in pixels, (H, W) or the side of a square.
        resize, interpolation, fill: as `ImageInput` has them.
        decode: `exact`: the bytes of Pillow's resize. `fast`: near it.
    """

    size: int | tuple[int, int]
    resize: Resize = "shortest"
    decode: Decode = "exact"
    interpolation: Interpolation = "bicubic"
    fill: int = 0

    @classmethod
    def of(
        cls,
        wanted: ImageInput,
        size: int | tuple[int, int],
        *,
        resize: Resize | None = None,
        decode: Decode = "exact",
    ) -> EvalTransform:
        """The transform of a model that wants its images so; `resize` in place of the model's own."""
        return cls(size, resize or wanted.resize, decode, wanted.interpolation, wanted.fill)

    def __call__(self, data: bytes) -> Tensor:
        """The picture. Raises: BadImage with the cause."""
        return decode_eval_image(data, self.size, self.resize, self.decode, self.interpolation, self.fill)

    def mask(self, mask: np.ndarray) -> Tensor:
        """A mask (h, w) cut as its picture is: int32 (H, W), each pixel from the nearest one."""
        return mask_in_place(mask, place_of(mask.shape[0], mask.shape[1], self.size, self.resize))
