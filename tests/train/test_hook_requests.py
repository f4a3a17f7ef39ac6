"""What a hook may ask of the trainer: a save, a stop, an end, a rollback, more metrics."""

from __future__ import annotations

import dataclasses

import pytest
from toy_run import NUM_STEPS, B, let_saves_end, make_trainer

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import Preempted
from evatool.train.hooks.base import Hook
from evatool.train.hooks.log import MetricsFile, read_metrics


class At(Hook):
    """Calls `ask` with the trainer after one step, and says which steps it has seen."""

    def __init__(self, step, ask):
        self.step, self.ask, self.seen, self.saves = step, ask, [], []

    def after_step(self, result, trainer):
        self.seen.append(result.step)
        if result.step == self.step and not trainer.state.rollbacks:
            self.ask(trainer)

    def on_save(self, trainer):
        self.saves.append(trainer.state.step)


def test_a_save_that_was_asked_for_is_made_after_the_step(tmp_path):
    hook = At(4, lambda trainer: trainer.request_save())
    make_trainer(tmp_path, hooks=[hook], every_steps=None, keep_every_steps=1).fit()
    assert hook.saves == [4]
    assert sorted(p.name for p in (tmp_path / "checkpoints").iterdir()) == ["step_00000004", "step_00000012"]


def test_a_stop_is_resumable_and_gives_the_hooks_reason(tmp_path):
    hook = At(4, lambda trainer: trainer.request_stop("another owner of the run folder"))
    with pytest.raises(Preempted, match="stopped by another owner of the run folder after step 4 of 12"):
        make_trainer(tmp_path / "parts", hooks=[hook]).fit()
    assert load_checkpoint(latest_checkpoint(tmp_path / "parts")).step == 4
    resumed, whole = make_trainer(tmp_path / "parts", resume=True), make_trainer(tmp_path / "whole")
    resumed.fit(), whole.fit()
    assert [read_metrics(tmp_path / name / "metrics.jsonl")[-1]["train/loss"] for name in ("parts", "whole")] == [
        trainer.metrics["train/loss"] for trainer in (whole, resumed)
    ]


def test_an_end_is_a_run_that_is_complete(tmp_path):
    hook = At(7, lambda trainer: trainer.request_end())
    state = make_trainer(tmp_path, hooks=[hook]).fit()
    assert (state.step, hook.seen) == (7, list(range(1, 8)))
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 7, "saved at its end, as every run"


def test_a_rollback_goes_back_and_is_kept_in_the_state(tmp_path):
    hook = At(7, lambda trainer: trainer.request_rollback("the loss has doubled"))
    state = make_trainer(tmp_path, hooks=[At(5, lambda trainer: let_saves_end()), hook]).fit()
    assert hook.seen == [*range(1, 8), *range(6, NUM_STEPS + 1)]
    (rollback,) = state.rollbacks
    assert (rollback["from_step"], rollback["to_step"]) == (7, 5)
    assert rollback["reason"] == "the loss has doubled (step 7)"


def test_metrics_of_a_hook_stand_beside_those_of_the_step(tmp_path):
    class Score(Hook):
        def after_step(self, result, trainer):
            result.add_metrics({"eval/score": float(result.step)})

    trainer = make_trainer(tmp_path, hooks=[Score(), MetricsFile(tmp_path / "after.jsonl")], log_every=5)
    trainer.fit()
    lines = read_metrics(tmp_path / "after.jsonl")
    assert [(line["step"], line["eval/score"]) for line in lines] == [(1, 1), (5, 5), (10, 10), (12, 12)]
    assert "eval/score" not in read_metrics(tmp_path / "metrics.jsonl")[0], "whose hook stands before"
    assert trainer.metrics["eval/score"] == NUM_STEPS


def test_a_hook_knows_where_the_step_began_and_ended(tmp_path):
    class Look(Hook):
        def before_update(self, step, trainer):
            before.append(step)

        def after_step(self, result, trainer):
            after.append((result.context, result.step, result.samples_seen, result.batch.keys[0]))

    before, after = [], []
    make_trainer(tmp_path, hooks=[Look()]).fit()
    assert [context for context, *_ in after] == before
    assert [(c.step, c.samples_seen, c.num_steps) for c in before[:2]] == [(0, 0, NUM_STEPS), (1, B, NUM_STEPS)]
    assert after[1][1:] == (2, 2 * B, f"sample{B}")


def test_what_a_hook_is_given_cannot_be_written_to(tmp_path):
    class Write(Hook):
        def after_step(self, result, trainer):
            result.step = 0

    with pytest.raises(dataclasses.FrozenInstanceError):
        make_trainer(tmp_path, hooks=[Write()]).fit()
    with pytest.raises(dataclasses.FrozenInstanceError):
        make_trainer(tmp_path).config.num_steps = 1  # type: ignore[misc]
