"""Tensors of a file under our names: where each comes from, and how it is made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from typing import Literal

import torch
from torch import Tensor

from evatool.formats.safetensors import TensorMap, dtype_of, shape_of

TOWER = "visual.trunk."
PROJECTION = "visual.head.proj.weight"  # without bias it is open_clip's linear projection, not timm's head
TowerKind = Literal["eva", "clip-vit"]


@dataclass(frozen=True)
class Source:
    """Where one of our tensors comes from.

    Attributes:
        keys: the source's names; more than one are laid end to end along the first axis.
        transposed: a matrix that the source holds the other way round.
        lead: axes of length 1 to put in front.
    """

    keys: tuple[str, ...]
    transposed: bool = False
    lead: int = 0


class MappedTensors(TensorMap):
    """Other tensors under our names, made from the source one at a time, when asked for."""

    def __init__(self, base: Mapping[str, Tensor], sources: Mapping[str, Source], tower: TowerKind = "eva") -> None:
        self._base, self._sources, self.tower = base, dict(sources), tower
        self.gives_copies = getattr(base, "gives_copies", False)

    def __getitem__(self, name: str) -> Tensor:
        source = self._sources[name]
        parts = [self._base[key] for key in source.keys]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.T.contiguous() if source.transposed else tensor
        return tensor.reshape((1,) * source.lead + tuple(tensor.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._sources)

    def __len__(self) -> int:
        return len(self._sources)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the tensor will have."""
        source = self._sources[name]
        shapes = [shape_of(self._base, key) for key in source.keys]
        shape = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
        return (1,) * source.lead + (shape[::-1] if source.transposed else shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype at the source."""
        return dtype_of(self._base, self._sources[name].keys[0])

    def renamed(self, names: Mapping[str, str]) -> MappedTensors:
        """The same tensors under other names; `names` maps old to new, others stay."""
        return MappedTensors(self._base, {names.get(n, n): source for n, source in self._sources.items()}, self.tower)
