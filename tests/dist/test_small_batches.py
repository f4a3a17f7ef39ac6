"""Small batches on several ranks, under every engine, train as whole batches in one process."""

from __future__ import annotations

import math
from pathlib import Path

import pytest
import torch
from tiny_clip import make_batch, rows_of, tiny_clip
from toy_run import NUM_STEPS, make_trainer

from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.core.errors import NumericalError
from evatool.objective.build import build_objective
from evatool.recipe import schema
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate
from evatool.train.hooks.guards import NonFiniteGuard
from evatool.core.param_group import ParamGroup

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
Outcome = tuple[list[float], dict[str, torch.Tensor]]


def three_steps(kind: str, zero_stage: int, num_chunks: int) -> Outcome:
    """Losses, and the weights after three steps of 16 samples."""
    objective = build_objective(schema.SigmoidObjective(), tiny_clip())
    named = list(objective.named_parameters())
    groups = [ParamGroup("all", "other", None, 1e-3, 1.0, 0.0, [p for _, p in named], [name for name, _ in named])]
    optimizer = torch.optim.AdamW(groups[0].params, lr=0.0, eps=1e-3, fused=True)
    engine = build_engine(
        schema.EngineSection(kind=kind, zero_stage=zero_stage),
        World(rank(), world_size(), rank(), torch.device("cpu")),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=optimizer,
        bounds=objective.parameter_bounds,
    )
    batch = rows_of(make_batch(16), rank(), world_size())
    losses = []
    for step in range(3):
        engine.set_lrs([1e-2])
        found = forward_backward(
            engine, objective, batch, micro_batch_size=len(batch.keys) // num_chunks, seed=step, gate=SpikeGate()
        )
        losses.append(float(all_reduce_mean(found["loss"])))
        engine.step()
    return losses, {name: tensor.clone() for name, tensor in engine.model_state().items()}


def all_cells() -> list[Outcome]:
    return [three_steps(*cell, num_chunks=4) for cell in CELLS]


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_every_engine_accumulates_as_one_process_takes_the_whole_batch(run_on_ranks, num_ranks):
    losses, weights = three_steps("single", 0, num_chunks=1)
    for outcomes in run_on_ranks(all_cells, num_ranks):
        for cell, (found, state) in zip(CELLS, outcomes, strict=True):
            assert found == pytest.approx(losses, rel=1e-5), cell
            for name, tensor in weights.items():
                torch.testing.assert_close(state[name], tensor, rtol=1e-4, atol=1e-5, msg=f"{cell}: {name}")


class OneRankPoisoned:
    """NaN pictures on the last rank in the batches that begin at these positions."""

    def __init__(self, clean, positions):
        self.clean, self.positions, self.position = clean, positions, clean.position

    def __iter__(self):
        self.clean.position = self.position
        for batch in self.clean:
            if batch.position - 8 in self.positions and rank() == world_size() - 1:
                batch.image = torch.full(batch.image.shape, math.nan)
            yield batch


def rolls_back(folder: Path, positions: set[int]) -> tuple[list, list[int], str, dict[str, torch.Tensor]]:
    guard = NonFiniteGuard(budget=1, journal=folder / "journal.jsonl")
    trainer = make_trainer(folder, hooks=[guard])
    trainer.loader = OneRankPoisoned(trainer.loader, positions)
    error = ""
    try:
        trainer.fit()
    except NumericalError as raised:
        error = str(raised)
    state = trainer.state
    return [state.rollbacks, state.step, state.position], state.skipped_steps, error, trainer.engine.model_state()


@pytest.mark.parametrize("ends", [False, True], ids=["goes on", "exit 80"])
def test_every_rank_rolls_back_alike(run_on_ranks, tmp_path, ends):
    positions = {48, 56} | ({80, 88} if ends else set())
    answers = run_on_ranks(rolls_back, 2, tmp_path, positions)
    assert answers[0][:3] == answers[1][:3]
    (rollbacks, step, _), skipped, error, weights = answers[0]
    assert (rollbacks[0]["from_step"], rollbacks[0]["to_step"], rollbacks[0]["jumped_over"]) == (8, 5, [40, 64])
    assert "rank 1: loss nan" in rollbacks[0]["reason"]
    assert ("again, after the one rollback" in error) == ends
    assert (step, len(skipped)) == ((9, 2) if ends else (NUM_STEPS, 0))
    assert all(bool(torch.isfinite(tensor).all()) for tensor in weights.values())
