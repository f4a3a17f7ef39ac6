"""A job's state as its ranks hold it: every tensor's shape, and the numbers that this rank is to write."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.distributed.collectives import world_size


@dataclass(frozen=True)
class StateShard:
    """Consecutive numbers of a tensor, on any device; they may alias live weights."""

    name: str
    start: int  # of the first number within the flat tensor
    values: Tensor  # flat


@dataclass
class ShardedState:
    """Tensors of a job by name. `shapes` and `dtypes` are the same on every rank; the ranks' `pieces` together cover
    each tensor exactly once."""

    shapes: dict[str, tuple[int, ...]] = field(default_factory=dict)
    dtypes: dict[str, torch.dtype] = field(default_factory=dict)
    pieces: list[StateShard] = field(default_factory=list)

    @classmethod
    def whole(cls, tensors: Mapping[str, Tensor], *, is_writer: bool = True) -> ShardedState:
        """Tensors that every rank holds in full, written by the one rank with `is_writer`."""
        state = cls()
        for name, tensor in tensors.items():
            state.declare(name, tensor.shape, tensor.dtype)
            if is_writer:
                state.pieces.append(StateShard(name, 0, tensor.detach().reshape(-1)))
        return state

    def declare(self, name: str, shape: Sequence[int], dtype: torch.dtype) -> None:
        """Name a tensor of the state; on every rank alike."""
        self.shapes[name], self.dtypes[name] = tuple(shape), dtype

    def add(self, name: str, start: int, values: Tensor) -> None:
        """Name numbers that this rank holds and no other writes; none at all are left out."""
        if values.numel():
            self.pieces.append(StateShard(name, start, values.detach().reshape(-1)))

    def merged(self, other: ShardedState) -> ShardedState:
        """Both states' tensors."""
        return ShardedState(self.shapes | other.shapes, self.dtypes | other.dtypes, [*self.pieces, *other.pieces])

    def renamed(self, names: Mapping[str, str]) -> ShardedState:
        """Only the tensors that `names` (old -> new) mentions, under their new names."""
        return ShardedState(
            {new: self.shapes[old] for old, new in names.items()},
            {new: self.dtypes[old] for old, new in names.items()},
            [StateShard(names[p.name], p.start, p.values) for p in self.pieces if p.name in names],
        )


def gather_full_state(state: ShardedState) -> dict[str, Tensor]:
    """Whole tensors on the CPU of every rank, one exchange a tensor; every rank must call it. May alias live ones."""
    by_name: dict[str, list[StateShard]] = {name: [] for name in state.shapes}
    for piece in state.pieces:
        by_name[piece.name].append(piece)
    found: dict[str, Tensor] = {}
    for name, pieces in by_name.items():
        shape, dtype = state.shapes[name], state.dtypes[name]
        if world_size() == 1 and len(pieces) == 1 and pieces[0].values.numel() == math.prod(shape):
            found[name] = pieces[0].values.reshape(shape).cpu()
            continue
        # As integers, and every number is on one rank only: the sum has its very bits.
        whole = torch.zeros(math.prod(shape) * dtype.itemsize, dtype=torch.uint8, device=_exchange_device())
        flat = whole.view(dtype)
        for piece in pieces:
            flat[piece.start : piece.start + piece.values.numel()] = piece.values.to(whole.device)
        if world_size() > 1:
            dist.all_reduce(whole)
        found[name] = flat.reshape(shape).cpu()
    return found


def _exchange_device() -> torch.device:
    is_gpu = world_size() > 1 and dist.get_backend() == "nccl"
    return torch.device("cuda", torch.cuda.current_device()) if is_gpu else torch.device("cpu")


def read_piece(state: Mapping[str, Tensor], name: str, start: int, numel: int, shape: Sequence[int]) -> Tensor:
    """Numbers [start, start + numel) of a saved tensor, flat; of a file only those are read.

    Raises: CheckpointError where the saved tensor's shape is not `shape`.
    """
    read: Any = getattr(state, "piece", None)
    if read is None:
        return checked_shape(name, state[name], shape).reshape(-1)[start : start + numel]
    check_shape(name, state.shape(name), shape)  # type: ignore[attr-defined]
    values: Tensor = read(name, start, numel)
    return values


def checked_shape(key: str, tensor: Tensor, shape: Sequence[int]) -> Tensor:
    """`tensor`, or CheckpointError where its shape differs."""
    check_shape(key, tensor.shape, shape)
    return tensor


def check_shape(key: str, found: Sequence[int], expected: Sequence[int]) -> None:
    """Raises: CheckpointError where the two differ."""
    if tuple(found) != tuple(expected):
        raise CheckpointError(f"{key} has shape {tuple(found)} in the checkpoint", expected=f"{tuple(expected)}")


def check_names(own: Mapping[str, Any], saved: Mapping[str, Any]) -> None:
    """Raises: CheckpointError, naming them, where saved and own weights are not the same names."""
    missing, unknown = sorted(set(own) - set(saved)), sorted(set(saved) - set(own))
    if missing or unknown:
        lists = {"missing": missing, "unknown": unknown}
        raise CheckpointError(
            f"the checkpoint is of another model: {len(missing)} weights are missing, {len(unknown)} are unknown",
            where="; ".join(f"{word}: {', '.join(names[:5])}" for word, names in lists.items() if names),
            expected="the model and objective of the recipe that wrote it",
        )
