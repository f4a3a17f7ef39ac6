"""What engines and optimisers agree on: state by parameter name, and where the pieces of a parameter lie.

An optimiser has moments `exp_avg` and `exp_avg_sq` and a `step` for each tensor. It divides gradients by its attribute
`grad_scale` and changes nothing where its attribute `found_inf` is 1, as torch's fused ones do.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from dataclasses import dataclass

import torch
from torch import Tensor

from evatool.errors import CheckpointError
from evatool.types import ParamGroup

MOMENTS = ("exp_avg", "exp_avg_sq")
NUM_UPDATES = "num_updates"  # int64 (1,): updates done, without the skipped ones; the bias correction's t


@dataclass(frozen=True)
class Piece:
    """Consecutive numbers of one parameter within a tensor that an optimiser steps."""

    name: str  # the parameter's
    start: int  # of the first number within the flat parameter
    offset: int  # of the first number within the stepped tensor
    numel: int


class LayerwiseOptimizer(torch.optim.Optimizer, ABC):
    """An optimiser whose step depends on which numbers make up a layer, which flat pieces of groups do not tell."""

    @abstractmethod
    def place(self, pieces: Mapping[Tensor, Sequence[Piece]], *, is_shared: bool) -> None:
        """Say what the tensors that are stepped consist of; what no piece covers is padding and stays as it is.

        Args:
            is_shared: other ranks step other pieces of the same parameters.
        """


def moments_of(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup]) -> dict[str, Tensor]:
    """`exp_avg.<name>` and `exp_avg_sq.<name>` of every parameter that was ever stepped, and `num_updates`."""
    tensors: dict[str, Tensor] = {}
    num_updates = 0
    for group in groups:
        for name, param in zip(group.param_names, group.params, strict=True):
            state = optimizer.state.get(param)
            if not state:
                continue
            tensors.update({f"{moment}.{name}": state[moment] for moment in MOMENTS})
            num_updates = max(num_updates, int(state["step"]))
    tensors[NUM_UPDATES] = torch.tensor([num_updates])
    return tensors


def load_moments(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], tensors: Mapping[str, Tensor]) -> None:
    """Put saved moments back; parameters without saved ones start afresh.

    Raises: CheckpointError if a saved moment belongs to no parameter or has another shape.
    """
    num_updates = int(tensors[NUM_UPDATES])
    unused = set(tensors) - {NUM_UPDATES}
    for group in groups:
        for name, param in zip(group.param_names, group.params, strict=True):
            if f"{MOMENTS[0]}.{name}" not in tensors:
                continue
            state = optimizer.state[param]
            for moment in MOMENTS:
                key = f"{moment}.{name}"
                unused.discard(key)
                state[moment] = torch.empty_like(param).copy_(checked_shape(key, tensors[key], param.shape))
            state["step"] = torch.tensor(float(num_updates), dtype=torch.float32, device=param.device)
    if unused:
        raise CheckpointError(
            f"optimiser state of unknown parameters: {', '.join(sorted(unused)[:5])}"
            + (f" and {len(unused) - 5} more" if len(unused) > 5 else ""),
            expected="the same model as the one that was saved",
        )


def checked_shape(key: str, tensor: Tensor, shape: torch.Size) -> Tensor:
    """`tensor`, or CheckpointError where its shape differs."""
    if tensor.shape != shape:
        raise CheckpointError(f"{key} has shape {tuple(tensor.shape)} in the checkpoint", expected=f"{tuple(shape)}")
    return tensor
