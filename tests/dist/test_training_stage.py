"""A whole train-clip on two ranks ends where one process ends."""

from __future__ import annotations

import json
import shutil
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.runs.run_dir import RunOptions

pytestmark = [pytest.mark.dist, pytest.mark.e2e]


DROPOUT = {"model": {"patch_dropout": 0.5, "drop_path_rate": 0.2}}
SAVES = {"checkpoint": {"every_steps": 1, "keep": 3}}


def train(data: Path, run_dir: Path, resume: bool = False, **more: dict) -> dict[str, float]:
    """Three steps of a CLIP at debug size; this rank's metrics. `more` is merged into the recipe's tables."""
    table = {
        "data": {"train": str(data / "train")},
        "model": {"preset": "EVA02-CLIP-debug"},
        "objective": {"kind": "infonce", "positives": "equal-captions"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}, "grad_clip_norm": 1.0, "eps": 1e-3},
        "train": {"samples_seen": 24, "global_batch_size": 8, "log_every": 1},
    }
    for name, settings in more.items():
        table[name] = table.get(name, {}) | settings
    return run_stage(resolve_table(table, "train-clip"), RunOptions(name="train-clip", run_dir=run_dir, resume=resume)).metrics


def train_with_dropout(data: Path, run_dir: Path, resume: bool = False) -> dict[str, float]:
    return train(data, run_dir, resume, **DROPOUT, **SAVES)


@pytest.mark.parametrize("num_ranks", [2, pytest.param(4, marks=pytest.mark.slow)])
def test_ranks_end_where_one_process_ends(run_on_ranks, tmp_path, num_ranks):
    """With patch dropout and stochastic depth as a run draws them; four ranks also go on with its first step."""
    data = tmp_path / "data"
    source = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(source, "data-prepare"), RunOptions(name="data", run_dir=data))
    alone = train_with_dropout(data, tmp_path / "one")
    for metrics in run_on_ranks(train_with_dropout, num_ranks, data, tmp_path / "two"):
        assert metrics["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-5)
    one, runs = tmp_path / "one", ["two"]
    later = shutil.ignore_patterns("step_00000002", "step_00000003", "result.json", "lease.json")
    if num_ranks > 2:  # in the slow part
        shutil.copytree(one, tmp_path / "resumed", ignore=later)
        (tmp_path / "resumed" / "status.json").write_text('{"state": "preempted"}')
        run_on_ranks(train_with_dropout, num_ranks, data, tmp_path / "resumed", True)
        runs.append("resumed")
    expected = load_file(one / "checkpoints" / "step_00000003" / "model.safetensors")
    for run in runs:
        found = load_file(tmp_path / run / "checkpoints" / "step_00000003" / "model.safetensors")
        assert expected.keys() == found.keys()
        for name, tensor in found.items():
            torch.testing.assert_close(tensor, expected[name], rtol=1e-4, atol=1e-6, msg=f"{run}: {name}")
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3], "only rank 0 writes"
    assert (tmp_path / "two" / "logs" / "rank_00001.log").exists()


CELLS = {"ddp": {"kind": "ddp"}, "fsdp2": {"kind": "fsdp2"}, "zero3": {"kind": "deepspeed", "zero_stage": 3}}


def asked(data: Path) -> dict[str, dict]:
    sets = sorted(path.name for path in (data / "eval").iterdir())[:2]
    return {"train": {"ema_decay": 0.5}, "evaluate": {"every_steps": 2, "data": str(data / "eval"), "sets": sets}}


def train_cell(data: Path, run_dir: Path, engine: dict) -> None:
    train(data, run_dir, engine=engine, **asked(data))


@pytest.fixture(scope="module")
def alone(tmp_path_factory) -> Path:
    """A folder with prepared data and the run of one process."""
    folder = tmp_path_factory.mktemp("alone")
    source = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(source, "data-prepare"), RunOptions(name="data", run_dir=folder / "data"))
    train(folder / "data", folder / "one", **asked(folder / "data"))
    return folder


@pytest.mark.parametrize(
    "name", ["fsdp2", pytest.param("ddp", marks=pytest.mark.slow), pytest.param("zero3", marks=pytest.mark.slow)]
)
def test_average_evaluation_and_mfu_of_two_ranks_are_those_of_one(run_on_ranks, alone, tmp_path, name):
    """On every way to hold weights: the figures of `[evaluate]`, the moving average, and a share of the ranks' peak."""
    run_on_ranks(train_cell, 2, alone / "data", tmp_path, CELLS[name])
    records, expected = (
        [json.loads(line) for line in (path / "metrics.jsonl").read_text().splitlines()]
        for path in (tmp_path, alone / "one")
    )
    keys = {key for key in expected[1] if key.startswith("eval/")}
    assert keys
    for ours, theirs in zip(records, expected, strict=True):
        assert {key for key in ours if key.startswith("eval/")} == (keys if ours["step"] > 1 else set())
        assert all(ours[key] == pytest.approx(theirs[key], abs=1e-6) for key in keys & set(ours))
        assert 0 < ours["throughput/mfu"] < 1
    found, average = (
        load_file(path / "checkpoints" / "step_00000003" / "ema.safetensors") for path in (tmp_path, alone / "one")
    )
    assert found.keys() == average.keys()
    for tensor_name, tensor in found.items():
        torch.testing.assert_close(tensor, average[tensor_name], rtol=1e-4, atol=1e-6, msg=tensor_name)
