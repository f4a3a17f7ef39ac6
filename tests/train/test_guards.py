"""Values that are not finite never reach the weights; a loss that never moves is reported."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path

import pytest
import torch
from toy_run import NUM_STEPS, B, make_trainer

from evatool.errors import ExitCode, NumericalError
from evatool.train.guards import NonFiniteGuard, StuckAtStart
from evatool.train.hooks import Hook, read_metrics
from evatool.train.state import TrainState
from evatool.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _records_reach_caplog(monkeypatch):
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)


def poison(trainer: Trainer, steps: set[int], value: float) -> None:
    """Make the pictures of these steps (counted from 1) hold `value`."""
    clean = iter(trainer.loader)

    def batches():
        for step, batch in enumerate(clean, start=trainer.state.step + 1):
            if step in steps:
                batch.image = torch.full(batch.image.shape, value)
            yield batch

    trainer.loader = batches()


class Weights(Hook):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def after_step(self, state, losses, trainer):
        both = trainer.engine.model_state() | trainer.engine.optimizer_state()
        self.after[state.step] = {name: tensor.clone() for name, tensor in both.items()}


@pytest.mark.parametrize("value", [math.nan, math.inf], ids=str)
def test_bad_step_changes_nothing_and_is_reported(tmp_path, caplog, value):
    weights = Weights()
    trainer = make_trainer(tmp_path, hooks=[NonFiniteGuard(), weights])
    poison(trainer, {4}, value)
    state = trainer.fit()
    assert state.skipped_steps == [4]
    for name, before in weights.after[3].items():
        assert torch.equal(weights.after[4][name], before), name
        assert bool(torch.isfinite(weights.after[NUM_STEPS][name]).all()), name
    assert weights.after[NUM_STEPS]["num_updates"] == NUM_STEPS - 1
    assert "step 4 skipped" in caplog.text
    assert "rank 0: loss nan, samples sample24, sample25" in caplog.text
    record = read_metrics(tmp_path / "metrics.jsonl")[3]
    assert (record["train/loss"], record["optim/grad_norm"]) == (None, None)
    assert "NaN" not in (tmp_path / "metrics.jsonl").read_text()
    assert json.loads((tmp_path / "checkpoints/step_00000012/train_state.json").read_text())["skipped_steps"] == [4]


def test_a_finite_loss_with_a_gradient_that_is_not(tmp_path):
    """The square root's slope at 0: the loss says nothing, the gradient norm does."""
    trainer = make_trainer(tmp_path, hooks=[NonFiniteGuard()])
    forward = trainer.engine.forward

    def with_root(batch):
        losses = forward(batch)
        weight = trainer.objective.model.logit_scale
        return losses | {"loss": losses["loss"] + torch.sqrt((weight - weight.detach()).abs()).sum()}

    trainer.engine.forward = with_root
    with pytest.raises(NumericalError):
        trainer.fit()
    assert trainer.state.skipped_steps == list(range(1, 10))


def test_too_many_bad_steps_end_the_run(tmp_path):
    trainer = make_trainer(tmp_path, hooks=[NonFiniteGuard(budget=2, window=100)])
    poison(trainer, {2, 5, 7}, math.nan)
    with pytest.raises(NumericalError, match="3 of the last 100 steps") as raised:
        trainer.fit()
    assert raised.value.exit_code == ExitCode.NUMERICAL_ABORT == 80
    assert raised.value.where.startswith("step 7, rank 0: loss nan, samples sample48")
    assert trainer.state.step == 7


def test_budget_counts_a_window_and_survives_a_resume(tmp_path):
    guard = NonFiniteGuard(budget=1, window=4)
    far_apart = make_trainer(tmp_path / "far", hooks=[guard])
    poison(far_apart, {2, 6, 10}, math.nan)
    assert far_apart.fit().skipped_steps == [2, 6, 10]
    first = make_trainer(tmp_path / "near", hooks=[NonFiniteGuard(budget=1, window=4)], every_steps=1)
    first.num_steps = 6
    poison(first, {6}, math.nan)
    first.fit()
    resumed = make_trainer(tmp_path / "near", hooks=[NonFiniteGuard(budget=1, window=4)], resume=True)
    poison(resumed, {8}, math.nan)
    with pytest.raises(NumericalError, match="2 of the last 4 steps"):
        resumed.fit()


class Losses(Hook):
    """Puts other losses in the place of the objective's."""

    def __init__(self, values: list[float], watcher: StuckAtStart) -> None:
        self.values, self.watcher = values, watcher

    def after_step(self, state, losses, trainer):
        self.watcher.after_step(state, {"loss": torch.tensor(self.values[state.step - 1])}, trainer)

    def at_end(self, trainer):
        self.watcher.at_end(trainer)


def run_with_losses(tmp_path: Path, values: list[float]) -> TrainState:
    watcher = StuckAtStart(global_batch_size=B, warmup_steps=3, window=4)
    return make_trainer(tmp_path, hooks=[Losses(values, watcher)]).fit()


def test_stuck_at_the_start(tmp_path, caplog):
    state = run_with_losses(tmp_path, [2.5, 2.2] + [math.log(B) + 0.001] * 10)
    note = state.notes["stuck_at_start"]
    assert "still 2.080 at the end of the run (step 12)" in note
    assert "ln(batch) = 2.079" in note
    assert caplog.text.count("the contrastive loss is still") == 2
    assert "after the warm-up (step 7)" in caplog.text


def test_a_loss_that_moves_is_not_stuck(tmp_path, caplog):
    state = run_with_losses(tmp_path, [2.08, 2.0, 1.9] + [1.8] * 9)
    assert state.notes == {}
    assert "still" not in caplog.text


def test_a_loss_that_moves_late_is_forgiven(tmp_path, caplog):
    state = run_with_losses(tmp_path, [2.08] * 8 + [1.0] * 4)
    assert state.notes == {}
    assert caplog.text.count("the contrastive loss is still") == 1


def test_a_run_too_short_to_judge(tmp_path):
    watcher = StuckAtStart(global_batch_size=B, warmup_steps=10, window=4)
    assert make_trainer(tmp_path, hooks=[Losses([2.08] * NUM_STEPS, watcher)]).fit().notes == {}
