"""`train-clip` with masked image modelling beside it: a run, its checkpoint, its export, its stores, its errors."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors import safe_open

from evatool import load_clip
from evatool.checkpoint.load import latest_checkpoint
from evatool.core.errors import RecipeError
from evatool.recipe.load import load_recipe, resolve_table
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

JOINT = ("objective.mim.weight=0.5",)


def metrics(run_dir: Path) -> list[dict[str, float]]:
    return [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]


@pytest.fixture(scope="module")
def joint_run(run_training, clip_run, tmp_path_factory):
    folder = tmp_path_factory.mktemp("joint") / "run"
    return run_training("train-clip", folder, *JOINT, teacher=clip_run.run_dir)


def test_a_run_logs_both_losses_and_their_sum(joint_run) -> None:
    rows = metrics(joint_run.run_dir)
    for row in rows:
        total = row["train/contrastive_loss"] + 0.5 * row["train/mim_loss"]
        assert row["train/loss"] == pytest.approx(total, rel=1e-5)
        assert -1 <= row["train/mim_loss"] <= 1
    assert rows[-1]["train/mim_loss"] < rows[0]["train/mim_loss"]


def test_the_model_is_an_ordinary_clip(joint_run, clip_run) -> None:
    checkpoint = latest_checkpoint(joint_run.run_dir)
    assert checkpoint is not None
    saved: set[str] = set()
    for file in checkpoint.rglob("*.safetensors"):
        with safe_open(file, "pt") as tensors:
            saved |= set(tensors.keys())
    assert any("mim_head" in name for name in saved), "a resumed run needs it"
    ours, plain = load_clip(joint_run.run_dir).model, load_clip(clip_run.run_dir).model
    assert ours.state_dict().keys() == plain.state_dict().keys()


@pytest.mark.slow
def test_an_export_has_the_model_alone(joint_run, tmp_path) -> None:
    table = {"export": {"checkpoint": str(joint_run.run_dir), "format": "open_clip"}}
    exported = run_stage(resolve_table(table, "export"), RunOptions(name="export", run_dir=tmp_path / "out"))
    ours, again = (load_clip(folder).model.state_dict() for folder in (joint_run.run_dir, exported.run_dir))
    assert again.keys() == ours.keys()
    assert all(torch.equal(again[name], tensor) for name, tensor in ours.items())


def test_small_batches_and_a_resume_change_nothing(joint_run, run_training, clip_run, tmp_path) -> None:
    whole = metrics(joint_run.run_dir)
    small = run_training("train-clip", tmp_path / "small", *JOINT, "train.micro_batch_size=4", teacher=clip_run.run_dir)
    for ours, theirs in zip(metrics(small.run_dir), whole, strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], rel=1e-4)

    folder = tmp_path / "resumed"
    sets = (*JOINT, "checkpoint.every_steps=2")
    (tmp_path / "resumed").mkdir()
    first = run_training("train-clip", folder / "run", *sets, teacher=clip_run.run_dir)
    assert metrics(first.run_dir)[-1]["train/loss"] == whole[-1]["train/loss"]
    # As a run killed after step 4 leaves it.
    checkpoints = sorted((first.run_dir / "checkpoints").iterdir())
    for name in ("result.json", "status.json"):
        (first.run_dir / name).unlink()
    shutil.rmtree(checkpoints[-1])
    run_training("train-clip", folder / "run", *sets, teacher=clip_run.run_dir, resume=True)
    resumed, uninterrupted = load_clip(first.run_dir).model, load_clip(joint_run.run_dir).model
    for name, tensor in uninterrupted.state_dict().items():
        assert torch.equal(resumed.state_dict()[name], tensor), name


@pytest.mark.slow
def test_stored_features_give_the_live_teacher_s_losses(run_training, clip_run, tmp_path) -> None:
    stored = (*JOINT, "teacher.store.views=1", f"teacher.store.path={tmp_path / 'store'}")
    live = run_training("train-clip", tmp_path / "live", *stored, teacher=clip_run.run_dir)  # writes as it goes
    shutil.rmtree(tmp_path / "store")
    fill = RunOptions(name="fill", run_dir=tmp_path / "fill", resume=True)
    made = run_stage(load_recipe(live.run_dir / "resolved.toml"), fill, task="store-features")
    assert made.metrics["rows_made"] >= made.metrics["samples"]
    read = run_training("train-clip", tmp_path / "read", *stored, teacher=clip_run.run_dir)
    for ours, theirs in zip(metrics(read.run_dir), metrics(live.run_dir), strict=True):
        assert ours["train/loss"] == pytest.approx(theirs["train/loss"], abs=1e-3)


# ---------------------------------------------------------------------------------------------------------- its errors


@pytest.mark.parametrize(
    ("sets", "words"),
    [
        (["objective.mim.weight=1.0"], ["objective.mim", r"[teacher]"]),
        (["teacher.model=x"], ["no effect", "distill"]),
        (
            ["objective.mim.weight=1.0", "teacher.model=x", "model.patch_dropout=0.5"],
            ["patch_dropout = 0.5", "two stages"],
        ),
        (
            ["objective.mim.weight=1.0", "teacher.model=x", "model.patch_dropout_schedule=[[64, 0.25]]"],
            ["0.25", "two stages"],
        ),
        (
            ["objective.mim.weight=1.0", "teacher.model=x", "model.lock.visual=all", "model.init.kind=clip"],
            ["frozen", "lock"],
        ),
        (["objective.mim.weight=0.0", "teacher.model=x"], ["objective.mim.weight", "greater than 0"]),
    ],
    ids=["no teacher", "no objective", "patch dropout", "its schedule", "frozen tower", "no weight"],
)
def test_what_does_not_go_together_is_refused_with_a_way_out(sets: list[str], words: list[str]) -> None:
    extra = ["model.init.path=x"] if "model.init.kind=clip" in sets else []
    with pytest.raises(RecipeError) as caught:
        load_recipe("demo/train-clip", overrides=[*sets, *extra])
    said = str(caught.value)
    for word in words:
        assert word in said, said


def test_a_tower_without_mask_tokens_is_refused(run_training, clip_run, tmp_path) -> None:
    with pytest.raises(RecipeError, match="mask tokens") as caught:
        run_training("train-clip", tmp_path / "run", *JOINT, "model.preset=OpenCLIP-B-16", teacher=clip_run.run_dir)
    assert "objective.mim" in str(caught.value.where)
