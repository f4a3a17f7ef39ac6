"""A whole train-clip on two ranks ends where one process ends."""

from __future__ import annotations

import json
from pathlib import Path

import pytest
import torch
from safetensors.torch import load_file

from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.stages.run_dir import RunOptions

pytestmark = [pytest.mark.dist, pytest.mark.e2e]


def train(data: Path, run_dir: Path) -> dict[str, float]:
    """Three steps of a CLIP at debug size; this rank's metrics."""
    table = {
        "data": {"train": str(data / "train")},
        "model": {"preset": "EVA02-CLIP-debug"},
        "objective": {"kind": "infonce", "positives": "equal-captions"},
        "optim": {"visual": {"lr": 1e-3}, "text": {"lr": 1e-3}, "grad_clip_norm": 1.0, "eps": 1e-3},
        "train": {"samples_seen": 24, "global_batch_size": 8, "log_every": 1},
    }
    return run_stage(resolve_table(table, "train-clip"), RunOptions(name="train-clip", run_dir=run_dir)).metrics


def test_two_ranks_end_where_one_process_ends(run_on_ranks, tmp_path):
    data = tmp_path / "data"
    source = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(source, "data-prepare"), RunOptions(name="data", run_dir=data))
    alone = train(data, tmp_path / "one")
    for metrics in run_on_ranks(train, 2, data, tmp_path / "two"):
        assert metrics["train/loss"] == pytest.approx(alone["train/loss"], rel=1e-5)
    one, two = (
        load_file(tmp_path / name / "checkpoints" / "step_00000003" / "model.safetensors") for name in ("one", "two")
    )
    assert one.keys() == two.keys()
    for name, tensor in two.items():
        torch.testing.assert_close(tensor, one[name], rtol=1e-4, atol=1e-6, msg=name)
    lines = (tmp_path / "two" / "metrics.jsonl").read_text().splitlines()
    assert [json.loads(line)["step"] for line in lines] == [1, 2, 3], "only rank 0 writes"
    assert (tmp_path / "two" / "logs" / "rank_00001.log").exists()
