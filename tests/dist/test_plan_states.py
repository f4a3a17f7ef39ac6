"""What `evatool plan` says of weights, gradients and optimiser, against the bytes that real ranks hold."""

from __future__ import annotations

import math
from collections.abc import Iterable
from dataclasses import dataclass, replace
from types import SimpleNamespace
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import toy_optim

from evatool.distributed.collectives import rank as own_rank
from evatool.distributed.collectives import world_size
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.optim.build import build_optimizer
from evatool.optim.locking import lock
from evatool.optim.param_groups import build_param_groups
from evatool.plan.engines import Setup, average_bytes, fsdp2_states, states, zero_buckets
from evatool.plan.memory import FP32, NUMERICS, model_buffers
from evatool.recipe.schema import EngineSection, InfoNceObjective
from evatool.train.hooks.ema import WeightAverage
from evatool.core.batch import Batch

pytestmark = pytest.mark.dist

B = 2


@dataclass(frozen=True)
class Cell:
    """One engine; `is_locked` freezes the image tower but its projection, and a block of the text tower."""

    kind: str
    stage: int = 0
    offload: str = "none"
    is_locked: bool = False

    @property
    def setup(self) -> Setup:
        """As the plan names it, on as many ranks as there are."""
        return Setup(self.kind, self.stage, self.offload, on_gpu=False)  # type: ignore[arg-type]


COVERING = [Cell("ddp"), Cell("fsdp2", is_locked=True), Cell("deepspeed", 2), Cell("deepspeed", 3, "optimizer")]
ENGINES = [Cell("ddp"), Cell("fsdp2"), *(Cell("deepspeed", stage) for stage in range(4))]
OFFLOADED = [*(Cell("deepspeed", n, "optimizer") for n in (1, 2, 3)), Cell("deepspeed", 3, "optimizer-and-weights")]
ALL = [*ENGINES, *(replace(cell, is_locked=True) for cell in ENGINES), *OFFLOADED]
ALL += [replace(cell, is_locked=True) for cell in OFFLOADED]


def num_bytes(tensors: Iterable[Tensor]) -> int:
    """Bytes behind tensors, each storage once."""
    found = {tensor.untyped_storage()._cdata: tensor.untyped_storage().nbytes() for tensor in tensors}
    return sum(found.values())


def pieces(value: Any) -> list[Tensor]:
    """All tensors of DeepSpeed's nested lists."""
    if isinstance(value, Tensor):
        return [value]
    return [tensor for part in value for tensor in pieces(part)]


@dataclass
class Held:
    """Bytes by part on one rank after a backward pass, and what ZeRO divides.

    `gradient_storage` is what stands behind the gradients: DeepSpeed's are views of the buckets they came in. `host`
    is what an offloading engine keeps in the machine's own memory, and is in no other part then.
    """

    weights: int
    gradients: int
    optimizer: int
    gradient_storage: int
    host: int
    average: int
    buckets: int
    constants: int
    sizes: list[int]
    shapes: list[tuple[int, ...]]
    frozen_sizes: list[int]
    frozen_shapes: list[tuple[int, ...]]


def held(cell: Cell) -> Held:
    torch.manual_seed(0)
    config = resolve_preset("EVA02-CLIP-debug")
    objective = build_objective(InfoNceObjective(), build_clip(config))
    named = list(objective.named_parameters())
    if cell.is_locked:
        lock(named, "visual", "all", config.depth)
        lock(named, "text", 1, config.text_depth)
    frozen = [param for _, param in named if not param.requires_grad]
    frozen_shapes = [tuple(param.shape) for param in frozen]
    optim = toy_optim()
    groups = build_param_groups(named, optim, depth_visual=config.depth, depth_text=config.text_depth)
    params = [p for group in groups for p in group.params]
    shapes = [tuple(p.shape) for p in params]
    sizes = [p.numel() for p in params] if cell.stage == 3 else [sum(p.numel() for p in g.params) for g in groups]
    engine = build_engine(
        EngineSection(kind=cell.kind, zero_stage=cell.stage, offload=cell.offload),  # type: ignore[arg-type]
        World(own_rank(), world_size(), own_rank(), torch.device("cpu")),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=build_optimizer(optim, groups),
        bounds=objective.parameter_bounds,
    )
    seen = watch_buckets(engine)
    objective.train()
    for step in range(2):
        image = torch.randint(0, 256, (B, 3, config.image_size, config.image_size)).byte()
        tokens = torch.randint(1, 49406, (B, config.context_length))
        tokens[:, -1] = 49407
        engine.set_lrs([1e-3 * group.lr_scale for group in groups])
        engine.backward(engine.forward(Batch(image, [""] * B, tokens))["loss"])
        if step == 0:
            engine.step()  # moments exist from here on
    average = WeightAverage(0.9)
    average.at_start(SimpleNamespace(engine=engine))  # type: ignore[arg-type]
    return Held(
        *parts(engine, params, frozen, cell),
        average=num_bytes(average._average.values()),
        buckets=max(seen),
        constants=num_bytes(objective.buffers()),
        sizes=sizes,
        shapes=shapes,
        frozen_sizes=[math.prod(shape) for shape in frozen_shapes],
        frozen_shapes=frozen_shapes,
    )


