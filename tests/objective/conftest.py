"""A CLIP model small enough to differentiate in float64 in milliseconds."""

from __future__ import annotations

import math
from collections.abc import Callable

import pytest
import torch
from torch import Tensor, nn

from evatool.types import Batch

EOT = 49407
CONTEXT = 12


class TinyClip(nn.Module):
    """What an objective needs of a CLIP model: a linear image tower, open_clip's text tower, a temperature."""

    def __init__(self, width: int = 8, image_size: int = 4, context_length: int = CONTEXT) -> None:
        super().__init__()
        from open_clip.transformer import TextTransformer

        self.visual = nn.Linear(3 * image_size**2, width)
        self.text = TextTransformer(
            context_length=context_length, width=16, heads=2, layers=2, output_dim=width, vocab_size=EOT + 1
        )
        self.logit_scale = nn.Parameter(torch.tensor([math.log(1 / 0.07)]))

    def encode_image(self, image: Tensor) -> Tensor:
        return self.visual(image.flatten(1))

    def encode_text(self, tokens: Tensor) -> Tensor:
        return self.text(tokens)


@pytest.fixture
def tiny_clip() -> Callable[..., TinyClip]:
    """Makes seeded models: `tiny_clip(seed=0, width=8, ...)`."""

    def make(seed: int = 0, **sizes: int) -> TinyClip:
        torch.manual_seed(seed)
        return TinyClip(**sizes)

    return make


@pytest.fixture
def make_batch() -> Callable[..., Batch]:
    """Makes seeded batches with captions of 1 to 6 words; `caption_id` repeats where captions repeat."""

    def make(
        size: int = 6, num_captions: int | None = None, context_length: int = CONTEXT, image_size: int = 4
    ) -> Batch:
        generator = torch.Generator().manual_seed(size)
        captions = torch.zeros(num_captions or size, context_length, dtype=torch.int64)
        for i, row in enumerate(captions):
            words = 1 + i % 6
            row[0] = EOT - 1
            row[1 : 1 + words] = torch.randint(1, EOT - 1, (words,), generator=generator)
            row[1 + words] = EOT
        caption_id = torch.arange(size) % len(captions)
        image = torch.randint(0, 256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
        return Batch(
            image=image, keys=[f"{i:04d}" for i in range(size)], tokens=captions[caption_id], caption_id=caption_id
        )

    return make
