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

from evatool.core.errors import CheckpointError
from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import rank
from evatool.distributed.engines.sharded_state import ShardedState, read_piece

MOMENTS = ("exp_avg", "exp_avg_sq")
NUM_UPDATES = "num_updates"  # int64 (1,): updates done, without the skipped ones; the bias correction's t


@dataclass(frozen=True)
class Piece:
    """Consecutive numbers of one parameter within a tensor that an optimiser steps."""

    name: str  # the parameter's
    start: int  # of the first number within the flat parameter
    offset: int  # of the first number within the stepped tensor
    numel: int


Pieces = Mapping[Tensor, Sequence[Piece]]
"""What each tensor that an optimiser steps on this rank consists of; what no piece covers is padding."""


class LayerwiseOptimizer(torch.optim.Optimizer, ABC):
    """An optimiser whose step depends on which numbers make up a layer, which flat pieces of groups do not tell."""

    @abstractmethod
    def place(self, pieces: Pieces, *, is_shared: bool, is_one_by_one: bool = False) -> None:
        """Say what the tensors that are stepped consist of; what no piece covers is padding and stays as it is.

        Args:
            is_shared: other ranks step other pieces of the same parameters.
            is_one_by_one: `step` is called for each tensor by itself, the others without gradient.
        """


def step_instead(optimizer: torch.optim.Optimizer, groups: Sequence[ParamGroup], tensors: Mapping[str, Tensor]) -> None:
    """Let the optimiser step these tensors, by name, instead of the groups' parameters; the groups hold them after."""
    for settings, group in zip(optimizer.param_groups, groups, strict=True):
        group.params[:] = [tensors[name] for name in group.param_names]
        settings["params"] = list(group.params)


def whole_pieces(groups: Sequence[ParamGroup]) -> dict[Tensor, list[Piece]]:
    """Where every parameter is stepped as it is."""
    named = (pair for group in groups for pair in zip(group.param_names, group.params, strict=True))
    return {param: [Piece(name, 0, 0, param.numel())] for name, param in named}


def create_moments(optimizer: torch.optim.Optimizer, pieces: Pieces) -> None:
    """Moments from the start rather than from the first step, so that a resumed run can be put into them."""
    for tensor in pieces:
        moments = {moment: torch.zeros_like(tensor) for moment in MOMENTS}
        optimizer.state[tensor] = {"step": torch.zeros((), dtype=torch.float32, device=tensor.device), **moments}


def moments_of(optimizer: torch.optim.Optimizer, pieces: Pieces) -> list[Tensor]:
    """Both moments of every tensor that is stepped and has them."""
    states = [optimizer.state[tensor] for tensor in pieces if optimizer.state.get(tensor)]
    return [state[moment] for state in states for moment in MOMENTS if moment in state]


def sharded_moments(
    optimizer: torch.optim.Optimizer, pieces: Pieces, shapes: Mapping[str, Sequence[int]], *, is_writer: bool
) -> ShardedState:
    """`exp_avg.<name>` and `exp_avg_sq.<name>` of every parameter that has them, and `num_updates`.

    Args:
        shapes: of the parameters that have moments on some rank, the same on every rank.
        is_writer: this rank writes its moments; `num_updates` is written by rank 0 alone.
    """
    moments = ShardedState()
    num_updates = 0
    for name, shape in shapes.items():
        for moment in MOMENTS:
            moments.declare(f"{moment}.{name}", shape, torch.float32)
    for tensor, listed in pieces.items():
        state = optimizer.state.get(tensor)
        if not state:
            continue
        num_updates = max(num_updates, int(state["step"]))
        for piece in listed:
            for moment in MOMENTS:
                key = f"{moment}.{piece.name}"
                moments.dtypes[key] = state[moment].dtype
                if is_writer:
                    moments.add(key, piece.start, state[moment].view(-1).narrow(0, piece.offset, piece.numel))
    return moments.merged(ShardedState.whole({NUM_UPDATES: torch.tensor([num_updates])}, is_writer=rank() == 0))


def load_moments(
    optimizer: torch.optim.Optimizer,
    pieces: Pieces,
    shapes: Mapping[str, Sequence[int]],
    saved: Mapping[str, Tensor],
) -> None:
    """Put saved moments back; parameters without saved ones start afresh.

    Args:
        shapes: of all parameters that are trained.
        saved: from any engine; of a file only this rank's pieces are read. Keys of a loss scale are left alone.
    Raises: CheckpointError if a saved moment belongs to no parameter or has another shape.
    """
    known = {f"{moment}.{name}" for name in shapes for moment in MOMENTS}
    unknown = sorted(key for key in saved if key.startswith(tuple(f"{m}." for m in MOMENTS)) and key not in known)
    if unknown or NUM_UPDATES not in saved:
        raise CheckpointError(
            f"optimiser state of unknown parameters: {', '.join(unknown[:5])}"
            + (f" and {len(unknown) - 5} more" if len(unknown) > 5 else "")
            if unknown
            else f"the optimiser state has no {NUM_UPDATES}",
            expected="the same model as the one that was saved",
        )
    num_updates = float(saved[NUM_UPDATES])
    for tensor, listed in pieces.items():
        present = [piece for piece in listed if f"{MOMENTS[0]}.{piece.name}" in saved]
        if listed and not present:
            continue
        state = optimizer.state[tensor]
        for moment in MOMENTS:
            if moment not in state:
                state[moment] = torch.zeros_like(tensor)
            for piece in present:
                key = f"{moment}.{piece.name}"
                values = read_piece(saved, key, piece.start, piece.numel, shapes[piece.name])
                state[moment].view(-1).narrow(0, piece.offset, piece.numel).copy_(values)
        if "step" in state:
            state["step"].fill_(num_updates)
        else:
            state["step"] = torch.tensor(num_updates, dtype=torch.float32, device=tensor.device)
