"""The joint objective on several ranks is the one process's, under every engine, from small batches too."""

from __future__ import annotations

from functools import partial

import pytest
import torch
from joint_clip import joint_parts
from tiny_clip import rows_of

from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.recipe import schema
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate
from evatool.core.param_group import ParamGroup

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0, "infonce"), ("fsdp2", 0, "sigmoid")]
DEEPSPEED = [("deepspeed", 1, "infonce"), ("deepspeed", 3, "sigmoid")]
Outcome = tuple[list[dict[str, float]], dict[str, torch.Tensor]]


def two_steps(kind: str, zero_stage: int, loss: str, num_chunks: int) -> Outcome:
    """Losses, and the weights after two steps of 8 samples."""
    parts = joint_parts(loss)
    parts.teacher.head.float()
    objective = parts.objective.float()
    named = list(objective.named_parameters())
    groups = [ParamGroup("all", "other", None, 1e-3, 1.0, 0.0, [p for _, p in named], [name for name, _ in named])]
    engine = build_engine(
        schema.EngineSection(kind=kind, zero_stage=zero_stage),
        World(rank(), world_size(), rank(), torch.device("cpu")),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=torch.optim.AdamW(groups[0].params, lr=0.0, eps=1e-3, fused=True),
        bounds=objective.parameter_bounds,
    )
    batch = rows_of(parts.batch, rank(), world_size())
    found = []
    for step in range(2):
        engine.set_lrs([1e-2])
        losses = forward_backward(
            engine, objective, batch, micro_batch_size=len(batch.keys) // num_chunks, seed=step, gate=SpikeGate()
        )
        found.append({name: float(all_reduce_mean(losses[name])) for name in ("loss", "contrastive_loss", "mim_loss")})
        engine.step()
    return found, {name: tensor.clone() for name, tensor in engine.model_state().items()}


def all_of(cells: list[tuple[str, int, str]]) -> list[Outcome]:
    return [two_steps(*cell, num_chunks=2) for cell in cells]


@pytest.mark.parametrize(
    "cells", [CELLS, pytest.param(DEEPSPEED, marks=pytest.mark.slow)], ids=["torch's engines", "DeepSpeed's"]
)
def test_every_engine_trains_as_one_process(run_on_ranks, cells):
    whole = {loss: two_steps("single", 0, loss, num_chunks=1) for loss in ("infonce", "sigmoid")}
    for outcomes in run_on_ranks(partial(all_of, cells), 2):
        for cell, (found, state) in zip(cells, outcomes, strict=True):
            losses, weights = whole[cell[-1]]
            for ours, theirs in zip(found, losses, strict=True):
                assert ours == pytest.approx(theirs, rel=1e-5), cell
            for name, tensor in weights.items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{cell}: {name}")
