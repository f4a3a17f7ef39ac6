"""Distillation on real drawings at debug size: several teachers, stored embeddings, weights over the run."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file, save_file

from evatool.core.errors import DataError, Preempted, RecipeError
from evatool.inference.loaded_clip import load_clip
from evatool.recipe.load import resolve_table
from evatool.recipe.write import to_table
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage
from evatool.stages.training import teachers
from evatool.train.signals import StopRequests

LARGER, OTHER = "EVA02-CLIP-toy", "EVA-CLIP-8B-debug"  # 48 pixels and width 128; 32 pixels and width 32


def losses_of(result: Result) -> list[dict[str, float]]:
    return [json.loads(line) for line in (result.run_dir / "metrics.jsonl").read_text().splitlines()]


def several(*names: str, store: Path | None = None) -> list[str]:
    """Overrides for teachers `a`, `b`, ... in the place of one."""
    found = []
    for letter, name in zip("abc", names, strict=False):
        table = f'model = "{name}"'
        if store is not None:
            table += f', store = {{ views = 8, path = "{store / letter}" }}'
        found.append(f"teachers.{letter}={{ {table} }}")
    return found


@pytest.fixture
def loads(monkeypatch) -> list[str]:
    """What teachers were loaded."""
    seen: list[str] = []
    load = teachers.load_clip
    monkeypatch.setattr(teachers, "load_clip", lambda model, **kw: (seen.append(str(model)), load(model, **kw))[1])
    return seen


def test_several_teachers_of_other_sizes_teach_with_all_losses(run_training, tmp_path) -> None:
    result = run_training(
        "distill",
        tmp_path / "run",
        *several(LARGER, OTHER),
        "objective.relation_weight=1.0",
        "objective.interactive_weight=0.5",
        "objective.feature_loss=mse",
        "train.micro_batch_size=4",
    )
    records = losses_of(result)
    names = [f"train/{part}_loss/{name}" for part in ("feature", "logit", "relation", "interactive") for name in "ab"]
    assert all(name in record for name in names for record in records)
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    held = load_file(result.outputs["checkpoint"] / "model.safetensors")
    assert set(held) == set(load_clip("EVA02-CLIP-debug").model.state_dict()) & set(held)
    assert not any("_projection." in name for name in held), "a student is a CLIP, without what teachers need of it"


def test_a_sigmoid_distillation_runs(run_training, clip_run, tmp_path) -> None:
    overrides = ["objective.loss=sigmoid", "teacher.bias=-2.0", "objective.interactive_weight=1.0"]
    result = run_training("distill", tmp_path / "run", *overrides, teacher=clip_run.run_dir)
    records = losses_of(result)
    assert records[-1]["train/loss"] < records[0]["train/loss"]
    assert records[0]["train/logit_bias"] != records[-1]["train/logit_bias"]
    assert "stuck_at_start" not in result.metrics


# ------------------------------------------------------------------------------------------------ stored embeddings


def test_stored_embeddings_teach_as_the_live_teacher(run_training, clip_run, tmp_path, loads) -> None:
    """Of the same draws: at every step's loss to 1e-3; a run that finds them is that which wrote them, bit for bit."""
    store = [f"teacher.store.path={tmp_path / 'store'}", "teacher.store.views=8"]
    live = run_training("distill", tmp_path / "live", teacher=clip_run.run_dir)
    first = run_training("distill", tmp_path / "first", *store, teacher=clip_run.run_dir)
    assert len(loads) == 2
    second = run_training("distill", tmp_path / "second", *store, teacher=clip_run.run_dir)
    assert len(loads) == 2, "with all rows there the teacher is never run, nor even read"
    for a, b in zip(losses_of(live), losses_of(first), strict=True):
        for key in ("train/loss", "train/feature_loss", "train/logit_loss"):
            assert b[key] == pytest.approx(a[key], rel=1e-3, abs=1e-3)
    weights = [load_file(r.outputs["checkpoint"] / "model.safetensors") for r in (first, second)]
    assert all(torch.equal(weights[0][name], weights[1][name]) for name in weights[0])


@pytest.mark.slow
def test_stores_are_filled_ahead_of_time(run_training, drawings, clip_run, tmp_path, loads) -> None:
    """Two teachers at other sizes and contexts: a training run then reads both and runs neither."""
    table = {
        "data": {"train": str(drawings / "train")},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 48, "global_batch_size": 8},
    }
    torch.manual_seed(0)
    overrides = several(str(clip_run.run_dir), str(saved_clip(LARGER, tmp_path)), store=tmp_path / "store")
    resolved = resolve_table(table, "distill", overrides=overrides)
    done = run_stage(resolved, RunOptions("ahead", run_dir=tmp_path / "ahead"), task="store-features")
    assert done.metrics["rows_made"] == 8 * done.metrics["samples"]
    assert done.metrics["store_bytes"] == done.metrics["rows_made"] * (2 * 2 * (32 + 128) + 16)
    loads.clear()
    stored = run_training("distill", tmp_path / "stored", *overrides)
    assert loads == []
    live = [text.split(", store")[0] + " }" for text in overrides]
    for a, b in zip(losses_of(run_training("distill", tmp_path / "live", *live)), losses_of(stored), strict=True):
        assert b["train/loss"] == pytest.approx(a["train/loss"], rel=1e-3)


