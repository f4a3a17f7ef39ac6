"""What `evatool plan` says of weights, gradients and optimiser, against the bytes that real ranks hold."""

from __future__ import annotations

from collections.abc import Iterable
from dataclasses import dataclass
from typing import Any

import pytest
import torch
from torch import Tensor
from toy_run import toy_engine, toy_optim

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.objective.contrastive import ClipObjective
from evatool.optim.param_groups import build_param_groups
from evatool.plan.engines import Setup, fsdp2_states, states, zero_buckets
from evatool.plan.memory import FP32, NUMERICS, model_buffers
from evatool.recipe.schema import InfoNceObjective
from evatool.types import Batch

pytestmark = pytest.mark.dist

B = 2
COVERING = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 2)]
ALL = [("ddp", 0), ("fsdp2", 0), *(("deepspeed", stage) for stage in range(4))]


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

    `gradient_storage` is what stands behind the gradients: DeepSpeed's are views of the buckets they came in.
    """

    weights: int
    gradients: int
    optimizer: int
    gradient_storage: int
    buckets: int
    constants: int
    sizes: list[int]
    shapes: list[tuple[int, ...]]


def held(kind: str, zero_stage: int) -> Held:
    torch.manual_seed(0)
    config = resolve_preset("EVA02-CLIP-debug")
    objective = ClipObjective(build_clip(config), InfoNceObjective())
    groups = build_param_groups(
        objective.named_parameters(), toy_optim(), depth_visual=config.depth, depth_text=config.text_depth
    )
    params = [p for group in groups for p in group.params]
    shapes = [tuple(p.shape) for p in params]
    sizes = [p.numel() for p in params] if zero_stage == 3 else [sum(p.numel() for p in g.params) for g in groups]
    engine = toy_engine(objective, groups, kind=kind, zero_stage=zero_stage)
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
    return Held(*parts(engine, params, zero_stage), max(seen), num_bytes(objective.buffers()), sizes, shapes)


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


def parts(engine: Any, params: list[Any], zero_stage: int) -> tuple[int, int, int, int]:
    """Bytes of weights, gradients, optimiser and what is behind the gradients, after a backward pass."""
    zero = getattr(engine, "_zero", None)
    sharded = getattr(engine, "_sharded", None)
    if sharded is not None:
        optimizer, master = engine._optimizer, []
        weights = [param.to_local() for param in sharded.values()]
        gradients = [param.grad.to_local() for param in sharded.values()]
    elif zero is None:
        optimizer = getattr(engine, "_optimizer", None) or engine._adamw
        weights, gradients, master = params, [p.grad for p in params], []
    else:
        optimizer = zero.optimizer
        master = zero.fp32_partitioned_groups_flat if zero_stage == 3 else zero.single_partition_of_fp32_groups
        weights = [p.ds_tensor for p in params] if zero_stage == 3 else params
        if zero_stage == 3:
            gradients = [zero.grad_partitions_flat_buffer]
        else:
            gradients = pieces(list(zero.averaged_gradients.values()))
    moments = [t for state in optimizer.state.values() for t in state.values() if t.ndim]  # `step` has no axis
    whole = sum(tensor.numel() * tensor.element_size() for tensor in gradients)
    return num_bytes(weights), whole, num_bytes([*master, *moments]), num_bytes(gradients)


def held_by_cells(cells: list[tuple[str, int]]) -> list[Held]:
    return [held(*cell) for cell in cells]


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
        for (kind, stage), real in zip(cells, answers, strict=True):
            setup = Setup({"deepspeed": "zero"}.get(kind, kind), stage, num_ranks=num_ranks, on_gpu=False)
            said = states(real.sizes, setup, numerics)
            if kind == "fsdp2":
                said = fsdp2_states(real.shapes, setup, numerics, rank)
            cell = (kind, stage, rank)
            assert (real.weights, real.optimizer) == (said.weights, said.optimizer), cell
            assert (real.buckets, real.constants) == (zero_buckets(setup, numerics), constants), cell
            if kind == "fsdp2":
                assert real.gradient_storage == said.gradients, cell
            elif stage == 1:  # whole until they are reduced, which is over by now
                assert real.gradients < said.gradients
            else:
                assert real.gradients == pytest.approx(said.gradients, abs=2 * FP32 * len(real.sizes)), cell
