"""Training stages on engines that divide weights: no rank ever holds all of them, and the run is the one process's."""

from __future__ import annotations

import json
from dataclasses import replace
from pathlib import Path
from typing import Any

import pytest
import torch
from live_bytes import LiveBytes
from safetensors.torch import save_file

from evatool.distributed.collectives import rank, world_size
from evatool.distributed.world import World
from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.stages.training import build as wiring
from evatool.runs.run_dir import RunDir, RunOptions

pytestmark = [pytest.mark.dist, pytest.mark.e2e]

DEBUG = resolve_preset("EVA02-CLIP-debug")
# Its embedding of 49,408 tokens is most of it; here no tensor is more than a small part of the whole.
DEEP = replace(DEBUG, text={**DEBUG.text, "vocab_size": 64, "layers": 12})
ENGINES = [{"kind": "fsdp2"}, {"kind": "deepspeed", "zero_stage": 3}]
PEAK = {"fsdp2": 1.65, "deepspeed": 2.75}
"""Most bytes on one of two ranks, as a share of all weights. Half of each: weights and two moments; under ZeRO a master
copy and gradients too, and whole weights below 1e5 numbers stay whole. A whole copy would be 1 more."""


def table(folder: Path, stage: str, engine: dict[str, Any]) -> dict[str, Any]:
    """Two steps at debug size from what is on disk."""
    optim = {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0, "eps": 1e-3}
    train = {"samples_seen": 16, "global_batch_size": 8, "log_every": 1}
    shared = {"data": {"train": str(folder / "data" / "train")}, "train": train, "engine": engine}
    teacher = {"model": str(folder / "clip.safetensors")}
    if stage == "pretrain-mim":
        return shared | {"model": {"preset": DEBUG.name}, "teacher": teacher, "optim": optim}
    towers = {"image": {"path": str(folder / "mim.safetensors")}, "text": {"path": str(folder / "clip.safetensors")}}
    shared |= {"model": {"preset": DEBUG.name, "init": {"kind": "towers"} | towers}}
    shared |= {"optim": optim | {"text": {"lr": 1e-3}}}
    if stage == "distill":
        return shared | {"teacher": teacher}
    return shared | {"objective": {"kind": "infonce", "positives": "equal-captions"}}


def losses(folder: Path, stage: str, engine: dict[str, Any], name: str) -> list[float]:
    """Each step's loss of a whole run; `train-clip sigmoid` is train-clip with that loss."""
    path = folder / f"{stage}-{name}"
    stage, _, loss = stage.partition(" ")
    changes = {"objective": {"kind": loss}} if loss else {}
    result = run_stage(
        resolve_table(table(folder, stage, engine) | changes, stage), RunOptions(name=stage, run_dir=path)
    )
    if stage != "pretrain-mim":
        assert result.metrics["parameters"] == sum(p.numel() for p in build_clip(DEBUG).parameters())
    lines = (path / "metrics.jsonl").read_text().splitlines()
    return [json.loads(line)["train/loss"] for line in lines]


@pytest.fixture(scope="module")
def sources(tmp_path_factory):
    folder = tmp_path_factory.mktemp("sources")
    table = {"data": {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}}
    run_stage(resolve_table(table, "data-prepare"), RunOptions(name="data", run_dir=folder / "data"))
    torch.manual_seed(11)
    for name, model in {"mim": build_mim(DEBUG, predict_dim=32), "clip": build_clip(DEBUG)}.items():
        save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, folder / f"{name}.safetensors")
    return folder


CELLS = [
    pytest.param("train-clip", ENGINES[0], marks=pytest.mark.slow),
    ("train-clip", ENGINES[1]),
    ("train-clip sigmoid", ENGINES[1]),
    ("pretrain-mim", ENGINES[0]),
    pytest.param("pretrain-mim", ENGINES[1], marks=pytest.mark.slow),
    pytest.param("distill", ENGINES[0], marks=pytest.mark.slow),
    pytest.param("distill", ENGINES[1], marks=pytest.mark.slow),
]


@pytest.mark.parametrize(("stage", "engine"), CELLS)
def test_runs_start_from_the_weights_of_one_process(run_on_ranks, sources, stage, engine):
    alone = losses(sources, stage, {}, f"alone-{engine['kind']}")
    for found in run_on_ranks(losses, 2, sources, stage, engine, engine["kind"]):
        assert found == pytest.approx(alone, rel=1e-5)


def build_as_a_stage(folder: Path, engine: dict[str, Any]) -> tuple[float, float, dict[str, torch.Tensor]]:
    """Bytes that stand before the engine, and at most, as shares of all weights; and the weights."""
    recipe = resolve_table(table(folder, "train-clip", engine), "train-clip").recipe
    recipe = recipe.model_copy(update={"model": recipe.model.model_copy(update={"init": None})})
    world = World(rank(), world_size(), rank(), torch.device("cpu"))
    job = wiring.Job(recipe, RunOptions(name="build"), world, RunDir(folder), saved=None)
    with LiveBytes() as live:
        torch.manual_seed(recipe.train.seed)
        with wiring.initial_weights(job):
            objective = build_objective(recipe.objective, build_clip(DEEP))
        total = sum(4 * param.numel() for param in objective.parameters())
        before = live.now
        built = wiring.build_job_engine(job, objective, wiring.build_groups(recipe, objective, DEEP))
        peak = live.peak
    return before / total, peak / total, {name: tensor.clone() for name, tensor in built.model_state().items()}


@pytest.mark.parametrize("engine", ENGINES, ids=["fsdp2", "zero3"])
def test_no_rank_holds_all_weights(run_on_ranks, tmp_path, engine):
    _, _, alone = build_as_a_stage(tmp_path, {})
    for before, peak, weights in run_on_ranks(build_as_a_stage, 2, tmp_path, engine):
        assert before < 0.05
        assert peak <= PEAK[engine["kind"]]
        assert weights.keys() == alone.keys()
        assert all(torch.equal(weights[name], tensor) for name, tensor in alone.items())
