"""Dropout of training steps keyed by sample: what is dropped follows from the run's seed and the sample's place in it.

    key(sample i, layer l)      = splitmix(splitmix(i + seed c0) + l c1)
    draw(sample i, layer l, n)  = splitmix(key(i, l) + n c2)             64 bits; splitmix is splitmix64's finalizer

A draw depends on no other sample of the batch, so neither on the number of ranks nor on micro-batches nor on where a
run was resumed. All draws of a layer are computed at once, by the same integers on a CPU and a GPU.
Source: https://doi.org/10.1145/2660193.2660195 (Steele, Lea and Flood, OOPSLA 2014), for the mixing function.
"""

from __future__ import annotations

from collections.abc import Iterator
from typing import Any

import torch
from open_clip.transformer import PatchDropout as ClipPatchDropout
from timm.layers import DropPath, PatchDropout, PatchDropoutWithIndices
from torch import Tensor, nn

# B samples, N patches, C channels


def _signed(value: int) -> int:
    """The last 64 bits of a number as torch's int64 has them; its own products wrap around in the same way."""
    value %= 2**64
    return value - 2**64 if value >= 2**63 else value


_SEED, _LAYER, _PLACE = (_signed(c) for c in (0x9E3779B97F4A7C15, 0xD1B54A32D192ED03, 0x8CB92BA72F3D8DD7))
_MIX = (_signed(0xBF58476D1CE4E5B9), _signed(0x94D049BB133111EB))


def splitmix(values: Tensor) -> Tensor:
    """splitmix64's finalizer on int64 of any shape; every bit of the result depends on every bit."""
    # int64 shifts bring the sign in from the left: it is masked away.
    values = (values ^ ((values >> 30) & (2**34 - 1))) * _MIX[0]
    values = (values ^ ((values >> 27) & (2**37 - 1))) * _MIX[1]
    return values ^ ((values >> 31) & (2**33 - 1))


def uniform(draws: Tensor) -> Tensor:
    """Draws as float32 in [0, 1), multiples of 2^-24."""
    return ((draws >> 40) & (2**24 - 1)).float() * 2.0**-24


class KeyedDropPath(DropPath):  # type: ignore[misc]  # timm has no types
    """timm's stochastic depth; which samples skip the block is drawn by `StepDraws`, else by torch."""

    kept: Tensor | None = None
    """(B,) float32: 0 for a sample that skips the block, 1 / (1 - p) for another."""

    def draw(self, keys: Tensor | None) -> None:
        """Take the step's keys (B,) int64 of this layer; None for torch's random numbers."""
        self.kept = None
        if keys is not None:
            share = 1.0 - self.drop_prob
            is_kept = uniform(keys) < share
            self.kept = is_kept.float() / (share if self.scale_by_keep and share > 0 else 1.0)

    def forward(self, x: Tensor) -> Tensor:
        """(B, ...) -> (B, ...)."""
        if self.kept is None or not self.training or self.drop_prob == 0.0:
            plain: Tensor = super().forward(x)
            return plain
        return x * self.kept.to(x.dtype).view(-1, *(1,) * (x.ndim - 1))


class _Patches:
    """The patches that stay, by keys where there are any."""

    keys: Tensor | None = None

    def draw(self, keys: Tensor | None) -> None:
        """Take the step's keys (B,) int64 of this layer; None for torch's random numbers."""
        self.keys = keys

    def keep(self, x: Tensor, prob: float, num_prefix: int) -> tuple[Tensor, Tensor]:
        """(B, prefix + N, C) -> (B, prefix + kept, C), and the offsets (B, kept) of those that stay."""
        assert self.keys is not None
        prefix, patches = x[:, :num_prefix], x[:, num_prefix:]
        num_kept = max(1, int(patches.shape[1] * (1.0 - prob)))
        offsets = torch.arange(patches.shape[1], device=x.device) * _PLACE
        draws = splitmix(self.keys[:, None] + offsets)
        kept = draws.argsort(dim=-1)[:, :num_kept]
        chosen = patches.gather(1, kept.unsqueeze(-1).expand(-1, -1, patches.shape[2]))
        return torch.cat((prefix, chosen), dim=1), kept


class KeyedPatchDropoutWithIndices(_Patches, PatchDropoutWithIndices):  # type: ignore[misc]
    """timm's patch dropout of an EVA tower."""

    def forward(self, x: Tensor) -> tuple[Tensor, Tensor | None]:
        """(B, N, C) -> (B, kept, C), and the offsets of the patches that stay."""
        if self.keys is None or not self.training or self.prob == 0.0:
            plain: tuple[Tensor, Tensor | None] = super().forward(x)
            return plain
        return self.keep(x, self.prob, self.num_prefix_tokens)


class KeyedClipPatchDropout(_Patches, ClipPatchDropout):  # type: ignore[misc]
    """open_clip's patch dropout of its own ViT."""

    def forward(self, x: Tensor) -> Tensor:
        """(B, N, C) -> (B, kept, C)."""
        if self.keys is None or not self.training or self.prob == 0.0 or not self.exclude_first_token:
            plain: Tensor = super().forward(x)
            return plain
        return self.keep(x, self.prob, 1)[0]


class StepDraws:
    """The layers of a model that draw random numbers in a training step.

    Args:
        model: its dropout layers are replaced by keyed ones, which draw as before until `start` is called.
    """

    def __init__(self, model: nn.Module) -> None:
        self._layers: list[Any] = list(_replaced(model))

    def start(self, samples: Tensor | None, seed: int, device: torch.device) -> None:
        """Draw for a forward pass over these samples.

        Args:
            samples: (B,) int64, the place of each in the run; None for torch's random numbers.
            seed: of the run.
        """
        if not self._layers:
            return
        base = None if samples is None else splitmix(samples.to(device, non_blocking=True) + _signed(seed * _SEED))
        for number, layer in enumerate(self._layers, start=1):
            layer.draw(None if base is None else splitmix(base + _signed(number * _LAYER)))


def _replaced(model: nn.Module) -> Iterator[nn.Module]:
    """Put a keyed layer into the place of each dropout layer, in the order of the model's modules."""
    for parent in list(model.modules()):
        for name, child in list(parent.named_children()):
            keyed: nn.Module
            match child:
                case KeyedDropPath() | KeyedPatchDropoutWithIndices() | KeyedClipPatchDropout():
                    keyed = child
                case DropPath():
                    keyed = KeyedDropPath(child.drop_prob, child.scale_by_keep)
                case PatchDropoutWithIndices():
                    keyed = KeyedPatchDropoutWithIndices(child.prob, child.num_prefix_tokens, child.ordered)
                case ClipPatchDropout():
                    keyed = KeyedClipPatchDropout(child.prob, child.exclude_first_token)
                case PatchDropout():
                    raise AssertionError("a tower with timm's plain patch dropout is not among ours")
                case _:
                    continue
            keyed.training = child.training
            setattr(parent, name, keyed)
            yield keyed
