"""Passes within `no_sync` add up to one step, and parts of a model can be used between steps, on every engine."""

from __future__ import annotations

import pytest
import torch
from toy_run import ToyLoader, ToyObjective, toy_engine, toy_groups

from evatool.distributed.collectives import rank, world_size

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0), ("fsdp2", 0), *(("deepspeed", stage) for stage in range(4))]
Found = tuple[list[float], dict[str, torch.Tensor], torch.Tensor]


def train(kind: str, zero_stage: int, precision: str) -> Found:
    """Norms of three steps of three passes each, the weights after them, and features made between steps."""
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups, kind, zero_stage, precision=precision)
    # Low enough that no rank's share of the gradient overflows, whatever their number.
    scale = {"loss_scale": torch.tensor([64.0]), "loss_scale_good_steps": torch.zeros(1, dtype=torch.int32)}
    engine.load_optimizer_state({"num_updates": torch.zeros(1, dtype=torch.int64)} | scale)
    batches = iter(ToyLoader(rank=rank(), world_size=world_size()))
    held_out = next(iter(ToyLoader(seed=5)))
    norms = []
    for step in range(3):
        engine.set_lrs([group.lr * group.lr_scale for group in groups])
        with engine.no_sync():
            for weight in (0.5, 0.2):
                engine.backward(weight * engine.forward(next(batches))["loss"])
        engine.backward(0.3 * engine.forward(next(batches))["loss"])
        norms.append(engine.step().item())
        if step < 2:  # no forward pass of the objective stands between a step and this
            with torch.no_grad(), engine.summon_full_weights():
                features = objective.model.visual(held_out.image) * objective.model.logit_scale
    return norms, {name: tensor.clone() for name, tensor in engine.model_state().items()}, features


def train_cells(cells: list[tuple[str, int]], precision: str) -> list[Found]:
    return [train(*cell, precision) for cell in cells]


@pytest.mark.parametrize(
    ("num_ranks", "precision"),
    [(2, "fp32"), (2, "fp16"), pytest.param(4, "fp32", marks=pytest.mark.slow)],
)
def test_accumulated_steps_are_the_single_engines(run_on_ranks, num_ranks, precision):
    norms, weights, features = train("single", 0, precision)
    rel = 1e-5 if precision == "fp32" else 1e-2
    for answer in run_on_ranks(train_cells, num_ranks, CELLS, precision):
        for cell, (found_norms, found_weights, found_features) in zip(CELLS, answer, strict=True):
            assert found_norms == pytest.approx(norms, rel=rel), cell
            torch.testing.assert_close(found_features, features, rtol=rel, atol=rel, msg=str(cell))
            for name, tensor in found_weights.items():
                message = f"{cell}: {name}"
                torch.testing.assert_close(tensor, weights[name], rtol=rel, atol=1e-6 if rel < 1e-3 else 2e-2, msg=message)  # fmt: skip  # noqa: E501
