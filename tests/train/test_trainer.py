"""The loop: resume, signals, hooks."""

from __future__ import annotations

import errno
import json
import math
import os
import signal
import time
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from PIL import Image
from toy_run import NUM_STEPS, B, ToyObjective, let_saves_end, make_trainer, toy_engine, toy_groups, toy_optim

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import CheckpointError, ExitCode, Interrupted, Preempted, TransientError
from evatool.train.hooks.base import Hook
from evatool.train.hooks.log import read_metrics
from evatool.train.hooks.loss_curve import LossCurve, draw_loss_curve, smoothed
from evatool.train.state import resume_from
from evatool.train.trainer import Trainer, step_seed


class SignalAt(Hook):
    """Sends this process a signal after a step."""

    def __init__(self, step: int, *numbers: signal.Signals) -> None:
        self.step, self.numbers = step, numbers

    def after_step(self, result, trainer):
        if result.step == self.step:
            for number in self.numbers:
                os.kill(os.getpid(), number)


def losses_of(run_dir: Path) -> list[float]:
    return [record["train/loss"] for record in read_metrics(run_dir / "metrics.jsonl")]


def assert_same_end(first: Trainer, second: Trainer) -> None:
    assert first.state.step == second.state.step == NUM_STEPS
    for name, tensor in (first.engine.model_state() | first.engine.optimizer_state()).items():
        assert torch.equal(tensor, (second.engine.model_state() | second.engine.optimizer_state())[name]), name


@pytest.mark.parametrize("stop_at", [1, 4, 5, 11])
def test_resumed_run_equals_the_uninterrupted_one_bit_for_bit(tmp_path, stop_at):
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    with pytest.raises(Preempted):
        make_trainer(tmp_path / "parts", hooks=[SignalAt(stop_at, signal.SIGTERM)]).fit()
    resumed = make_trainer(tmp_path / "parts", resume=True)
    assert resumed.state.step == stop_at
    resumed.fit()
    assert_same_end(whole, resumed)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")
    assert len(losses_of(tmp_path / "whole")) == NUM_STEPS


def test_another_seed_is_another_run(tmp_path):
    """So that the equality above says something: dropout and order follow the seed."""
    first, second = make_trainer(tmp_path / "a", seed=1), make_trainer(tmp_path / "b", seed=2)
    first.fit(), second.fit()
    assert losses_of(tmp_path / "a") != losses_of(tmp_path / "b")


def test_a_killed_run_goes_on_from_its_last_checkpoint(tmp_path):
    """Metrics of steps that the checkpoint does not have are dropped, so each step stands once."""

    class Crash(Hook):
        def after_step(self, result, trainer):
            if result.step == 8:
                raise RuntimeError("crash")  # with the save of step 5 under way, maybe

    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(tmp_path / "parts", hooks=[Crash()]).fit()
    assert len(losses_of(tmp_path / "parts")) == 8
    resumed = make_trainer(tmp_path / "parts", resume=True)
    assert resumed.state.step == 5
    resumed.fit()
    assert_same_end(whole, resumed)
    assert losses_of(tmp_path / "whole") == losses_of(tmp_path / "parts")


