"""Stopped after any of twenty steps and resumed, a run is the uninterrupted one, bit for bit (R1 of
docs/faults.md).
"""

from __future__ import annotations

import random
import signal
import time

import pytest
import torch
import toy_run
from test_trainer import SignalAt, losses_of
from toy_run import make_trainer

from evatool.core.errors import Preempted

STEPS = 20


def test_every_step_of_twenty(tmp_path, monkeypatch):
    monkeypatch.setattr(toy_run, "NUM_STEPS", STEPS)
    whole = make_trainer(tmp_path / "whole")
    whole.fit()
    expected = whole.engine.model_state() | whole.engine.optimizer_state()
    for stop_at in range(1, STEPS):
        folder = tmp_path / f"stopped{stop_at}"
        with pytest.raises(Preempted):
            make_trainer(folder, hooks=[SignalAt(stop_at, signal.SIGTERM)]).fit()
        resumed = make_trainer(folder, resume=True)
        assert resumed.state.step == stop_at
        resumed.fit()
        found = resumed.engine.model_state() | resumed.engine.optimizer_state()
        assert found.keys() == expected.keys()
        different = [name for name in expected if not torch.equal(found[name], expected[name])]
        assert not different, f"stopped after step {stop_at}"
        assert losses_of(folder) == losses_of(tmp_path / "whole")


def test_no_decision_depends_on_the_wall_clock(tmp_path, monkeypatch):
    """R27: a clock that jumps by up to a day, back and forth, at every look at it."""
    make_trainer(tmp_path / "whole").fit()
    pick = random.Random(0)
    real = time.time
    monkeypatch.setattr(time, "time", lambda: real() + pick.uniform(-86_400, 86_400))
    folder = tmp_path / "jumping"
    with pytest.raises(Preempted):
        make_trainer(folder, hooks=[SignalAt(7, signal.SIGTERM)], save_every_sec=3600.0).fit()
    assert [path.name for path in sorted((folder / "checkpoints").iterdir())] == ["step_00000005", "step_00000007"]
    make_trainer(folder, resume=True, save_every_sec=3600.0).fit()
    assert losses_of(folder) == losses_of(tmp_path / "whole")
    models = [max((tmp_path / name / "checkpoints").iterdir()) / "model.safetensors" for name in ("whole", "jumping")]
    assert models[0].read_bytes() == models[1].read_bytes()