def watch_buckets(engine: Any) -> list[int]:
    """Bytes of DeepSpeed's buckets of gradients, each time it takes them; they are gone after a backward pass."""
    zero = getattr(engine, "_zero", None)
    if zero is None:
        return [0]
    own = lambda: num_bytes(pieces([bucket.buffer for bucket in zero.ipg_buckets.values()]))  # noqa: E731
    seen = [own()]
    take = getattr(zero, "setup_buckets", None)  # stages 1 and 2; stage 3 keeps its bucket

    def watched() -> None:
        assert take is not None
        take()
        seen.append(own())

    if take is not None:
        zero.setup_buckets = watched
    return seen


def parts(engine: Any, params: list[Any], frozen: list[Any], cell: Cell) -> tuple[int, int, int, int, int]:
    """Bytes of weights, gradients, optimiser, what is behind the gradients, and what is offloaded."""
    zero = getattr(engine, "_zero", None)
    if cell.kind == "fsdp2":
        own = [param.to_local() for param in engine.module.parameters()]
        gradients = [param.grad.to_local() for param in engine.module.parameters() if param.requires_grad]
        return num_bytes(own), *trained(engine._optimizer, [], gradients), 0
    if zero is None:
        optimizer = getattr(engine, "_optimizer", None) or engine._adamw
        return num_bytes([*params, *frozen]), *trained(optimizer, [], [p.grad for p in params]), 0
    is_divided = cell.stage == 3
    weights = [p.ds_tensor if is_divided else p for p in (*params, *frozen)]
    master = zero.fp32_partitioned_groups_flat if is_divided else zero.single_partition_of_fp32_groups
    collected = (
        [zero.grad_partitions_flat_buffer]
        if is_divided
        else pieces(
            [
                listed for listed in zero.averaged_gradients.values() if listed is not None
            ]  # none where they are offloaded
        )
    )
    if cell.offload == "none":
        return num_bytes(weights), *trained(zero.optimizer, master, collected), 0
    assert not [p for p in params if p.grad is not None], "gradients of the pass are still on the accelerator"
    stepped = [group.grad for group in master]
    host = sum(trained(zero.optimizer, master, [*stepped, *collected])[:2])
    if cell.offload == "optimizer-and-weights":
        return 0, 0, 0, 0, host + num_bytes(weights)
    return num_bytes(weights), 0, 0, 0, host


def trained(optimizer: Any, master: list[Tensor], gradients: list[Tensor]) -> tuple[int, int, int]:
    """Bytes of gradients, of moments and master weights, and of what stands behind the gradients."""
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]  # `step` has no axis
    whole = sum(tensor.numel() * tensor.element_size() for tensor in gradients)
    return whole, num_bytes([*master, *moments]), num_bytes(gradients)


def held_by_cells(cells: list[Cell]) -> list[Held]:
    return [held(cell) for cell in cells]


@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [
        pytest.param(2, COVERING, id="covering"),
        pytest.param(2, ALL, id="all on 2 ranks", marks=pytest.mark.slow),
        pytest.param(4, ALL, id="all on 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_states_are_as_planned(run_on_ranks, num_ranks, cells):
    numerics = NUMERICS["fp32"]
    constants = model_buffers(resolve_preset("EVA02-CLIP-debug"))
    for rank, answers in enumerate(run_on_ranks(held_by_cells, num_ranks, cells, timeout_sec=600)):
        for cell, real in zip(cells, answers, strict=True):
            setup = replace(cell.setup, num_ranks=num_ranks)
            said = states(real.sizes, setup, numerics, real.frozen_sizes)
            if cell.kind == "fsdp2":
                said = fsdp2_states(real.shapes, setup, numerics, rank)
                frozen = fsdp2_states(real.frozen_shapes, setup, numerics, rank).weights
                said = replace(said, weights=said.weights + frozen)
            assert (real.weights, real.optimizer, real.host) == (said.weights, said.optimizer, said.host), (cell, rank)
            assert (real.buckets, real.constants) == (zero_buckets(setup, numerics), constants), (cell, rank)
            if rank == 0:  # which holds most; under fsdp2 all its rows
                average = sum(average_bytes(real.sizes, setup, real.frozen_sizes))
                assert real.average == (said.weights if cell.kind == "fsdp2" else average), cell
            if cell.offload != "none":
                assert real.gradients <= said.gradients
            elif cell.kind == "fsdp2":
                assert real.gradient_storage == said.gradients, (cell, rank)
            elif cell.stage == 1:  # whole until they are reduced, which is over by now
                assert real.gradients < said.gradients
            else:
                room = 2 * FP32 * len(real.sizes)
                assert real.gradients == pytest.approx(said.gradients, abs=room), (cell, rank)
