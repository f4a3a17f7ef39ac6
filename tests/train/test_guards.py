"""Values that are not finite never reach the weights; a loss that never moves is reported."""

from __future__ import annotations

import json
import logging
import math
from dataclasses import replace
from functools import partial
from pathlib import Path

import pytest
import torch
from toy_run import NUM_STEPS, B, make_trainer

from evatool.core.errors import ExitCode, NumericalError
from evatool.core.loader import Loader
from evatool.train.hooks.base import Hook
from evatool.train.hooks.guards import NonFiniteGuard, StuckAtStart
from evatool.train.hooks.log import read_metrics
from evatool.train.loss_spike import SpikeGate
from evatool.train.state import TrainState
from evatool.train.trainer import Trainer


@pytest.fixture(autouse=True)
def _records_reach_caplog(monkeypatch):
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)


class Poisoned(Loader):
    """The trainer's loader, with pictures of `value` in the batches that begin at these positions."""

    def __init__(self, trainer: Trainer, positions: set[int], value: float) -> None:
        self.clean, self.positions, self.value = trainer.loader, positions, value

    @property
    def position(self) -> int:
        return self.clean.position

    @position.setter
    def position(self, value: int) -> None:
        self.clean.position = value

    def __iter__(self):
        for batch in self.clean:
            if batch.position - B in self.positions:
                batch.image = torch.full(batch.image.shape, self.value)
            yield batch


def poison(trainer: Trainer, steps: set[int], value: float) -> None:
    """Make the pictures of these steps (counted from 1, without rollbacks) hold `value`."""
    trainer.loader = Poisoned(trainer, {(step - 1) * B for step in steps}, value)


class Weights(Hook):
    """Keeps the weights after every step."""

    def __init__(self) -> None:
        self.after: dict[int, dict[str, torch.Tensor]] = {}

    def after_step(self, result, trainer):
        both = trainer.engine.model_state() | trainer.engine.optimizer_state()
        self.after[result.step] = {name: tensor.clone() for name, tensor in both.items()}


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
    trainer = make_trainer(tmp_path, hooks=[NonFiniteGuard()], restore=None)
    forward = trainer.engine.forward

    def with_root(batch, **options):
        losses = forward(batch, **options)
        weight = trainer.objective.model.logit_scale
        return losses | {"loss": losses["loss"] + torch.sqrt((weight - weight.detach()).abs()).sum()}

    trainer.engine.forward = with_root
    with pytest.raises(NumericalError):
        trainer.fit()
    assert trainer.state.skipped_steps == list(range(1, 10))


def test_too_many_bad_steps_end_the_run_where_nothing_can_be_restored(tmp_path):
    trainer = make_trainer(tmp_path, hooks=[NonFiniteGuard(budget=2, window=100)], restore=None)
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
    guard = NonFiniteGuard(budget=1, window=4)
    first = make_trainer(tmp_path / "near", hooks=[guard], every_steps=1, num_steps=6)
    poison(first, {6}, math.nan)
    first.fit()
    guard = NonFiniteGuard(budget=1, window=4)
    resumed = make_trainer(tmp_path / "near", hooks=[guard], resume=True, restore=None)
    poison(resumed, {8}, math.nan)
    with pytest.raises(NumericalError, match="2 of the last 4 steps"):
        resumed.fit()


# ------------------------------------------------------------------------------------------------ rollback and stop


def journal(folder: Path) -> list[dict]:
    return [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()]


def rolled(folder: Path, steps: set[int], policy: str = "skip", budget: int = 1, **settings) -> Trainer:
    guard = NonFiniteGuard(budget=budget, window=100, policy=policy, journal=folder / "journal.jsonl")
    trainer = make_trainer(folder, hooks=[guard], **settings)
    poison(trainer, steps, math.nan)
    return trainer


def test_beyond_the_budget_the_run_goes_back_once_and_jumps_over_the_window(tmp_path, caplog):
    trainer = rolled(tmp_path, {7, 8})
    state = trainer.fit()
    assert (state.step, state.samples_seen) == (NUM_STEPS, NUM_STEPS * B)
    (rollback,) = state.rollbacks
    assert (rollback["from_step"], rollback["to_step"]) == (8, 5)
    assert rollback["jumped_over"] == [5 * B, 8 * B], "samples of the steps that were taken back are not seen again"
    assert state.position == (NUM_STEPS + 3) * B
    events = journal(tmp_path)
    assert [(e["event"], e.get("step")) for e in events] == [("skipped", 7), ("skipped", 8), ("rollback", None)]
    assert events[0]["cause"] == "not finite"
    assert events[0]["ranks"][0]["samples"][0] == "sample48"
    assert "back to the checkpoint of step 5; samples 40 to 64 are jumped over" in caplog.text
    assert [r["step"] for r in read_metrics(tmp_path / "metrics.jsonl")] == list(range(1, NUM_STEPS + 1))
    again = rolled(tmp_path / "again", {7, 8})
    again.fit()
    for name, tensor in trainer.engine.model_state().items():
        assert torch.equal(again.engine.model_state()[name], tensor), f"the same rerun reproduces it: {name}"


