"""Engine with whole weights on every rank: one process, or several through DistributedDataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Iterator, Mapping, Sequence
from contextlib import contextmanager
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from evatool.core.batch import Batch, LossDict
from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.amp import LossScale, autocast, poisoned_if_not_finite
from evatool.distributed.engines.base import Bounds, Engine
from evatool.distributed.engines.blocks import has_no_weights, materialize
from evatool.distributed.engines.optimizer_state import (
    LayerwiseOptimizer,
    Pieces,
    load_moments,
    sharded_moments,
    step_instead,
    whole_pieces,
)
from evatool.distributed.engines.sharded_state import ShardedState, check_names, checked_shape
from evatool.distributed.world import World


class DdpEngine(Engine):
    """Weights, gradients and moments are whole on every rank; gradients are averaged while backward runs.

    `FsdpEngine` divides them and steps its pieces in the same way.
    """

    def __init__(
        self,
        world: World,
        objective: nn.Module,
        groups: Sequence[ParamGroup],
        *,
        precision: str,
        grad_clip_norm: float | None,
        optimizer: torch.optim.Optimizer,
        bounds: Bounds,
    ) -> None:
        self.device = world.device
        self._is_writer = world.is_main
        self._precision = precision
        self._scale = LossScale(world.device) if precision == "fp16" else None
        self._grad_clip_norm = grad_clip_norm
        self._optimizer = optimizer
        self._trained = {name: param.shape for g in groups for name, param in zip(g.param_names, g.params, strict=True)}
        self.module = objective
        self._wrapped, self._pieces = self._wrap(world, groups)
        own = self._stepped_by_name(bounds)
        self._bounded = [(own[name], low, high) for name, (low, high) in bounds.items() if name in own]

    def _wrap(self, world: World, groups: Sequence[ParamGroup]) -> tuple[nn.Module, Pieces]:
        """The module that computes on all ranks, and what the optimiser steps."""
        if has_no_weights(self.module):
            materialize(self.module, world.device)
            step_instead(self._optimizer, groups, dict(self.module.named_parameters()))
            if isinstance(self._optimizer, LayerwiseOptimizer):
                self._optimizer.place(whole_pieces(groups), is_shared=False)
        self.module.to(world.device)
        return (_replicated(self.module) if world.world_size > 1 else self.module), whole_pieces(groups)

    def _stepped_by_name(self, names: Mapping[str, Any]) -> dict[str, Tensor]:
        """The tensors that hold this rank's numbers of these parameters, frozen ones too."""
        named = dict(self.module.named_parameters())
        return {name: named[name] for name in names}

    def forward(self, batch: Batch, **options: Any) -> LossDict:
        with autocast(self._precision, self.device):
            losses: LossDict = self._wrapped(batch.to(self.device), **options)
            return losses

    def backward(self, loss: Tensor) -> None:
        loss = poisoned_if_not_finite(loss)
        (loss if self._scale is None else loss * self._scale.value.to(loss.dtype).squeeze(0)).backward()

    @contextmanager
    def no_sync(self) -> Iterator[None]:
        if isinstance(self._wrapped, DistributedDataParallel):
            with self._wrapped.no_sync():
                yield
        else:
            yield

    def step(self) -> Tensor:
        norm = self._gradient_norm()
        optimizer: Any = self._optimizer
        # The kernels divide by grad_scale and change nothing where found_inf is 1: no sync on a GPU.
        divisor = torch.ones((), device=self.device) if self._scale is None else self._scale.value.squeeze(0)
        norm = norm / divisor
        if self._grad_clip_norm is not None:
            divisor = divisor * torch.clamp(norm / self._grad_clip_norm, min=1.0).float()
        if self._scale is not None or self._grad_clip_norm is not None:
            optimizer.grad_scale = divisor.float()
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        if self._scale is not None:
            self._scale.update(optimizer.found_inf)
        self._drop_gradients()
        with torch.no_grad():
            for tensor, low, high in self._bounded:
                tensor.clamp_(low, high)
        return norm

    def _gradient_norm(self) -> Tensor:
        """Norm of the reduced gradients, which are where the optimiser finds them from here on."""
        return get_total_norm([tensor.grad for tensor in self._pieces if tensor.grad is not None])

    def _drop_gradients(self) -> None:
        self._optimizer.zero_grad(set_to_none=True)

    def set_lrs(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    @contextmanager
    def summon_full_weights(self) -> Iterator[None]:
        yield

    def replicated_tensors(self) -> list[Tensor]:
        return [tensor.detach() for tensor in self.module.state_dict().values()]

    def sharded_tensors(self) -> list[Tensor]:
        return []

    def sharded_model_state(self) -> ShardedState:
        return ShardedState.whole(self.module.state_dict(), is_writer=self._is_writer)

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        check_names(own, state)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(checked_shape(name, state[name], tensor.shape))

    def sharded_optimizer_state(self) -> ShardedState:
        stepped = {tensor: listed for tensor, listed in self._pieces.items() if self._optimizer.state.get(tensor)}
        shapes = {piece.name: self._trained[piece.name] for listed in stepped.values() for piece in listed}
        return self._with_scale(sharded_moments(self._optimizer, stepped, shapes, is_writer=self._is_writer))

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        load_moments(self._optimizer, self._pieces, self._trained, state)
        if self._scale is not None:
            self._scale.load(state)

    def _with_scale(self, state: ShardedState) -> ShardedState:
        if self._scale is None:
            return state
        return state.merged(ShardedState.whole(self._scale.state(), is_writer=self._is_writer))


def _replicated(objective: nn.Module) -> nn.Module:
    # No device_ids: the batch is moved by the engine. Buffers are constants and need no broadcast; newer torch has
    # another word for that, older torch only this one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)