@pytest.mark.parametrize(
    ("number", "error", "exit_code"),
    [
        (signal.SIGTERM, Preempted, 75),
        (signal.SIGUSR1, Preempted, 75),
        (signal.SIGINT, Interrupted, 130),
    ],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_signal_stops_after_the_step_and_saves(tmp_path, number, error, exit_code):
    before = signal.getsignal(number)
    with pytest.raises(error, match="after step 7 of 12") as raised:
        make_trainer(tmp_path, hooks=[SignalAt(7, number)]).fit()
    assert raised.value.exit_code == exit_code
    assert "--resume" in raised.value.fix
    latest = latest_checkpoint(tmp_path)
    assert load_checkpoint(latest).train_state["step"] == 7
    assert load_checkpoint(latest).train_state["position"] == 7 * B
    assert signal.getsignal(number) == before, "handlers are given back"


def test_a_stop_file_stops_saves_and_is_gone(tmp_path):
    class Touch(Hook):
        def after_step(self, result, trainer):
            if result.step == 7:
                (tmp_path / "STOP").touch()

    with pytest.raises(Preempted, match="stopped by the STOP file after step 7 of 12") as raised:
        make_trainer(tmp_path, hooks=[Touch()], stop_file=tmp_path / "STOP").fit()
    assert raised.value.exit_code == 75
    assert load_checkpoint(latest_checkpoint(tmp_path)).train_state["step"] == 7
    assert not (tmp_path / "STOP").exists(), "or a resumed run would stop at once"
    whole, resumed = make_trainer(tmp_path / "whole"), make_trainer(tmp_path, resume=True)
    whole.fit(), resumed.fit()
    assert_same_end(whole, resumed)


def test_checkpoints_by_the_clock(tmp_path, monkeypatch):
    now = [0.0]
    monkeypatch.setattr(time, "monotonic", lambda: now[0])

    class Tick(Hook):
        def after_step(self, result, trainer):
            now[0] += 30

    trainer = make_trainer(tmp_path, hooks=[Tick()], every_steps=None, save_every_sec=100.0, keep_every_steps=4)
    trainer.fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000004", "step_00000008", "step_00000012"], "4 x 30 s; kept for good: multiples of 4"


def test_old_checkpoints_go_but_for_every_kth(tmp_path):
    make_trainer(tmp_path, every_steps=2, keep_every_steps=6).fit()
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000006", "step_00000010", "step_00000012"], "the newest two, and multiples of 6"


def test_second_ctrl_c_stops_at_once(tmp_path):
    with pytest.raises(KeyboardInterrupt):
        make_trainer(tmp_path, hooks=[SignalAt(3, signal.SIGINT, signal.SIGINT)], every_steps=None).fit()
    assert latest_checkpoint(tmp_path) is None


def test_signal_after_the_last_step_does_not_matter(tmp_path):
    state = make_trainer(tmp_path, hooks=[SignalAt(NUM_STEPS, signal.SIGTERM)]).fit()
    assert state.step == NUM_STEPS


def test_a_finished_run_has_nothing_left_to_do(tmp_path):
    make_trainer(tmp_path).fit()
    before = latest_checkpoint(tmp_path).stat().st_mtime_ns
    assert make_trainer(tmp_path, resume=True).fit().step == NUM_STEPS
    assert latest_checkpoint(tmp_path).stat().st_mtime_ns == before, "not saved a second time"


def test_full_disk_ends_the_run_with_the_old_checkpoint_intact(tmp_path, monkeypatch):
    trainer = make_trainer(tmp_path, hooks=[FillDisk(8, monkeypatch)])
    with pytest.raises(TransientError, match="disk is full") as raised:
        trainer.fit()
    assert raised.value.exit_code == ExitCode.TRANSIENT
    monkeypatch.undo()
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 5
    assert sorted(path.name for path in (tmp_path / "checkpoints").iterdir()) == ["step_00000005"]


class FillDisk(Hook):
    def __init__(self, step: int, monkeypatch: pytest.MonkeyPatch) -> None:
        self.step, self.monkeypatch = step, monkeypatch

    def after_step(self, result, trainer):
        if result.step == self.step:
            let_saves_end()
            full = OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))
            self.monkeypatch.setattr(os, "fsync", lambda descriptor: (_ for _ in ()).throw(full))


def test_resume_refuses_other_groups(tmp_path):
    make_trainer(tmp_path).fit()
    saved = load_checkpoint(latest_checkpoint(tmp_path))
    objective = ToyObjective(has_projection=True)
    groups = toy_groups(objective, toy_optim(layer_decay=0.7))
    with pytest.raises(CheckpointError, match=r"parameter groups differ.*visual/layer_00/decay"):
        resume_from(saved, toy_engine(objective, groups), groups)


def test_resume_refuses_another_model(tmp_path):
    make_trainer(tmp_path).fit()
    saved = load_checkpoint(latest_checkpoint(tmp_path))
    objective = ToyObjective(has_projection=True)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups)
    renamed = dict(saved.objective_state)
    renamed["model.visual.new"] = renamed.pop("model.visual.scale")
    saved = replace(saved, objective_state=renamed)
    with pytest.raises(CheckpointError, match="1 weights are missing, 1 are unknown") as raised:
        resume_from(saved, engine, groups)
    assert "model.visual.new" in raised.value.where
    saved.objective_state["model.visual.scale"] = saved.objective_state.pop("model.visual.new").expand(2)
    with pytest.raises(CheckpointError, match=r"model\.visual\.scale has shape \(2,\)"):
        resume_from(saved, engine, groups)


