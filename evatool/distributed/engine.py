"""One face for all ways to carry out a training step; stages and trainer never see which one is behind it."""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Mapping, Sequence
from contextlib import AbstractContextManager, nullcontext

import torch
from torch import Tensor, nn

from evatool.distributed.world import World
from evatool.errors import RecipeError
from evatool.recipe.schema import EngineSection
from evatool.types import Batch, LossDict, ParamGroup

Bounds = Mapping[str, tuple[float, float]]
"""Parameter name -> (low, high), held in the optimiser's own copy after every step."""


class Engine(ABC):
    """Forward, backward and optimiser step of an objective over all ranks; every rank calls every method.

    A step is `set_lrs`, `forward`, `backward`, `step`. Gradients are means over ranks. Where the loss or a gradient is
    not finite on any rank, no rank's weights or moments change and `step` returns a norm that is not finite.

    States are by parameter name, whole and float32, on the CPU, the same for every engine and world size, so any
    engine resumes another's.

    Attributes:
        module: the objective, not wrapped.
        device: where it lives.
    """

    module: nn.Module
    device: torch.device

    @abstractmethod
    def forward(self, batch: Batch) -> LossDict:
        """Losses of this rank's batch, which may still be on the CPU."""

    @abstractmethod
    def backward(self, loss: Tensor) -> None:
        """Gradients of this rank's loss."""

    @abstractmethod
    def step(self) -> Tensor:
        """Clip and update; returns the gradient norm before clipping, a scalar tensor, the same on every rank."""

    @abstractmethod
    def set_lrs(self, lrs: Sequence[float]) -> None:
        """Learning rate of each group for the next step, in the order of the groups."""

    @abstractmethod
    def model_state(self) -> dict[str, Tensor]:
        """Parameters and persistent buffers under the objective's `state_dict()` names; may alias live weights."""

    @abstractmethod
    def load_model_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `model_state()` back. Raises: CheckpointError on missing or unknown names and other shapes."""

    @abstractmethod
    def optimizer_state(self) -> dict[str, Tensor]:
        """`exp_avg.<name>`, `exp_avg_sq.<name>` and `num_updates`; may alias live state."""

    @abstractmethod
    def load_optimizer_state(self, state: Mapping[str, Tensor]) -> None:
        """Put `optimizer_state()` back. Raises: CheckpointError if it is of another model."""


def engine_kind(section: EngineSection, world_size: int) -> str:
    """ "single", "ddp" or "deepspeed" for this many ranks.

    Raises: RecipeError where the recipe's engine cannot serve them.
    """
    match section.kind:
        case "auto":
            return "single" if world_size == 1 else "ddp"
        case "single" if world_size > 1:
            raise RecipeError(
                f'engine.kind = "single" runs in one process, but this job has {world_size}',
                where="engine.kind",
                fix='use engine.kind = "ddp" (or "auto"), or start one process',
            )
        case kind:
            return kind


def build_engine(
    section: EngineSection,
    world: World,
    objective: nn.Module,
    groups: Sequence[ParamGroup],
    *,
    precision: str,
    grad_clip_norm: float | None,
    optimizer: torch.optim.Optimizer,
    bounds: Bounds | None = None,
) -> Engine:
    """The recipe's engine around an objective, which it moves to the rank's device.

    Args:
        groups: all trainable parameters of `objective`, from `optim.param_groups`.
        precision: "fp32" or "bf16" (autocast; weights, gradients and optimiser stay float32).
        optimizer: of these groups, from `optim.build`.
        bounds: parameters kept within limits after each step, by their names in `objective`; its attribute
            `parameter_bounds` when absent, if it has one (for instance {"model.logit_scale": (0, ln 100)}).
    Raises: RecipeError where the engine cannot serve this job; DependencyError where its package is missing.
    """
    bounds = bounds if bounds is not None else getattr(objective, "parameter_bounds", {})
    unknown = set(bounds) - {name for name, _ in objective.named_parameters()}
    assert not unknown, f"bounds of parameters that do not exist: {sorted(unknown)}"
    match engine_kind(section, world.world_size):
        case "deepspeed":
            from evatool.distributed.zero import ZeroEngine

            return ZeroEngine(
                world,
                objective,
                groups,
                zero_stage=section.zero_stage,
                precision=precision,
                grad_clip_norm=grad_clip_norm,
                optimizer=optimizer,
                bounds=bounds,
            )
        case _:
            from evatool.distributed.replicated import ReplicatedEngine

            return ReplicatedEngine(
                world,
                objective,
                groups,
                precision=precision,
                grad_clip_norm=grad_clip_norm,
                optimizer=optimizer,
                bounds=bounds,
            )


def autocast(precision: str, device: torch.device) -> AbstractContextManager[object]:
    """Arithmetic of the forward pass: bf16 where `precision` says so, else as the tensors are."""
    return torch.autocast(device.type, dtype=torch.bfloat16) if precision == "bf16" else nullcontext()


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """`loss`, with a gradient of NaN if it is not finite.

    So a bad loss on one rank always makes the reduced gradients bad on every rank, and all skip the same step without
    an exchange of flags and without the CPU waiting for the GPU.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
    return loss * factor.to(loss.dtype)
