"""A stop while the training process waits for data that does not come (row R9 of docs/faults.md)."""

from __future__ import annotations

import contextlib
import os
import signal
import threading
import time
from collections.abc import Iterator

import pytest
from toy_run import NUM_STEPS, make_trainer

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.core.batch import Batch
from evatool.core.errors import Interrupted, Preempted
from evatool.core.loader import Loader


class StuckLoader(Loader):
    """The batches of another loader up to a step; then the source does not answer."""

    def __init__(self, loader: Loader, step: int, number: signal.Signals) -> None:
        self.loader, self.step, self.number, self.position = loader, step, number, loader.position
        self.is_closed = False

    def __iter__(self) -> Iterator[Batch]:
        try:
            for made, batch in enumerate(self.loader):
                if made == self.step:
                    threading.Timer(0.1, os.kill, (os.getpid(), self.number)).start()
                    with contextlib.suppress(Exception):  # as what reads a sample takes its errors for a bad one
                        time.sleep(60)
                yield batch
        finally:
            self.is_closed = True


def stuck_trainer(folder, step: int, number: signal.Signals):
    trainer = make_trainer(folder)
    trainer.loader = StuckLoader(trainer.loader, step, number)
    return trainer


@pytest.mark.parametrize(
    ("number", "kind"),
    [(signal.SIGTERM, Preempted), (signal.SIGUSR1, Preempted), (signal.SIGINT, Interrupted)],
    ids=["SIGTERM", "SIGUSR1", "Ctrl-C"],
)
def test_a_stop_is_obeyed_while_no_batch_comes(tmp_path, number, kind):
    whole = make_trainer(tmp_path / "whole").fit()
    trainer = stuck_trainer(tmp_path / "run", 7, number)
    start = time.monotonic()
    with pytest.raises(kind, match=f"after step 7 of {NUM_STEPS}"):
        trainer.fit()
    assert time.monotonic() - start < 20
    assert trainer.loader.is_closed
    assert load_checkpoint(latest_checkpoint(tmp_path / "run")).step == 7
    assert make_trainer(tmp_path / "run", resume=True).fit().position == whole.position
    files = [max((tmp_path / name / "checkpoints").iterdir()) / "model.safetensors" for name in ("whole", "run")]
    assert files[0].read_bytes() == files[1].read_bytes()


def test_before_the_first_step_there_is_nothing_to_save(tmp_path):
    with pytest.raises(Preempted, match="there is nothing to save"):
        stuck_trainer(tmp_path, 0, signal.SIGTERM).fit()
    assert latest_checkpoint(tmp_path) is None