def test_record_has_the_figures(tmp_path):
    trainer = make_trainer(tmp_path)
    trainer.fit()
    first = json.loads((tmp_path / "metrics.jsonl").read_text().splitlines()[0])
    assert set(first) == {
        "step",
        "samples_seen",
        "train/loss",
        "train/logit_scale",
        "optim/grad_norm",
        "optim/lr/visual",
        "optim/lr/text",
        "optim/lr/other",
        "throughput/samples_per_sec",
        "throughput/data_wait_fraction",
        "throughput/eta_sec",
        "memory/peak_bytes",
    }
    assert (first["step"], first["samples_seen"]) == (1, B)
    assert first["optim/lr/visual"] == pytest.approx(1e-2 / 3), "the largest of a tower's groups, in the warm-up"
    assert trainer.state.samples_seen == NUM_STEPS * B
    assert trainer.state.train_sec > 0


def test_losses_are_fetched_on_logging_steps_only(tmp_path):
    trainer = make_trainer(tmp_path, log_every=5)
    trainer.fit()
    assert [record["step"] for record in read_metrics(tmp_path / "metrics.jsonl")] == [1, 5, 10, 12]


def test_step_seeds_differ():
    seeds = {step_seed(seed, step, rank) for seed in range(4) for step in range(50) for rank in range(4)}
    assert len(seeds) == 4 * 50 * 4
    assert all(0 <= seed < 2**63 for seed in seeds)


def test_damaged_metrics_line_is_left_out(tmp_path):
    (tmp_path / "m.jsonl").write_text('{"step": 1}\n{"step": 2}\n{"st')
    assert [record["step"] for record in read_metrics(tmp_path / "m.jsonl")] == [1, 2]


def test_loss_curve_is_a_picture(tmp_path):
    curve = LossCurve(tmp_path / "metrics.jsonl", tmp_path / "c.png", "toy", (math.log(B), "ln(batch)"))
    make_trainer(tmp_path, hooks=[curve]).fit()
    with Image.open(tmp_path / "c.png") as image:
        assert image.size == (960, 600)
        assert image.convert("RGB").getpixel((2, 2)) == (255, 255, 255), "light"
        assert sum(count > 0 for count in image.convert("L").histogram()) > 50, "something is drawn"


def test_loss_curve_is_there_while_the_run_goes_and_shows_evaluations(tmp_path):
    curve = LossCurve(tmp_path / "metrics.jsonl", tmp_path / "c.png", "toy", every_sec=0.0)

    class Look(Hook):
        def after_step(self, result, trainer):
            seen.append((tmp_path / "c.png").exists())
            if result.step == 3:
                raise RuntimeError("crash")

    seen: list[bool] = []
    with pytest.raises(RuntimeError, match="crash"):
        make_trainer(tmp_path, hooks=[curve, Look()]).fit()
    assert seen == [True] * 3
    records = [{"samples_seen": i, "train/loss": 2.0 - i, "eval/new/top1": 0.1 * i} for i in range(4)]
    draw_loss_curve(records, tmp_path / "eval.png", "toy")
    with Image.open(tmp_path / "eval.png") as image:
        assert image.size == (960, 840), "taller by the panel of evaluations"


def test_loss_curve_bears_missing_values(tmp_path):
    draw_loss_curve([], tmp_path / "empty.png", "none")
    draw_loss_curve([{"samples_seen": 8, "train/loss": None}], tmp_path / "nan.png", "nan", (2.0, "ln(batch)"))
    assert (tmp_path / "empty.png").exists()
    assert (tmp_path / "nan.png").exists()


def test_smoothing():
    assert smoothed([3.0] * 40) == pytest.approx([3.0] * 40)
    assert smoothed([1.0, 2.0, 3.0]) == [1.0, 2.0, 3.0], "few points are left as they are"
    assert max(abs(value) for value in smoothed([1.0, -1.0] * 100)) < 0.2
    assert smoothed([float(i) for i in range(200)])[100] == 100, "without lag"
