"""A rank that the others wait for is named."""

from __future__ import annotations

import logging
import time
from pathlib import Path

import pytest
from toy_run import NUM_STEPS, make_trainer

from evatool.core.loader import Loader
from evatool.distributed.collectives import rank
from evatool.train.hooks.stragglers import Stragglers

pytestmark = pytest.mark.dist
Outcome = tuple[list[str], float, float]


class Late(Loader):
    """The last rank's batches come late."""

    def __init__(self, clean, sec):
        self.clean, self.position, self.sec = clean, clean.position, sec

    def __iter__(self):
        for batch in self.clean:
            time.sleep(self.sec if rank() == 1 else 0)
            yield batch


def train(folder: Path, sec: float, num_steps: int = NUM_STEPS, log_every: int = NUM_STEPS) -> Outcome:
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
    trainer = make_trainer(folder, hooks=[hook], num_steps=num_steps, log_every=log_every)
    trainer.loader = Late(trainer.loader, sec)
    state = trainer.fit()
    return lines, spent[0], state.train_sec


def test_a_slow_rank_is_named(run_on_ranks, tmp_path):
    (lines, spent, total), (others, *_) = run_on_ranks(train, 2, tmp_path, 0.3)
    assert len(lines) >= 1
    assert spent < 0.1 * total, "with logging on two of twelve steps; by default on one of ten"
    assert all("rank 1 on" in line and "is slow" in line for line in lines)
    assert not others, "only rank 0 says so"


@pytest.mark.slow
def test_a_slow_rank_is_named_within_fifty_steps_for_less_than_one_percent(run_on_ranks, tmp_path):
    outcomes = run_on_ranks(train, 2, tmp_path, 0.3, 50, 10)  # as often as is logged by default
    lines = outcomes[0][0]
    assert all("rank 1 on" in line and "is slow" in line for line in lines)
    assert any("(step 10)" in line for line in lines)
    for _, spent, total in outcomes:
        assert total > 50 * 0.3
        assert spent < 0.01 * total


def test_ranks_that_are_alike_are_not(run_on_ranks, tmp_path):
    assert run_on_ranks(train, 2, tmp_path, 0.0)[0][0] == []
