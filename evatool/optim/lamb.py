"""LAMB whose trust ratios are those of whole tensors wherever the tensors lie, and an emulation of EVA's released runs.

Source: LAMB (arXiv 1904.00962); DeepSpeed FusedLamb as EVA ran it (docs/reference/eva.md#lamb); timm/optim/lamb.py.
"""

from __future__ import annotations

from collections.abc import Callable, Sequence
from dataclasses import dataclass
from typing import Any, overload

import torch
from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import all_reduce_sum
from evatool.distributed.engines.optimizer_state import MOMENTS, LayerwiseOptimizer, Piece, Pieces

ALIGNMENT = 2
"""DeepSpeed pads a flat group to a multiple of this many numbers a rank (`nccl_start_alignment_factor`)."""


@dataclass(frozen=True)
class _Stretch:
    """Consecutive numbers of a stepped tensor that share a trust ratio."""

    offset: int
    numel: int
    unit: int  # index of the trust ratio within the parameter group


class Lamb(LayerwiseOptimizer):
    """LAMB with one trust ratio a tensor, or a slice of a group, however the tensors are sharded over ranks.

    A step takes two passes, since the ratio needs the whole tensor's norms before any number of it may move:

        1. m <- b1 m + (1 - b1) g,   v <- b2 v + (1 - b2) g^2,   u = m / (sqrt(v) + eps) + decay p
           |p|^2 and |u|^2 of every unit (tensor or slice), summed over this rank's shards, then over ranks
        2. p <- p - lr (|p| / |u|) u

    variant "deepspeed": u = m / (sqrt(v) + eps) + decay p, the ratio |p| / |u| clamped to `trust_bounds` for every
    tensor, and p -= lr sqrt(1 - beta2^t) / (1 - beta1^t) ratio u. variant "timm": both moments are corrected inside u,
    the ratio is not clamped, and tensors without weight decay have ratio 1. A ratio is 1 where a norm is 0.

    Gradients are overwritten with the update. `grad_scale` divides them first, and where `found_inf` is set nothing
    changes, as in torch's fused optimisers; reading it makes a GPU wait once a step.

    Args:
        groups: all trainable parameters; the learning rate is 0 until it is set.
        trust_bounds: smallest and largest ratio; only of "deepspeed".
        virtual_world_size: instead of a tensor, a ratio belongs to one of this many equal slices of a parameter group
            laid out flat, as under DeepSpeed's ZeRO 1 and 2 on so many ranks.
    """

    def __init__(
        self,
        groups: Sequence[ParamGroup],
        *,
        betas: tuple[float, float],
        eps: float,
        variant: str = "deepspeed",
        trust_bounds: tuple[float, float] = (0.01, 10.0),
        virtual_world_size: int | None = None,
    ) -> None:
        settings = [
            {
                "params": group.params,
                "weight_decay": group.weight_decay,
                "num_units": virtual_world_size or len(group.params),
            }
            for group in groups
        ]
        super().__init__(settings, {"lr": 0.0, "betas": betas, "eps": eps})
        self.variant, self.trust_bounds = variant, trust_bounds
        self._homes = _homes(groups, virtual_world_size)
        self._group_of = {name: number for number, group in enumerate(groups) for name in group.param_names}
        self._is_sliced = virtual_world_size is not None
        self._stretches: dict[Tensor, list[_Stretch]] = {}
        self._is_shared = False
        named = (pair for group in groups for pair in zip(group.param_names, group.params, strict=True))
        self.place({param: [Piece(name, 0, 0, param.numel())] for name, param in named}, is_shared=False)

    def place(self, pieces: Pieces, *, is_shared: bool, is_one_by_one: bool = False) -> None:
        self._is_shared = is_shared
        self._stretches = {
            tensor: [stretch for piece in listed for stretch in self._homes[piece.name](piece)]
            for tensor, listed in pieces.items()
        }
        if is_one_by_one and self._is_sliced:
            self._refuse_sharded_slices(pieces)

    def _refuse_sharded_slices(self, pieces: Pieces) -> None:
        """ZeRO-3 steps a group above 1e9 numbers in parts, each by itself: a slice across two has no one ratio."""
        tensor_of: dict[tuple[int, int], Tensor] = {}
        for tensor, listed in pieces.items():
            for piece in listed:
                for stretch in self._homes[piece.name](piece):
                    unit = (self._group_of[piece.name], stretch.unit)
                    if tensor_of.setdefault(unit, tensor) is not tensor:
                        raise RecipeError(
                            'granularity = "flat-shard" cannot be imitated where ZeRO-3 steps a large group in parts',
                            where="optim.granularity",
                            fix='use engine.zero_stage 0 to 2, or granularity = "tensor"',
                        )

    @overload
    def step(self, closure: None = None) -> None: ...

    @overload
    def step(self, closure: Callable[[], float]) -> float: ...

    @torch.no_grad()
    def step(self, closure: Callable[[], float] | None = None) -> float | None:
        """Update every parameter that has a gradient; where tensors are divided, every rank must call it."""
        assert closure is None, "engines compute their losses before"
        found_inf = getattr(self, "found_inf", None)
        if found_inf is None or not bool(found_inf):
            for group in self.param_groups:
                params = [param for param in group["params"] if param.grad is not None]
                if params:
                    self._step_group(group, params)
        return None

    def _step_group(self, group: dict[str, Any], params: list[Tensor]) -> None:
        updates, step = self._updates(group, params)
        beta1, beta2 = group["betas"]
        lr = float(group["lr"])
        if self.variant == "deepspeed":
            lr *= (1 - beta2**step) ** 0.5 / (1 - beta1**step)
        weights, changes, units = [], [], []
        for param, update in zip(params, updates, strict=True):
            # Without a place a tensor is what a stock optimiser takes it for: one layer.
            for stretch in self._stretches.get(param, [_Stretch(0, param.numel(), 0)]):
                weights.append(param.view(-1).narrow(0, stretch.offset, stretch.numel))
                changes.append(update.view(-1).narrow(0, stretch.offset, stretch.numel))
                units.append(stretch.unit)
        factors = self._trust_ratios(group, weights, changes, units, params[0].device).mul_(-lr)
        if not weights:
            return  # this rank's slice of the group is padding
        torch._foreach_mul_(changes, list(factors.to(params[0].dtype)[units].unbind()))
        torch._foreach_add_(weights, changes)

    def _updates(self, group: dict[str, Any], params: list[Tensor]) -> tuple[list[Tensor], int]:
        """Move the moments on; returns u of every parameter, in its gradient's memory, and t."""
        beta1, beta2 = group["betas"]
        states = [self._state_of(param) for param in params]
        for state in states:
            state["step"] += 1
        step = int(states[0]["step"])
        first, second = ([state[moment] for state in states] for moment in MOMENTS)
        grads = [param.grad for param in params if param.grad is not None]
        grad_scale = getattr(self, "grad_scale", None)
        if grad_scale is not None:
            torch._foreach_div_(grads, grad_scale)
        # m <- m + (1 - beta1) (g - m), and v <- beta2 v + (1 - beta2) g^2.
        torch._foreach_lerp_(first, grads, 1 - beta1)
        torch._foreach_mul_(second, beta2)
        torch._foreach_addcmul_(second, grads, grads, 1 - beta2)
        # u takes the gradient's place, so that no memory of the model's size is needed.
        updates = grads
        torch._foreach_copy_(updates, second)
        torch._foreach_sqrt_(updates)
        # "timm" corrects both moments here; "deepspeed" has the same factors in its learning rate, and so eps weighs
        # more in early steps: it is added to sqrt(v) before v is corrected.
        if self.variant == "timm":
            torch._foreach_div_(updates, (1 - beta2**step) ** 0.5)
        torch._foreach_add_(updates, group["eps"])
        if self.variant == "timm":
            torch._foreach_mul_(updates, 1 - beta1**step)
        torch._foreach_reciprocal_(updates)
        torch._foreach_mul_(updates, first)
        if group["weight_decay"] != 0:
            torch._foreach_add_(updates, params, alpha=group["weight_decay"])
        return updates, step

    def _trust_ratios(
        self,
        group: dict[str, Any],
        weights: list[Tensor],
        updates: list[Tensor],
        units: list[int],
        device: torch.device,
    ) -> Tensor:
        """The ratio of every unit of the group, float64: pieces are summed in float64 over tensors and ranks."""
        if self.variant == "timm" and group["weight_decay"] == 0:
            return torch.ones(group["num_units"], dtype=torch.float64, device=device)
        squares = torch.zeros(2, group["num_units"], dtype=torch.float64, device=device)
        if units:
            # Several shards of one tensor add up their squares in its unit, here and over ranks.
            index = torch.tensor(units, device=device)
            for row, tensors in zip(squares, (weights, updates), strict=True):
                norms = torch._foreach_norm(tensors, 2, dtype=torch.float64)
                row.index_add_(0, index, torch.stack(norms).square())
        if self._is_shared:
            squares = all_reduce_sum(squares)
        weight, update = squares.sqrt()
        ratio = weight / update
        if self.variant == "deepspeed":
            ratio = ratio.clamp(*self.trust_bounds)
        return torch.where((weight > 0) & (update > 0), ratio, 1.0)

    def _state_of(self, param: Tensor) -> dict[str, Any]:
        state: dict[str, Any] = self.state[param]
        if not state:
            state["step"] = torch.zeros((), dtype=torch.float32)
            state |= {moment: torch.zeros_like(param) for moment in MOMENTS}
        return state


