"""A rank that the others wait for is named."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from toy_run import NUM_STEPS, make_trainer

from evatool.distributed.collectives import rank
from evatool.train.hooks.stragglers import Stragglers

pytestmark = pytest.mark.dist


class Late:
    """The last rank's batches come late."""

    def __init__(self, clean, sec):
        self.clean, self.position, self.sec = clean, clean.position, sec

    def __iter__(self):
        for batch in self.clean:
            time.sleep(self.sec if rank() == 1 else 0)
            yield batch


def train(folder: Path, sec: float) -> tuple[list[str], float, float]:
    """The warnings of rank 0, and the seconds spent on looking and on all steps."""
    lines: list[str] = []
    handler = logging.Handler()
    handler.emit = lambda record: lines.append(record.getMessage())
    logger = logging.getLogger("evatool.train.hooks.stragglers")
    logger.addHandler(handler)
    hook = Stragglers()
    spent = [0.0]
    look = hook.after_step

    def timed(*args):
        start = time.perf_counter()
        look(*args)
        spent[0] += time.perf_counter() - start

    hook.after_step = timed
    trainer = make_trainer(folder, hooks=[hook], log_every=NUM_STEPS)
    trainer.loader = Late(trainer.loader, sec)
    state = trainer.fit()
    return lines, spent[0], state.train_sec


def test_a_slow_rank_is_named(run_on_ranks, tmp_path):
    (lines, spent, total), (others, *_) = run_on_ranks(train, 2, tmp_path, 0.3)
    assert len(lines) >= 1
    assert spent < 0.1 * total, "with logging on two of twelve steps; by default on one of ten"
    assert all("rank 1 on" in line and "is slow" in line for line in lines)
    assert not others, "only rank 0 says so"


def test_ranks_that_are_alike_are_not(run_on_ranks, tmp_path):
    assert run_on_ranks(train, 2, tmp_path, 0.0)[0][0] == []
