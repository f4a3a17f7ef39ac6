"""The loop: resume, signals, hooks."""

from __future__ import annotations

import os
import signal
from functools import partial
from pathlib import Path

import pytest
import torch
from toy_run import B, ToyLoader, ToyObjective, toy_engine, toy_groups

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.errors import Preempted
from evatool.optim.schedules import warmup_cosine
from evatool.train.hooks import Checkpoints, Hook, MetricsFile, read_metrics
from evatool.train.loss_curve import LossCurve
from evatool.train.state import TrainState, resume_from
from evatool.train.trainer import Trainer

NUM_STEPS = 12


def make_trainer(
    run_dir: Path, *, hooks: list[Hook] | None = None, every_steps: int | None = 5, resume: bool = False, seed: int = 7
) -> Trainer:
    torch.manual_seed(seed)
    objective = ToyObjective(has_projection=True)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups)
    state = TrainState(seed=seed)
    if resume:
        latest = latest_checkpoint(run_dir)
        assert latest is not None
        state = resume_from(load_checkpoint(latest), engine, groups)
    save = partial(save_run, run_dir / "checkpoints", model_config={"task": "clip"}, resolved_toml="a = 1\n", keep=2)
    metrics = run_dir / "metrics.jsonl"
    return Trainer(
        objective,
        engine,
        ToyLoader(seed, state.position),
        groups,
        partial(warmup_cosine, num_steps=NUM_STEPS, warmup_steps=3),
        [
            MetricsFile(metrics),
            *(hooks or []),
            Checkpoints(save, every_steps),
            LossCurve(metrics, run_dir / "c.png", "t"),
        ],
        state,
        NUM_STEPS,
        B,
        log_every=1,
    )


class SignalAt(Hook):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, number: signal.Signals) -> None:
        self.step, self.number = step, number

    def after_step(self, state, losses, trainer):
        if state.step == self.step:
            os.kill(os.getpid(), self.number)


def losses_of(run_dir: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    with pytest.raises(Preempted):
        make_trainer(tmp_path / "parts", hooks=[SignalAt(stop_at, signal.SIGTERM)]).fit()
    resumed = make_trainer(tmp_path / "parts", resume=True, seed=7)
    assert resumed.state.step == stop_at
    resumed.fit()
    for name, tensor in whole.engine.model_state().items():
        assert torch.equal(tensor, resumed.engine.model_state()[name]), name
    for name, tensor in whole.engine.optimizer_state().items():
        assert torch.equal(tensor, resumed.engine.optimizer_state()[name]), name
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert len(losses_of(tmp_path / "whole")) == NUM_STEPS
