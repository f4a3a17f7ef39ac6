"""Engine that divides weights, gradients and moments over ranks: PyTorch's own `fully_shard` (FSDP2).

Each rank holds consecutive rows of every parameter. Weights come together a block at a time for forward and backward;
the optimiser steps each rank's rows as plain tensors, so it is the same one as on a single process.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.distributed.device_mesh import DeviceMesh, init_device_mesh
from torch.distributed.fsdp import FSDPModule, fully_shard
from torch.distributed.tensor import DTensor, Shard
from torch.nn.utils import get_total_norm

from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import all_reduce_sum
from evatool.distributed.engines.blocks import blocks_of, has_no_weights, materialize
from evatool.distributed.engines.ddp import DdpEngine
from evatool.distributed.engines.optimizer_state import (
    LayerwiseOptimizer,
    Piece,
    Pieces,
    create_moments,
    moments_of,
    sharded_moments,
    step_instead,
)
from evatool.distributed.engines.sharded_state import ShardedState, check_names, read_piece
from evatool.distributed.world import World


class FsdpEngine(DdpEngine):
    """`fully_shard` on every transformer block and on what is left of the objective."""

    _root: FSDPModule

    def _wrap(self, world: World, groups: Sequence[ParamGroup]) -> tuple[nn.Module, Pieces]:
        mesh = init_device_mesh(world.device.type, (world.world_size,))
        is_empty = has_no_weights(self.module)
        if not is_empty:
            self.module.to(world.device)
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self.module.state_dict().items()}
        for part in [*blocks_of(self.module), self.module]:
            fully_shard(part, mesh=mesh, shard_placement_fn=lambda param: _placement(param, mesh.size()))
        if is_empty:
            materialize(self.module, world.device)
        assert isinstance(self.module, FSDPModule)
        self._root = self.module
        # Outside of forward and backward passes these are the module's parameters; the objects stay the same.
        self._sharded: dict[str, DTensor] = dict(self.module.named_parameters())  # type: ignore[arg-type]
        self._local = {name: param.to_local().detach() for name, param in self._sharded.items()}
        step_instead(self._optimizer, groups, self._local)
        pieces: dict[Tensor, list[Piece]] = {
            self._local[name]: [piece] if (piece := self._piece(name, mesh)).numel else []
            for group in groups
            for name in group.param_names
        }
        create_moments(self._optimizer, pieces)
        if isinstance(self._optimizer, LayerwiseOptimizer):
            self._optimizer.place(pieces, is_shared=True)
        return self.module, pieces

    def _piece(self, name: str, mesh: DeviceMesh) -> Piece:
        """Rows of a parameter on this rank, as numbers of the flat parameter."""
        param, local = self._sharded[name], self._local[name]
        placement = param.placements[0]
        assert isinstance(placement, Shard)
        rows = param.shape[placement.dim]  # all axes before are 1, so rows are consecutive numbers
        row_size = param.numel() // rows
        each = -(-rows // mesh.size())
        start = min(each * mesh.get_local_rank(), rows) * row_size
        return Piece(name, start, 0, local.numel())

    def _stepped_by_name(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        return {name: self._local[name] for name in names}

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        self._root.set_requires_gradient_sync(False)
        try:
            yield
        finally:
            self._root.set_requires_gradient_sync(True)

    def _gradient_norm(self) -> Tensor:
        for name, local in self._local.items():
            grad = self._sharded[name].grad
            local.grad = None if grad is None else grad.to_local()  # type: ignore[attr-defined]
        norm = get_total_norm([tensor.grad for tensor in self._pieces if tensor.grad is not None])
        return all_reduce_sum(norm.to(self.device).square()).sqrt()

    def _drop_gradients(self) -> None:
        for name, local in self._local.items():
            local.grad = self._sharded[name].grad = None

    @contextmanager
    def summon_full_weights(self) -> Iterator[None]:
        self._root.unshard()
        try:
            yield
        finally:
            self._root.reshard()

    def replicated_tensors(self) -> list[Tensor]:
        return [buffer.detach() for buffer in self.module.buffers()]

    def sharded_tensors(self) -> list[Tensor]:
        return [*self._local.values(), *moments_of(self._optimizer, self._pieces)]

    def _own_tensors(self) -> Iterator[tuple[str, Tensor, Piece | None]]:
        """State names with this rank's tensor, and which numbers it is of a parameter; buffers are whole."""
        buffers = dict(self.module.named_buffers())
        mesh = next(iter(self._sharded.values())).device_mesh
        for name in self._shapes:
            if name in self._sharded:
                yield name, self._local[name], self._piece(name, mesh)
            else:
                yield name, buffers[name], None

    def sharded_model_state(self) -> ShardedState:
        state = ShardedState()
        for name, tensor, piece in self._own_tensors():
            state.declare(name, self._shapes[name], tensor.dtype)
            if piece is not None:
                state.add(name, piece.start, tensor)
            elif self._is_writer:
                state.add(name, 0, tensor)
        return state

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        check_names(self._shapes, state)
        with torch.no_grad():
            for name, tensor, piece in self._own_tensors():
                start, numel = (piece.start, piece.numel) if piece is not None else (0, tensor.numel())
                tensor.view(-1).copy_(read_piece(state, name, start, numel, self._shapes[name]))

    def sharded_optimizer_state(self) -> ShardedState:
        state = sharded_moments(self._optimizer, self._pieces, self._trained, is_writer=True)
        return self._with_scale(state)


def _placement(param: nn.Parameter, num_ranks: int) -> Shard | None:
    """Along the first axis that is longer than 1, where it divides; class token and positions have a 1 before it."""
    axis = next((axis for axis, size in enumerate(param.shape) if size > 1), 0)
    return Shard(axis) if axis > 0 and param.shape[axis] % num_ranks == 0 else None
