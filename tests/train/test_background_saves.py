"""Checkpoints are written while training goes on, and nothing of that can be seen in them."""

from __future__ import annotations

import os
import threading
from pathlib import Path

import pytest
import torch
from toy_run import NUM_STEPS, let_saves_end, make_trainer

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import NumericalError, Preempted
from evatool.train.hooks.base import Hook
from evatool.train.hooks.checkpoint import HostCopy
from evatool.train.signals import StopRequests


class SlowDisk(Hook):
    """No flush ends before `released_at` steps are done; what was on the disk at each step is in `seen`."""

    def __init__(self, monkeypatch: pytest.MonkeyPatch, folder: Path, released_at: int) -> None:
        self.folder, self.released_at, self.seen = folder / "checkpoints", released_at, {}
        self.release, fsync = threading.Event(), os.fsync
        monkeypatch.setattr(os, "fsync", lambda descriptor: (self.release.wait(30), fsync(descriptor))[1])

    def after_step(self, result, trainer):
        if result.step == self.released_at:
            self.release.set()
            let_saves_end()
        self.seen[result.step] = sorted(p.name for p in self.folder.glob("step_*"))

    def close(self):
        self.release.set()


def assert_same_checkpoint(folder: Path, other: Path, step: int) -> None:
    one, two = (load_checkpoint(path / "checkpoints" / f"step_{step:08d}") for path in (folder, other))
    for ours, theirs in ((one.objective_state, two.objective_state), (one.optimizer_state, two.optimizer_state)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)
    assert one.train_state | {"train_sec": 0} == two.train_state | {"train_sec": 0}


def test_steps_are_done_while_a_checkpoint_is_written_and_do_not_reach_it(tmp_path, monkeypatch):
    make_trainer(tmp_path / "plain", every_steps=5).fit()
    disk = SlowDisk(monkeypatch, tmp_path / "slow", released_at=9)
    make_trainer(tmp_path / "slow", hooks=[disk], every_steps=5).fit()
    assert disk.seen[8] == [], "three steps went by"
    assert disk.seen[9] == ["step_00000005"]
    for step in (10, NUM_STEPS):
        assert_same_checkpoint(tmp_path / "slow", tmp_path / "plain", step)


def test_the_state_saved_is_that_of_its_step(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, tmp_path / "slow", released_at=9)
    make_trainer(tmp_path / "slow", hooks=[disk], every_steps=5, keep_every_steps=1).fit()
    monkeypatch.undo()
    make_trainer(tmp_path / "plain", every_steps=5, keep_every_steps=1).fit()
    assert_same_checkpoint(tmp_path / "slow", tmp_path / "plain", 5)


def test_one_save_at_a_time(tmp_path, monkeypatch):
    """The save of step 4 is due while that of step 2 is under way, and waits for it."""
    disk = SlowDisk(monkeypatch, tmp_path, released_at=99)
    threading.Timer(0.5, disk.release.set).start()
    make_trainer(tmp_path, hooks=[disk], every_steps=2, keep_every_steps=1).fit()
    assert disk.seen[4] == []
    assert disk.seen[5][:1] == ["step_00000002"], "on the disk before the next was begun"
    assert len(list((tmp_path / "checkpoints").iterdir())) == NUM_STEPS // 2


def test_a_stop_waits_for_the_save_under_way_and_makes_its_own(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, tmp_path, released_at=99)

    class Stop(Hook):
        def after_step(self, result, trainer):
            if result.step == 6:
                (tmp_path / "STOP").touch()
                threading.Timer(0.3, disk.release.set).start()

    with pytest.raises(Preempted, match="after step 6"):
        make_trainer(tmp_path, hooks=[disk, Stop()], stop_file=tmp_path / "STOP").fit()
    assert [p.name for p in sorted((tmp_path / "checkpoints").iterdir())] == ["step_00000005", "step_00000006"]


def test_a_run_that_fails_lets_the_save_end(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, tmp_path, released_at=99)

    class Fail(Hook):
        def after_step(self, result, trainer):
            if result.step == 6:
                threading.Timer(0.3, disk.release.set).start()
                raise NumericalError("too bad")

    with pytest.raises(NumericalError):
        make_trainer(tmp_path, hooks=[disk, Fail()]).fit()
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 5


def test_a_rollback_goes_to_the_checkpoint_under_way(tmp_path, monkeypatch):
    disk = SlowDisk(monkeypatch, tmp_path, released_at=99)

    class GoBack(Hook):
        def after_step(self, result, trainer):
            if result.step == 6 and not trainer.state.rollbacks:
                threading.Timer(0.3, disk.release.set).start()
                trainer.request_rollback("asked for")

    trainer = make_trainer(tmp_path, hooks=[disk, GoBack()])
    trainer.fit()
    assert [(r["from_step"], r["to_step"]) for r in trainer.state.rollbacks] == [(6, 5)]


def test_an_error_of_our_own_ends_the_run_as_it_is(tmp_path):
    """What is no fault of the disk is not tried again."""
    trainer = make_trainer(tmp_path)

    class Break(Hook):
        def after_step(self, result, trainer):
            if result.step == 5:
                trainer.state.notes["odd"] = object()

    trainer.hooks.insert(0, Break())
    with pytest.raises(TypeError, match="not JSON serializable"):
        trainer.fit()
    assert latest_checkpoint(tmp_path) is None


def test_memory_of_a_copy_serves_again():
    from evatool.distributed.engines.sharded_state import ShardedState

    live = torch.arange(6.0).reshape(2, 3)
    copy = HostCopy()
    first = copy.take(ShardedState.whole({"a": live}))
    where = first.pieces[0].values.data_ptr()
    live.add_(1)
    assert torch.equal(first.pieces[0].values, torch.arange(6.0))
    second = copy.take(ShardedState.whole({"a": live}))
    assert second.pieces[0].values.data_ptr() == where
    assert torch.equal(second.pieces[0].values, live.flatten())


def test_a_save_that_a_rank_asks_for_is_asked_once():
    requests = StopRequests(torch.device("cpu"))
    with requests:
        requests.request_save()
        assert [requests.agreed(), requests.agreed()] == ["save", None]
