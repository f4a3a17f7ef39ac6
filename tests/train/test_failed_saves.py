"""A save that fails does not end a run at once (row R6 of docs/faults.md)."""

from __future__ import annotations

import errno
import logging
import os

import pytest
from toy_run import NUM_STEPS, let_saves_end, make_trainer

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.errors import ExitCode, TransientError
from evatool.train.hooks.base import Hook


class FullDisk(Hook):
    """Nothing can be flushed from one step on, until another."""

    def __init__(self, first: int, last: int) -> None:
        self.first, self.last, self.fsync = first, last, os.fsync

    def after_step(self, result, trainer):
        let_saves_end()  # that of the step before, on the disk as it was then
        os.fsync = self._fail if self.first <= result.step <= self.last else self.fsync

    def close(self):
        os.fsync = self.fsync

    @staticmethod
    def _fail(descriptor):
        raise OSError(errno.ENOSPC, os.strerror(errno.ENOSPC))


def test_training_goes_on_and_the_save_is_tried_again(tmp_path, monkeypatch, caplog):
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)
    state = make_trainer(tmp_path, hooks=[FullDisk(5, 6)], every_steps=5).fit()
    assert state.step == NUM_STEPS
    warnings = [record.message for record in caplog.records if "the state is saved again" in record.message]
    assert len(warnings) == 2
    assert "the disk is full" in warnings[0]
    names = sorted(path.name for path in (tmp_path / "checkpoints").iterdir())
    assert names == ["step_00000010", "step_00000012"], "that of step 7 was made, and has made room since"


def test_three_failures_in_a_row_end_the_run_as_one_to_try_again(tmp_path):
    with pytest.raises(TransientError, match="3 saves in a row failed; the last: the disk is full") as error:
        make_trainer(tmp_path, hooks=[FullDisk(8, 99)], every_steps=2).fit()
    assert error.value.exit_code == ExitCode.TRANSIENT
    assert "--resume" in (error.value.fix or "")
    assert load_checkpoint(latest_checkpoint(tmp_path)).step == 6, "the earlier one is intact"
