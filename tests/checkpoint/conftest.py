"""A tiny run to save, and warnings that caplog can see."""

from __future__ import annotations

import logging
from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest
import torch

from evatool.checkpoint.save import save_run
from evatool.distributed.engines.sharded_state import ShardedState


@pytest.fixture(autouse=True)
def _records_reach_caplog(monkeypatch):
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)


@pytest.fixture
def save(tmp_path) -> Callable[..., Path]:
    """`save(step)` writes a small checkpoint whose weights all equal the step."""

    def save(step: int, keep: int = 3, folder: Path | None = None, has_extra: bool = True, **more: Any) -> Path:
        state = {"model.weight": torch.full((3, 2), float(step)), "model.scale": torch.full((1,), float(step))}
        if has_extra:
            state["projection.weight"] = torch.full((2,), float(step))
        return save_run(
            folder or tmp_path / "checkpoints",
            step,
            objective_state=ShardedState.whole(state),
            optimizer_state=ShardedState.whole({f"exp_avg.{name}": tensor / 2 for name, tensor in state.items()}),
            groups=[{"name": "visual/decay", "lr": 1e-3, "parameters": list(state)}],
            train_state={"step": step, "samples_seen": 8 * step},
            model_config={"task": "clip", "name": "tiny"},
            keep=keep,
            **({"resolved_toml": 'stage = "train-clip"\n'} | more),
        )

    return save