def saved_clip(preset: str, folder: Path) -> Path:
    clip, path = load_clip(preset), folder / preset
    path.mkdir()
    save_file({name: p.contiguous() for name, p in clip.model.named_parameters()}, path / "model.safetensors")
    (path / "model_config.json").write_text(json.dumps(clip.config.to_json()))
    return path


def test_a_store_of_another_teacher_is_refused(run_training, clip_run, mim_run, tmp_path) -> None:
    store = [f"teacher.store.path={tmp_path / 'store'}", "teacher.store.views=2"]
    run_training("distill", tmp_path / "first", *store, teacher=clip_run.run_dir)
    with pytest.raises(DataError, match=r"teacher\.picture: stored with 32, now 48"):
        run_training("distill", tmp_path / "other", *store, teacher=LARGER)


# ------------------------------------------------------------------------------------------------ weights and resume


def test_weights_over_the_run_are_recorded_and_go_on_after_a_resume(
    run_training, clip_run, tmp_path, monkeypatch
) -> None:
    weights = ["objective.feature_weight=[[0, 4.0], [32, 0.0]]", "checkpoint.every_steps=2"]
    whole = run_training("distill", tmp_path / "whole", *weights, teacher=clip_run.run_dir)
    assert [r["train/weight/feature_loss"] for r in losses_of(whole)] == [4, 3, 2, 1, 0, 0]
    with monkeypatch.context() as patch:
        asked = iter([None, None, "SIGTERM"])
        patch.setattr(StopRequests, "agreed", lambda self: next(asked))
        with pytest.raises(Preempted):
            run_training("distill", tmp_path / "stopped", *weights, teacher=clip_run.run_dir)
    resumed = run_training("distill", tmp_path / "stopped", *weights, teacher=clip_run.run_dir, resume=True)
    a, b = (load_file(r.outputs["checkpoint"] / "model.safetensors") for r in (whole, resumed))
    assert all(torch.equal(a[name], b[name]) for name in a)


# ---------------------------------------------------------------------------------------------------------- recipes

BASE = {
    "data": {"train": "t"},
    "model": {"preset": "EVA02-CLIP-debug"},
    "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
    "train": {"samples_seen": 48, "global_batch_size": 8},
}
REFUSED = {
    "no teacher": ([], "there is no teacher"),
    "two ways": (["teacher.model=a", "teachers.b.model=b"], "both teacher and teachers are given"),
    "name": (["teachers.B-1.model=b"], "B-1"),
    "nothing taught": (
        ["teacher.model=a", "objective.feature_weight=0.0", "objective.logit_weight=0.0"],
        "nothing is distilled; use train-clip",
    ),
    "one point": (["teacher.model=a", "objective.logit_weight=[[0, 1.0]]"], "needs two or more"),
    "falling": (["teacher.model=a", "objective.logit_weight=[[9, 1.0], [5, 0.0]]"], "rising order"),
    "bias missing": (["teacher.model=a", "objective.loss=sigmoid"], "teacher.bias is missing"),
    "bias in vain": (["teachers.b={ model = 'b', bias = -3.0 }"], "teachers.b.bias is part of"),
    "temperature in vain": (
        ["teacher={ model = 'b', temperature = 0.1 }", "objective.logit_weight=0.0"],
        "teacher.temperature has no effect",
    ),
    "scale of a softmax": (["teacher.model=a", "objective.initial_scale=5.0"], 'set loss = "sigmoid"'),
    "one stored": (
        ["teachers.a={ model = 'a', store = {} }", "teachers.b.model=b"],
        "teachers.b has no store, but teachers.a has one",
    ),
    "other views": (
        ["teachers.a={ model = 'a', store = { views = 2 } }", "teachers.b={ model = 'b', store = {} }"],
        "give all the same views and seed",
    ),
    "one folder": (
        ["teachers.a={ model = 'a', store = { path = 's' } }", "teachers.b={ model = 'b', store = { path = 's' } }"],
        "two teachers share the store s",
    ),
}


@pytest.mark.parametrize(("overrides", "message"), REFUSED.values(), ids=REFUSED.keys())
def test_combinations_without_sense_are_refused(overrides: list[str], message: str) -> None:
    with pytest.raises(RecipeError) as error:
        resolve_table(BASE, "distill", overrides=overrides)
    assert message in str(error.value)


def test_weights_that_change_survive_writing() -> None:
    overrides = ["teachers.a.model=x", "objective.logit_weight=[[0, 1], [100, 0.5]]"]
    recipe = resolve_table(BASE, "distill", overrides=overrides).recipe
    assert resolve_table(to_table(recipe), "distill").recipe == recipe
    assert recipe.objective.logit_weight == ((0, 1.0), (100, 0.5))
