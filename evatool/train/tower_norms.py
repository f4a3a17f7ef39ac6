"""The gradient norm of each tower, under every engine."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor

from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import all_reduce_sum


class TowerNorms:
    """Looks at gradients where the optimiser finds them, in the steps for which it is asked.

    There they may be pieces, clipped or scaled, by the same factor all: so only each tower's share is taken, and the
    norm of the whole is the engine's.

    Args:
        optimizer: stepped by the engine, with one group for each of `groups`.
    """

    def __init__(self, optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup]) -> None:
        self._towers = [group.tower for group in groups]
        # Said in the groups themselves: DeepSpeed's ZeRO-1 and 2 step one of them at a time.
        for tower, group in zip(self._towers, optimizer.param_groups, strict=True):
            group["tower"] = tower
        self._squares: dict[str, Tensor] = {}
        self._is_read = False
        optimizer.register_step_pre_hook(self._look)

    def start_step(self, *, is_read: bool) -> None:
        """Say before an optimiser step whether `read` will be called after it; only then gradients are looked at."""
        self._is_read = is_read

    def _look(self, optimizer: torch.optim.Optimizer, *_: Any) -> None:
        if not self._is_read:
            return
        for group in optimizer.param_groups:
            tower = group["tower"]
            grads = [param.grad for param in group["params"] if param.grad is not None]
            if grads:
                square = torch.stack(torch._foreach_norm(grads, dtype=torch.float64)).square().sum()
                self._squares[tower] = self._squares.get(tower, torch.zeros_like(square)) + square

    def read(self, whole: Tensor) -> dict[str, Tensor]:
        """Norm by tower of the step just done, whose whole norm is `whole`; every rank must call it after such a step.

        Empty where the step was skipped before the optimiser saw it.
        """
        towers = list(dict.fromkeys(self._towers))
        zero = torch.zeros((), dtype=torch.float64, device=whole.device)
        squares = all_reduce_sum(torch.stack([self._squares.get(tower, zero).to(whole.device) for tower in towers]))
        was_seen = bool(self._squares)
        self._squares = {}
        if not was_seen:
            return {}
        shares = (squares / squares.sum()).sqrt()
        return {tower: whole.double() * share for tower, share in zip(towers, shares, strict=True)}