def test_weights_after_a_rollback_are_the_checkpoints(tmp_path):
    weights = Weights()
    trainer = rolled(tmp_path, {7}, policy="rollback")
    trainer.hooks = [weights, *trainer.hooks]
    seen = []
    roll_back = trainer._roll_back

    def watched():
        roll_back()
        seen.append(
            {n: t.clone() for n, t in (trainer.engine.model_state() | trainer.engine.optimizer_state()).items()}
        )

    trainer._roll_back = watched
    trainer.fit()
    (restored,) = seen
    kept = weights.after
    first_five = make_trainer(tmp_path / "five", num_steps=5)
    first_five.fit()
    for name, tensor in (first_five.engine.model_state() | first_five.engine.optimizer_state()).items():
        assert torch.equal(restored[name], tensor), name
    assert max(kept) == NUM_STEPS


def test_a_second_time_ends_the_run(tmp_path):
    trainer = rolled(tmp_path, {7, 8, 12, 13})  # 12 and 13 are steps 9 and 10 of the run that went back
    with pytest.raises(NumericalError, match="again, after the one rollback") as raised:
        trainer.fit()
    assert raised.value.exit_code == 80
    assert [e["event"] for e in journal(tmp_path)] == ["skipped", "skipped", "rollback", "skipped", "skipped"]


def test_a_run_killed_after_its_rollback_goes_on_as_if_it_had_not_been(tmp_path):
    whole = rolled(tmp_path / "whole", {7, 8})
    whole.fit()

    class Crash(Hook):
        def after_step(self, result, trainer):
            if result.step == 11:
                raise RuntimeError("crash")

    first = rolled(tmp_path / "parts", {7, 8})
    first.hooks = [Crash(), *first.hooks]
    with pytest.raises(RuntimeError, match="crash"):
        first.fit()
    resumed = rolled(tmp_path / "parts", {7, 8}, resume=True)
    assert resumed.state.step == 10
    assert resumed.fit().rollbacks == whole.state.rollbacks
    for name, tensor in whole.engine.model_state().items():
        assert torch.equal(resumed.engine.model_state()[name], tensor), name


@pytest.mark.parametrize(("policy", "events"), [("stop", ["skipped"]), ("rollback", ["skipped", "rollback"])])
def test_other_policies_act_at_the_first_bad_step(tmp_path, policy, events):
    trainer = rolled(tmp_path, {7}, policy=policy)
    if policy == "stop":
        with pytest.raises(NumericalError, match="1 of the last 100 steps"):
            trainer.fit()
    else:
        assert trainer.fit().rollbacks[0]["to_step"] == 5
    assert [e["event"] for e in journal(tmp_path)] == events


def test_without_a_checkpoint_there_is_nothing_to_go_back_to(tmp_path):
    with pytest.raises(NumericalError, match="no checkpoint to go back to") as raised:
        rolled(tmp_path, {2, 3}).fit()
    assert "checkpoint.every_steps" in raised.value.fix


def test_a_spike_is_skipped_as_such(tmp_path):
    guard, weights = NonFiniteGuard(journal=tmp_path / "journal.jsonl"), Weights()
    trainer = make_trainer(tmp_path, hooks=[guard, weights], gate=SpikeGate(6.0, window=8))
    forward = trainer.engine.forward

    def spiking(batch, **options):
        losses = forward(batch, **options)
        return losses | {"loss": losses["loss"] * (100 if trainer.state.step == 9 else 1)}

    trainer.engine.forward = spiking
    assert trainer.fit().skipped_steps == [10]
    for name, before in weights.after[9].items():
        assert torch.equal(weights.after[10][name], before), name
    (event,) = journal(tmp_path)
    assert (event["cause"], event["step"]) == ("spike", 10)
    assert event["ranks"][0]["loss"] > 100
    saved = json.loads((tmp_path / "checkpoints/step_00000012/train_state.json").read_text())
    assert len(saved["recent_losses"]) == 8


def test_a_run_with_a_spike_does_the_same_again(tmp_path):
    """R13: the same step is skipped, and every bit after it is the same."""
    journals, weights = [], []
    for folder in (tmp_path / "one", tmp_path / "two"):
        trainer = make_trainer(
            folder, hooks=[NonFiniteGuard(journal=folder / "journal.jsonl")], gate=SpikeGate(6.0, window=6)
        )
        trainer.engine.forward = partial(spike_at, trainer, trainer.engine.forward, 8)
        assert trainer.fit().skipped_steps == [9]
        journals.append([{key: value for key, value in event.items() if key != "time"} for event in journal(folder)])
        weights.append((folder / "checkpoints/step_00000012/model.safetensors").read_bytes())
    assert journals[0] == journals[1]
    assert weights[0] == weights[1]


def spike_at(trainer, forward, spiking_step, batch, **options):
    losses = forward(batch, **options)
    return losses | {"loss": losses["loss"] * (100 if trainer.state.step == spiking_step else 1)}


class Losses(Hook):
    """Puts other losses in the place of the objective's."""

    def __init__(self, values: list[float], watcher: StuckAtStart) -> None:
        self.values, self.watcher = values, watcher

    def after_step(self, result, trainer):
        told = {"loss": torch.tensor(self.values[result.step - 1])}
        self.watcher.after_step(replace(result, losses=told), trainer)

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
