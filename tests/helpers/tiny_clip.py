"""CLIP and MIM models small enough to differentiate in float64 in milliseconds, their batches and their teachers."""

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.core.image_norm import normalize_images

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


class TinyTeacher:
    """A loaded CLIP model's face on a tiny one."""

    def __init__(self, model: nn.Module, context_length: int, logit_scale: float = 50.0) -> None:
        self.model, self.context_length, self.logit_scale = model.eval(), context_length, logit_scale
        self.seen: list[Tensor] = []

    def encode_image(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return self.model.encode_image(normalize_images(image, dtype=self.model.logit_scale.dtype))


# A MIM picture is 4 x 4 with patches of 2 x 2: N = 4 patches of 12 numbers.


def patches(image: Tensor) -> Tensor:
    """(B, 3, 4, 4) -> (B, 4, 12)."""
    return nn.functional.unfold(image, kernel_size=2, stride=2).transpose(1, 2)


class TinyStudent(nn.Module):
    """A MIM model: hidden patches become a token, all patches are mixed, the hidden ones are predicted."""

    def __init__(self) -> None:
        super().__init__()
        self.visual, self.lm_head = nn.Linear(12, 8), nn.Linear(8, 5)
        self.mask_token = nn.Parameter(torch.randn(8))

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        tokens = torch.where(mask[..., None], self.mask_token, self.visual(patches(image)))
        return self.lm_head(tokens + tokens.mean(dim=1, keepdim=True))[mask]


class TinyPatchTeacher:
    """A MIM teacher's face on one linear layer."""

    def __init__(self) -> None:
        self.head = nn.Linear(12, 5)
        self.seen: list[Tensor] = []

    def visual_tokens(self, image: Tensor) -> Tensor:
        self.seen.append(image)
        return self.head(patches(image.to(self.head.weight.dtype)))


def tiny_clip(seed: int = 0, **sizes: int) -> TinyClip:
    """A model with seeded weights."""
    torch.manual_seed(seed)
    return TinyClip(**sizes)


def make_batch(
    size: int = 6, num_captions: int | None = None, context_length: int = CONTEXT, image_size: int = 4
) -> Batch:
    """A seeded batch with captions of 1 to 6 words; `caption_id` repeats where captions repeat."""
    generator = torch.Generator().manual_seed(size)
    captions = torch.zeros(num_captions or size, context_length, dtype=torch.int64)
    for i, row in enumerate(captions):
        words = 1 + i % 6
        row[0] = EOT - 1
        row[1 : 1 + words] = torch.randint(1, EOT - 1, (words,), generator=generator)
        row[1 + words] = EOT
    caption_id = torch.arange(size) % len(captions)
    image = torch.randint(0, 256, (size, 3, image_size, image_size), generator=generator, dtype=torch.uint8)
    keys = [f"{i:04d}" for i in range(size)]
    return Batch(image=image, keys=keys, tokens=captions[caption_id], caption_id=caption_id)


def rows_of(batch: Batch, rank: int, world_size: int) -> Batch:
    """One rank's slice of a batch."""
    size = len(batch.keys) // world_size
    rows = slice(rank * size, (rank + 1) * size)
    return Batch(**{k: v if v is None or isinstance(v, int) else v[rows] for k, v in vars(batch).items()})
