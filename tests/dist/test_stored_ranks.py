"""Stored teacher features over ranks: filled together, read together, under ZeRO-2, and resumed on another number."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import save_file

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.stages.training import teachers
from evatool.runs.run_dir import RunOptions

pytestmark = [pytest.mark.dist, pytest.mark.e2e]
ENGINE = {"kind": "deepspeed", "zero_stage": 2}


def table(folder: Path, store: str | None, engine: dict[str, Any]) -> dict[str, Any]:
    """Four steps at debug size; with all rows of two views of some hundred samples."""
    return {
        "data": {"train": str(folder / "data" / "train"), "augment": {"horizontal_flip": 0.5}},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0, "eps": 1e-3},
        "train": {"samples_seen": 32, "global_batch_size": 8, "log_every": 1},
        "teacher": {"model": str(folder / "clip.safetensors")}
        | ({} if store is None else {"store": {"path": str(folder / store), "views": 2}}),
        "engine": engine,
        "validation": {"data": str(folder / "data" / "train"), "every_steps": 2, "max_samples": 21},
    }


def losses(folder: Path, store: str, engine: dict[str, Any], name: str, *, may_load: bool = True) -> list[float]:
    """Each step's loss of a whole run, and its validations'; without `may_load` loading a teacher is a failure."""
    with pytest.MonkeyPatch.context() as patch:
        if not may_load:
            patch.setattr(teachers, "load_clip", None)
        resolved = resolve_table(table(folder, store, engine), "pretrain-mim")
        run_stage(resolved, RunOptions(name="mim", run_dir=folder / name))
    records = [json.loads(line) for line in (folder / name / "metrics.jsonl").read_text().splitlines()]
    validations = [record["val/loss"] for record in records if "val/loss" in record]
    assert len(validations) == 2
    return [*(record["train/loss"] for record in records), *validations]


def fill(folder: Path, store: str) -> dict[str, Any]:
    resolved = resolve_table(table(folder, store, {}), "pretrain-mim")
    options = RunOptions(name="fill", run_dir=folder / f"fill-{store}", resume=True)
    return run_stage(resolved, options, task="store-features").metrics


def read_only(folder: Path, store: str, engine: dict[str, Any], name: str) -> list[float]:
    return losses(folder, store, engine, name, may_load=False)


@pytest.fixture(scope="module")
def folder(tmp_path_factory):
    folder = tmp_path_factory.mktemp("stored")
    source = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(source, "data-prepare"), RunOptions(name="data", run_dir=folder / "data"))
    torch.manual_seed(11)
    clip = build_clip(resolve_preset("EVA02-CLIP-debug"))
    save_file({key: tensor.clone() for key, tensor in clip.state_dict().items()}, folder / "clip.safetensors")
    return folder


def test_ranks_store_on_first_use(run_on_ranks, folder):
    """What two ranks under ZeRO-2 stored on the way is enough for one process, which learns and validates the same."""
    first = run_on_ranks(losses, 2, folder, "first", ENGINE, "first-two")
    assert first[0] == first[1]
    assert read_only(folder, "first", {}, "first-one") == pytest.approx(first[0], rel=1e-5)


@pytest.mark.slow
def test_ranks_fill_and_read_together(run_on_ranks, folder):
    """Two ranks fill; two under ZeRO-2 and one alone read, without a teacher."""
    made, same = (metrics["rows_made"] for metrics in run_on_ranks(fill, 2, folder, "ahead"))
    found, again = run_on_ranks(read_only, 2, folder, "ahead", ENGINE, "zero2")
    count = json.loads((folder / "data" / "train" / "manifest.json").read_text())["num_samples"]
    assert made == same >= 2 * count
    assert fill(folder, "ahead")["rows_made"] == 0
    alone = read_only(folder, "ahead", {}, "alone")
    assert found == again == pytest.approx(alone, rel=1e-5)
