"""Tensors under other names: where each comes from, and how it is made when it is asked for."""

from __future__ import annotations

from collections.abc import Iterable, Iterator, Mapping
from dataclasses import dataclass

import torch
from torch import Tensor

from evatool.formats.safetensors import TensorMap, dtype_of, shape_of
from evatool.model.config import TowerKind


@dataclass(frozen=True)
class TensorOrigin:
    """Where one of our tensors comes from.

    Attributes:
        keys: the base's names; more than one are laid end to end along the first axis.
        transposed: a matrix that the base holds the other way round.
        lead: axes of length 1 to put in front.
    """

    keys: tuple[str, ...]
    transposed: bool = False
    lead: int = 0


class MappedTensors(TensorMap):
    """Other tensors under our names, made from them one at a time, when asked for.

    Args:
        base: the tensors as they lie in a file.
        origins: our name -> where its tensor comes from.
        tower: the kind of image tower that the names describe.
    """

    def __init__(
        self, base: Mapping[str, Tensor], origins: Mapping[str, TensorOrigin], tower: TowerKind = "eva"
    ) -> None:
        self._base, self._origins, self.tower = base, dict(origins), tower
        self.gives_copies = getattr(base, "gives_copies", False)

    def __getitem__(self, name: str) -> Tensor:
        origin = self._origins[name]
        parts = [self._base[key] for key in origin.keys]
        tensor = parts[0] if len(parts) == 1 else torch.cat(parts)
        tensor = tensor.T.contiguous() if origin.transposed else tensor
        return tensor.reshape((1,) * origin.lead + tuple(tensor.shape))

    def __iter__(self) -> Iterator[str]:
        return iter(self._origins)

    def __len__(self) -> int:
        return len(self._origins)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape that the tensor will have."""
        origin = self._origins[name]
        shapes = [shape_of(self._base, key) for key in origin.keys]
        shape = shapes[0] if len(shapes) == 1 else (sum(s[0] for s in shapes), *shapes[0][1:])
        return (1,) * origin.lead + (shape[::-1] if origin.transposed else shape)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the base."""
        return dtype_of(self._base, self._origins[name].keys[0])

    def without(self, name: str) -> MappedTensors:
        """These tensors less one."""
        return MappedTensors(self._base, {n: o for n, o in self._origins.items() if n != name}, self.tower)

    def renamed(self, names: Mapping[str, str]) -> MappedTensors:
        """These tensors under other names; `names` maps old to new, and names that it leaves out stay."""
        return MappedTensors(self._base, {names.get(n, n): origin for n, origin in self._origins.items()}, self.tower)


def renamed_tensors(tensors: Mapping[str, Tensor], names: Mapping[str, str]) -> MappedTensors:
    """Some of `tensors` under other names, read when asked for; `names` maps each new name to the old one."""
    return MappedTensors(tensors, {new: TensorOrigin((old,)) for new, old in names.items()})


def tensors_below(tensors: Mapping[str, Tensor], prefix: str) -> MappedTensors:
    """The tensors whose names begin with `prefix`, under the names they have."""
    return renamed_tensors(tensors, {name: name for name in tensors if name.startswith(prefix)})


class MergedMap(TensorMap):
    """The tensors of several mappings as one.

    Args:
        owners: name -> the mapping that has its tensor, under the same name.
    """

    def __init__(self, owners: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._owners = dict(owners)
        self.gives_copies = all(getattr(owner, "gives_copies", False) for owner in self._owners.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in the mapping that has it."""
        return shape_of(self._owners[name], name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in the mapping that has it."""
        return dtype_of(self._owners[name], name)


def merged_tensors(parts: Iterable[Mapping[str, Tensor]]) -> MergedMap:
    """All tensors of `parts`, whose names differ."""
    return MergedMap({name: part for part in parts for name in part})
