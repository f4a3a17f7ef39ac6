"""pretrain-mim with stored teacher features: the same run as with the teacher, which is not even loaded."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest
import torch
from safetensors.torch import load_file
from test_training_stages import StopAfter

from evatool.cli.store_features import store_features_report
from evatool.core.errors import DataError, Preempted, UsageError
from evatool.data.feature_store.store import FeatureStore
from evatool.recipe.load import resolve_table
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage
from evatool.stages.training import loop as training_loop
from evatool.stages.training import teachers
from evatool.train.hooks.log import read_metrics

pytestmark = pytest.mark.e2e

AUGMENT = ["data.augment.horizontal_flip=0.5", "data.augment.crop_scale=[0.3, 1.0]"]


def losses_of(result: Result) -> list[float]:
    return [r["train/loss"] for r in read_metrics(result.outputs["metrics"])]


def stored(path: Path, *more: str) -> list[str]:
    return [f"teacher.store.path={path}", "teacher.store.views=2", *AUGMENT, *more]


def fill(drawings: Path, teacher: Path, run_dir: Path, *overrides: str) -> Result:
    table: dict[str, Any] = {
        "data": {"train": str(drawings / "train")},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
        "train": {"samples_seen": 48, "global_batch_size": 8, "log_every": 1},
        "schedule": {"warmup_samples": 8},
        "teacher": {"model": str(teacher)},
    }
    resolved = resolve_table(table, "pretrain-mim", overrides=overrides)
    return run_stage(resolved, RunOptions(name="fill", run_dir=run_dir, resume=True), task="store-features")


@pytest.fixture
def no_teacher(monkeypatch: pytest.MonkeyPatch) -> None:
    """Loading a teacher is a failure."""

    def fail(*args: Any, **kwargs: Any) -> None:
        raise AssertionError("the teacher was loaded although all of its features are stored")

    monkeypatch.setattr(teachers, "load_clip", fail)
    monkeypatch.setattr(teachers, "load_timm_teacher", fail)


@pytest.fixture(scope="module")
def store(drawings: Path, clip_run: Result, tmp_path_factory: pytest.TempPathFactory) -> Path:
    """All rows of two views."""
    folder = tmp_path_factory.mktemp("store")
    result = fill(drawings, clip_run.run_dir, folder / "fill", *stored(folder / "rows"))
    count = json.loads((drawings / "train" / "manifest.json").read_text())["num_samples"]
    assert result.metrics["samples"] == count
    assert result.metrics["rows_made"] >= 2 * count
    assert result.metrics["store_bytes"] == 2 * count * (2 * 16 * 32 + 8)
    assert result.outputs["store patches"] == folder / "rows"
    again = fill(drawings, clip_run.run_dir, folder / "fill", *stored(folder / "rows"))
    assert again.metrics["rows_made"] == 0
    return folder / "rows"


@pytest.fixture(scope="module")
def live_losses(run_training: Any, clip_run: Result, tmp_path_factory: pytest.TempPathFactory) -> list[float]:
    """Of the same draws, with the teacher at every step and its features as they come."""
    folder = tmp_path_factory.mktemp("live")
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(FeatureStore, "read", lambda self, places: None)
        patch.setattr(FeatureStore, "keep", lambda self, batch, features: features)
        found = losses_of(run_training("pretrain-mim", folder / "run", *stored(folder / "s"), teacher=clip_run.run_dir))
        assert not list((folder / "s").glob("source*"))
    return found


def test_losses_are_the_live_teachers(run_training, clip_run, store, live_losses, no_teacher, tmp_path) -> None:
    run = run_training("pretrain-mim", tmp_path / "run", *stored(store), teacher=clip_run.run_dir)
    assert losses_of(run) == pytest.approx(live_losses, abs=1e-3)
    assert run.outputs["mim_pictures"].is_file()


def test_first_use_stores_and_gives_the_same_run(run_training, clip_run, store, tmp_path) -> None:
    path = tmp_path / "rows"
    first = run_training("pretrain-mim", tmp_path / "first", *stored(path), teacher=clip_run.run_dir)
    whole = run_training("pretrain-mim", tmp_path / "whole", *stored(store), teacher=clip_run.run_dir)
    assert losses_of(first) == losses_of(whole)  # to the last bit: computed or read
    with pytest.MonkeyPatch.context() as patch:
        patch.setattr(teachers, "load_clip", None)
        again = run_training("pretrain-mim", tmp_path / "again", *stored(path), teacher=clip_run.run_dir)
    assert losses_of(again) == losses_of(first)


def test_masked_only_rows_are_enough(run_training, clip_run, store, tmp_path) -> None:
    only = stored(tmp_path / "rows", "teacher.store.masked_only=true")
    runs = [run_training("pretrain-mim", tmp_path / n, *only, teacher=clip_run.run_dir) for n in ("one", "two")]
    whole = run_training("pretrain-mim", tmp_path / "whole", *stored(store), teacher=clip_run.run_dir)
    assert losses_of(runs[0]) == losses_of(runs[1]) == losses_of(whole)
    files = list((tmp_path / "rows").rglob("*.features"))
    kept = sum(file.stat().st_size for file in files)
    all_patches = sum((store / file.relative_to(tmp_path / "rows")).stat().st_size for file in files)
    assert kept < 0.5 * all_patches


def test_runs_of_other_seeds_share_a_store(run_training, clip_run, store, no_teacher, tmp_path) -> None:
    run = run_training("pretrain-mim", tmp_path / "run", *stored(store, "train.seed=5"), teacher=clip_run.run_dir)
    assert run.metrics["steps"] == 6


def test_a_resume_over_a_half_filled_store(run_training, clip_run, store, tmp_path, monkeypatch) -> None:
    """Bit for bit as uninterrupted, also where some rows are read and others made."""
    overrides = stored(tmp_path / "rows", "model.drop_path_rate=0.1")
    build = training_loop.build_hooks
    with monkeypatch.context() as patch:
        patch.setattr(training_loop, "build_hooks", lambda *args, **kw: [*build(*args, **kw), StopAfter(3)])
        with pytest.raises(Preempted):
            run_training("pretrain-mim", tmp_path / "run", *overrides, teacher=clip_run.run_dir)
    for file in list((tmp_path / "rows").rglob("*.features"))[::2]:
        file.unlink()
    resumed = run_training("pretrain-mim", tmp_path / "run", *overrides, teacher=clip_run.run_dir, resume=True)
    overrides = stored(store, "model.drop_path_rate=0.1")
    whole = run_training("pretrain-mim", tmp_path / "whole", *overrides, teacher=clip_run.run_dir)
    ours, theirs = (load_file(r.outputs["checkpoint"] / "model.safetensors") for r in (resumed, whole))
    assert all(torch.equal(ours[name], theirs[name]) for name in theirs)
    assert losses_of(resumed) == losses_of(whole)


def test_what_differs_is_named(run_training, clip_run, mim_run, store, drawings, tmp_path) -> None:
    changed = [*stored(store), "data.augment.horizontal_flip=0.1"]
    with pytest.raises(DataError, match=r"augment.horizontal_flip: stored with 0.5, now 0.1"):
        run_training("pretrain-mim", tmp_path / "a", *changed, teacher=clip_run.run_dir)
    other = run_training("train-clip", tmp_path / "other", "train.seed=1")
    with pytest.raises(DataError, match="teacher: stored with"):
        run_training("pretrain-mim", tmp_path / "b", *stored(store), teacher=other.run_dir)
    with pytest.raises(UsageError, match="stores no teacher's features"):
        fill(drawings, clip_run.run_dir, tmp_path / "c")


def test_the_command_fills_a_recipes_store(drawings, clip_run, tmp_path) -> None:
    """`evatool store-features` twice: its log stands beside the run's folder, and nothing is made again."""
    recipe = tmp_path / "mine.toml"
    recipe.write_text(
        f"""
stage = "pretrain-mim"
run_dir = "{tmp_path / "mine"}"
data.train = "{drawings / "train"}"
model.preset = "EVA02-CLIP-debug"
teacher.model = "{clip_run.run_dir}"
teacher.store.path = "{tmp_path / "rows"}"
optim.visual.lr = 1e-3
optim.grad_clip_norm = 1.0
train.samples_seen = 48
train.global_batch_size = 8
"""
    )
    shown = store_features_report(str(recipe), [], None, dry_run=True, debug=False)
    assert shown.data["derived"]["store.bytes_per_sample"] == 2 * 16 * 32 + 8
    made = store_features_report(str(recipe), [], None, dry_run=False, debug=False)
    assert made.data["metrics"]["rows_made"] > 0
    assert made.data["metrics"]["store_bytes"] == shown.data["derived"]["store.bytes"]
    assert (tmp_path / "mine-store-features" / "status.json").is_file()
    assert not (tmp_path / "mine").exists()
    again = store_features_report(str(recipe), [], None, dry_run=False, debug=False)
    assert again.data["metrics"]["rows_made"] == 0
    (tmp_path / "rows" / "source0" / "shard000000.view0.features").unlink()
    assert store_features_report(str(recipe), [], None, False, False).data["metrics"]["rows_made"] > 0
