"""Engine with whole weights on every rank: one process, or several through DistributedDataParallel."""

from __future__ import annotations

import warnings
from collections.abc import Mapping, Sequence
from typing import Any

import torch
from torch import Tensor, nn
from torch.nn.parallel import DistributedDataParallel
from torch.nn.utils import get_total_norm

from evatool.distributed.engine import Bounds, Engine, autocast, poisoned_if_not_finite
from evatool.distributed.optimizer import checked_shape, load_moments, moments_of
from evatool.distributed.world import World
from evatool.errors import CheckpointError
from evatool.types import Batch, LossDict, ParamGroup


class ReplicatedEngine(Engine):
    """Weights, gradients and moments are whole on every rank; gradients are averaged while backward runs."""

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
        self.module = objective.to(world.device)
        self._groups = groups
        self._params = [param for group in groups for param in group.params]
        self._precision = precision
        self._grad_clip_norm = grad_clip_norm
        self._optimizer = optimizer
        named = dict(objective.named_parameters())
        self._bounded = [(named[name], low, high) for name, (low, high) in bounds.items()]
        self._wrapped = _replicated(objective) if world.world_size > 1 else objective

    def forward(self, batch: Batch) -> LossDict:
        with autocast(self._precision, self.device):
            return self._wrapped(batch.to(self.device))

    def backward(self, loss: Tensor) -> None:
        poisoned_if_not_finite(loss).backward()

    def step(self) -> Tensor:
        norm = get_total_norm([param.grad for param in self._params if param.grad is not None])
        optimizer: Any = self._optimizer
        # AdamW's kernel divides by grad_scale and changes nothing where found_inf is 1: no sync on a GPU.
        if self._grad_clip_norm is not None:
            optimizer.grad_scale = torch.clamp(norm / self._grad_clip_norm, min=1.0).float()
        optimizer.found_inf = (~torch.isfinite(norm)).float()
        optimizer.step()
        optimizer.zero_grad(set_to_none=True)
        with torch.no_grad():
            for param, low, high in self._bounded:
                param.clamp_(low, high)
        return norm

    def set_lrs(self, lrs: Sequence[float]) -> None:
        for group, lr in zip(self._optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr

    def model_state(self) -> dict[str, Tensor]:
        return {name: tensor.detach().cpu() for name, tensor in self.module.state_dict().items()}

    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        own = self.module.state_dict()
        check_names(own, state)
        with torch.no_grad():
            for name, tensor in own.items():
                tensor.copy_(checked_shape(name, state[name], tensor.shape))

    def optimizer_state(self) -> dict[str, Tensor]:
        return {name: tensor.cpu() for name, tensor in moments_of(self._optimizer, self._groups).items()}

    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        load_moments(self._optimizer, self._groups, state)


def _replicated(objective: nn.Module) -> nn.Module:
    # No device_ids: the batch is moved by the engine. Buffers are constants and need no broadcast; newer torch has
    # another word for that, older torch only this one.
    with warnings.catch_warnings():
        warnings.simplefilter("ignore", FutureWarning)
        return DistributedDataParallel(objective, broadcast_buffers=False, gradient_as_bucket_view=True)


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
