"""kill -9 while a checkpoint is written beside the training, on each rank (rows R4 and R10 of
docs/faults.md).
"""

from __future__ import annotations

import os
import shutil
import signal
import threading
from pathlib import Path

import pytest
import torch
from toy_run import LetSavesEnd, make_trainer

from evatool.checkpoint import layout
from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.distributed.collectives import rank

pytestmark = pytest.mark.dist
EVERY = 3


def train(folder: Path, killed_rank: int | None = None, kill_at: int = -1) -> int:
    """Train on, from the newest checkpoint where there is one; returns how often this rank changed the disk in the
    second save that it made.

    Args:
        kill_at: this process is gone before its so many'th change.
    """
    counts, writers = [0], []

    def counted(function):
        def wrapped(*args, **kwargs):
            thread = threading.current_thread()
            if thread.name == "checkpoint writer" and thread not in writers:
                writers.append(thread)
            if writers[1:2] == [thread]:
                if rank() == killed_rank and counts[0] == kill_at:
                    os.kill(os.getpid(), signal.SIGKILL)
                counts[0] += 1
            return function(*args, **kwargs)

        return wrapped

    resume = bool(layout.steps_in(folder / "checkpoints"))
    trainer = make_trainer(folder, every_steps=EVERY, resume=resume, hooks=[LetSavesEnd()], keep_every_steps=EVERY)
    for owner, name in (
        *((os, name) for name in ("fsync", "replace")),
        *((Path, name) for name in ("mkdir", "open", "unlink")),
        (shutil, "rmtree"),
        (layout.HashingFile, "write"),
    ):
        setattr(owner, name, counted(getattr(owner, name)))
    trainer.fit()
    return counts[0]


def assert_whole(newest: Checkpoint, whole: Path) -> None:
    one, other = newest, load_checkpoint(whole / "checkpoints" / newest.path.name)
    for ours, theirs in ((one.objective_state, other.objective_state), (one.optimizer_state, other.optimizer_state)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.parametrize(
    ("num_ranks", "killed_rank", "every"),
    [
        (1, 0, 21),
        (2, 0, 23),
        (2, 1, 9),
        pytest.param(1, 0, 1, marks=pytest.mark.slow),
        pytest.param(2, 0, 1, marks=pytest.mark.slow),
        pytest.param(2, 1, 1, marks=pytest.mark.slow),
    ],
    ids=lambda value: str(value),
)
def test_killed_at_write_boundaries(start_ranks, run_on_ranks, tmp_path, num_ranks, killed_rank, every):
    num_changes = run_on_ranks(train, num_ranks, tmp_path / "whole")[killed_rank]
    assert num_changes > 8
    found = set()
    for kill_at in range(0, num_changes, every):
        folder = tmp_path / f"killed{kill_at}"
        ranks = start_ranks(train, num_ranks, folder, killed_rank, kill_at)
        ranks.processes[killed_rank].join(timeout=60)
        assert ranks.processes[killed_rank].exitcode == -signal.SIGKILL, kill_at
        for process in ranks.processes:
            process.join(timeout=60)
        ranks.close()
        newest = load_checkpoint(latest_checkpoint(folder))
        assert_whole(newest, tmp_path / "whole")
        found.add(newest.step)
    assert found <= {EVERY, 2 * EVERY}, "the one before, or the one that was being written"
    assert EVERY in found
    run_on_ranks(train, num_ranks, folder)
    assert_whole(load_checkpoint(latest_checkpoint(folder)), tmp_path / "whole")
    assert not layout.unfinished_in(folder / "checkpoints"), "what was left behind is cleared away"