def _homes(
    groups: Sequence[ParamGroup], virtual_world_size: int | None
) -> dict[str, Callable[[Piece], list[_Stretch]]]:
    """Parameter name -> how a piece of it is cut into stretches of one trust ratio each."""
    homes: dict[str, Callable[[Piece], list[_Stretch]]] = {}
    for group in groups:
        aligned = ALIGNMENT * (virtual_world_size or 1)
        total = sum(param.numel() for param in group.params)
        slice_size = -(-total // aligned) * aligned // (virtual_world_size or 1)
        start = 0
        for unit, (name, param) in enumerate(zip(group.param_names, group.params, strict=True)):
            homes[name] = _whole(unit) if virtual_world_size is None else _sliced(start, slice_size)
            start += param.numel()
    return homes


def _whole(unit: int) -> Callable[[Piece], list[_Stretch]]:
    return lambda piece: [_Stretch(piece.offset, piece.numel, unit)]


def _sliced(param_start: int, slice_size: int) -> Callable[[Piece], list[_Stretch]]:
    def cut(piece: Piece) -> list[_Stretch]:
        stretches, done = [], 0
        while done < piece.numel:
            place = param_start + piece.start + done
            length = min(piece.numel - done, slice_size - place % slice_size)
            stretches.append(_Stretch(piece.offset + done, length, place // slice_size))
            done += length
        return stretches

    return cut
