"""Encoded pictures to model inputs, as open_clip's and clip-benchmark's evaluation transforms make them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

import numpy as np
import torch
from torch import Tensor

from evatool.data.image.decode import decode_eval_image

Resize = Literal["shortest", "squash"]
Decode = Literal["exact", "fast"]


@dataclass(frozen=True)
class EvalTransform:
    """An encoded picture to uint8 (3, S, S).

    Args:
        size: S, the model's input side in pixels.
        resize: `shortest`: shorter side to S, then the central square; `squash`: both sides to S.
        decode: `exact`: the bytes of Pillow's bicubic. `fast`: near it.
    """

    size: int
    resize: Resize = "shortest"
    decode: Decode = "exact"

    def __call__(self, data: bytes) -> Tensor:
        """The picture. Raises: BadImage with the cause."""
        return decode_eval_image(data, self.size, self.resize, self.decode)

    def mask(self, mask: np.ndarray) -> Tensor:
        """A mask (H, W) cut as its picture is: int32 (S, S), each pixel from the nearest one."""
        height, width = mask.shape
        if self.resize == "squash":
            rows, columns, top, left = self.size, self.size, 0, 0
        else:
            long = int(self.size * max(height, width) / min(height, width))
            rows, columns = (self.size, long) if height <= width else (long, self.size)
            top, left = round((rows - self.size) / 2), round((columns - self.size) / 2)
        centers = np.arange(self.size) + 0.5
        from_rows = ((centers + top) * height / rows).astype(np.int64)
        from_columns = ((centers + left) * width / columns).astype(np.int64)
        return torch.from_numpy(mask[from_rows][:, from_columns].astype(np.int32))
