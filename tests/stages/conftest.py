"""Real drawings, prepared once, and stages on them at debug size."""

from __future__ import annotations

from collections.abc import Callable
from pathlib import Path
from typing import Any

import pytest

from evatool.recipe.load import resolve_table
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

BATCH, STEPS = 8, 6


@pytest.fixture(scope="session")
def drawings(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of data-prepare on a handful of concepts."""
    folder = tmp_path_factory.mktemp("drawings") / "data"
    table = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(table, "data-prepare"), RunOptions(name="data", run_dir=folder))
    return folder


Run = Callable[..., Result]


@pytest.fixture(scope="session")
def run_training(drawings: Path) -> Run:
    """`run(stage, run_dir, *overrides, teacher=None, ...)` runs a stage for `STEPS` steps; more are a run's options."""

    def run(stage: str, run_dir: Path, *overrides: str, teacher: object = None, **options: Any) -> Result:
        table: dict[str, Any] = {
            "data": {"train": str(drawings / "train")},
            "model": {"preset": "EVA02-CLIP-debug"},
            "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
            "train": {"samples_seen": STEPS * BATCH, "global_batch_size": BATCH, "log_every": 1},
            "schedule": {"warmup_samples": BATCH},
        }
        if stage != "pretrain-mim":
            table["optim"]["text"] = {"lr": 1e-3}
        if teacher is not None:
            table["teacher"] = {"model": str(teacher)}
        resolved = resolve_table(table, stage, overrides=overrides)
        return run_stage(resolved, RunOptions(name=stage, run_dir=run_dir, **options))

    return run


@pytest.fixture(scope="session")
def clip_run(run_training: Run, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished train-clip run."""
    return run_training("train-clip", tmp_path_factory.mktemp("clip") / "run")


@pytest.fixture(scope="session")
def mim_run(run_training: Run, clip_run: Result, tmp_path_factory: pytest.TempPathFactory) -> Result:
    """A finished pretrain-mim run whose teacher is `clip_run`."""
    return run_training("pretrain-mim", tmp_path_factory.mktemp("mim") / "run", teacher=clip_run.run_dir)
