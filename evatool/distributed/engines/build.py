"""The recipe's engine: one process, PyTorch's replicated or sharded data parallelism, or DeepSpeed's ZeRO."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import nn

from evatool.core.errors import RecipeError
from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.base import Bounds as Bounds
from evatool.distributed.engines.base import Engine as Engine
from evatool.distributed.engines.blocks import checkpoint_blocks, compile_blocks
from evatool.distributed.engines.ddp import DdpEngine
from evatool.distributed.engines.deepspeed import DeepSpeedEngine
from evatool.distributed.engines.fsdp import FsdpEngine
from evatool.distributed.world import World
from evatool.recipe.schema import EngineSection


def engine_kind(section: EngineSection, world_size: int) -> str:
    """ "single", "ddp", "fsdp2" or "deepspeed" for this many ranks.

    Raises: RecipeError where the recipe's engine cannot serve them.
    """
    match section.kind:
        case "auto":
            return "single" if world_size == 1 else "fsdp2"
        case "single" if world_size > 1:
            raise RecipeError(
                f'engine.kind = "single" runs in one process, but this job has {world_size}',
                where="engine.kind",
                fix='use engine.kind = "fsdp2" (or "auto"), or start one process',
            )
        case kind:
            return kind


def shards_weights(section: EngineSection, world_size: int) -> bool:
    """True where each rank holds a part of the weights only. Raises: RecipeError as `engine_kind`."""
    kind = engine_kind(section, world_size)
    return kind == "fsdp2" or (kind == "deepspeed" and section.zero_stage == 3)


def build_engine(
    section: EngineSection,
    world: World,
    objective: nn.Module,
    groups: Sequence[ParamGroup],
    *,
    precision: str,
    grad_clip_norm: float | None,
    optimizer: torch.optim.Optimizer,
    bounds: Bounds,
) -> Engine:
    """The recipe's engine around an objective, which it moves to the rank's device.

    Args:
        groups: all trainable parameters of `objective`, from `optim.param_groups`; where an engine divides parameters
            over ranks, `params` holds this rank's pieces from here on.
        precision: "fp32", "bf16" or "fp16" (autocast; weights, gradients and optimiser stay float32).
        optimizer: of these groups, from `optim.build`.
        bounds: parameters kept within limits after each step, by their names in `objective`: its `parameter_bounds`
            (for instance {"model.logit_scale": (0, ln 100)}).
    Raises: RecipeError where the engine cannot serve this job; DependencyError where its package is missing.
    """
    unknown = set(bounds) - {name for name, _ in objective.named_parameters()}
    assert not unknown, f"bounds of parameters that do not exist: {sorted(unknown)}"
    kind = engine_kind(section, world.world_size)
    _refuse_frozen_weights(section, kind, objective)
    if section.activation_checkpointing != "none":
        checkpoint_blocks(objective, section.activation_checkpointing)
    if section.compile:
        compile_blocks(objective, world.device)
    shared: dict[str, Any] = {
        "precision": precision,
        "grad_clip_norm": grad_clip_norm,
        "optimizer": optimizer,
        "bounds": bounds,
    }
    match kind:
        case "deepspeed":
            return DeepSpeedEngine(
                world, objective, groups, zero_stage=section.zero_stage, offload=section.offload, **shared
            )
        case "fsdp2":
            return FsdpEngine(world, objective, groups, **shared)
        case _:
            return DdpEngine(world, objective, groups, **shared)


def _refuse_frozen_weights(section: EngineSection, kind: str, objective: nn.Module) -> None:
    """Source: https://github.com/huggingface/transformers/issues/47254 and DeepSpeed pull requests 8130 and 8148."""
    if kind != "deepspeed" or section.zero_stage < 3 or section.activation_checkpointing == "none":
        return
    frozen = [name for name, param in objective.named_parameters() if not param.requires_grad]
    if frozen:
        raise RecipeError(
            f"{len(frozen)} weights are locked ({frozen[0]}, ...), and ZeRO-3 cannot recompute blocks with locked "
            "weights",
            where="engine.activation_checkpointing",
            fix='use engine.kind = "fsdp2" or engine.zero_stage 0 to 2, or engine.activation_checkpointing = "none"',
        )
