"""pretrain-mim with teachers that are no CLIP, live and stored."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from evatool.core.errors import RecipeError
from evatool.distributed.engines.blocks import compile_blocks
from evatool.distributed.world import World
from evatool.recipe.load import resolve_table
from evatool.runs.run_dir import RunDir, RunOptions
from evatool.stages.training import teachers
from evatool.stages.training.build import Job
from evatool.teachers import stored
from evatool.teachers.clip import GridTeacher
from evatool.train.hooks.log import read_metrics

pytestmark = pytest.mark.e2e


@pytest.mark.parametrize(("name", "layer", "width"), [("test_vit", 3, 64), ("test_efficientnet", 3, 48)])
def test_a_timm_model_teaches(run_training, tmp_path, monkeypatch, name, layer, width) -> None:
    torch.manual_seed(4)
    model = timm.create_model(name)
    save_file({key: tensor.clone() for key, tensor in model.state_dict().items()}, tmp_path / "weights.safetensors")
    given = [f"teacher.layer={layer}", f"teacher.weights={tmp_path / 'weights.safetensors'}", "teacher.image_size=96"]
    live = run_training("pretrain-mim", tmp_path / "live", *given, teacher=f"timm/{name}")
    losses = [r["train/loss"] for r in read_metrics(live.outputs["metrics"])]
    assert losses[-1] < losses[0] - 0.05
    assert load_file(live.outputs["checkpoint"] / "model.safetensors")["lm_head.weight"].shape[0] == width
    given.append(f"teacher.store.path={tmp_path / 'rows'}")
    first = run_training("pretrain-mim", tmp_path / "first", *given, teacher=f"timm/{name}")
    monkeypatch.setattr(teachers, "load_timm_teacher", None)
    again = run_training("pretrain-mim", tmp_path / "again", *given, teacher=f"timm/{name}")
    found = [[r["train/loss"] for r in read_metrics(run.outputs["metrics"])] for run in (first, again)]
    assert found[0] == found[1]
    assert found[0][:5] == pytest.approx(losses[:5], abs=1e-3)  # of the first epoch: the later ones see it again


def test_settings_of_a_timm_model_with_a_clip_are_refused() -> None:
    table = {
        "data": {"train": "shards"},
        "model": {"preset": "EVA02-CLIP-debug"},
        "teacher": {"model": "EVA02-CLIP-debug", "layer": 3},
        "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
        "train": {"samples_seen": 8, "global_batch_size": 8},
    }
    with pytest.raises(RecipeError, match="layer belong to a timm teacher"):
        resolve_table(table, "pretrain-mim")


# ------------------------------------------------------------------------------------------------------ arithmetic


def opened(tmp_path, clip_run, device="cpu", **section):
    recipe = resolve_table(
        {
            "data": {"train": "shards"},
            "model": {"preset": "EVA02-CLIP-debug"},
            "teacher": {"model": str(clip_run.run_dir), **section},
            "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
            "train": {"samples_seen": 8, "global_batch_size": 8},
        },
        "pretrain-mim",
    ).recipe
    world = World(0, 1, 0, torch.device(device))
    job = Job(recipe, RunOptions(name="teacher"), world, RunDir(tmp_path), saved=None)
    return teachers.open_patch_teacher(job, recipe.teacher)


def tokens_of(teacher, image):
    return GridTeacher(teacher, teacher.facts.grid).visual_tokens(image)


@pytest.fixture
def image():
    return torch.randint(0, 256, (4, 3, 32, 32), generator=torch.Generator().manual_seed(0), dtype=torch.uint8)


@pytest.mark.slow
def test_the_teacher_computes_in_its_own_precision(tmp_path, clip_run, image) -> None:
    plain = tokens_of(opened(tmp_path, clip_run), image)
    with torch.autocast("cpu", dtype=torch.bfloat16):  # as a student in bf16 has it
        assert torch.equal(tokens_of(opened(tmp_path, clip_run), image), plain)
    half = opened(tmp_path, clip_run, precision="bf16")
    assert half.loaded.model.visual.trunk.blocks[0].mlp.fc2.weight.dtype == torch.bfloat16
    found = tokens_of(half, image)
    assert found.dtype == torch.float32
    assert not torch.equal(found, plain)
    assert float(torch.cosine_similarity(found, plain, dim=-1).min()) > 0.999


def test_the_teacher_is_frozen_and_in_eval_mode(tmp_path, clip_run, image) -> None:
    teacher = opened(tmp_path, clip_run)
    assert not teacher.loaded.model.training
    assert not any(p.requires_grad for p in teacher.loaded.model.parameters())
    assert not tokens_of(teacher, image).requires_grad


def test_what_auto_means(monkeypatch, tmp_path, clip_run) -> None:
    """On a GPU bf16 weights and compiled blocks; asked of a machine that has none."""
    read, compiled = [], []
    monkeypatch.setattr(stored, "compile_blocks", lambda *args, **kw: compiled.append(args))
    monkeypatch.setattr(teachers, "_facts_of_patches", lambda *args, **kw: None)
    monkeypatch.setattr(teachers, "load_clip", lambda *a, device, precision, **kw: read.append(precision) or Loaded())
    for device, section in (("cpu", {}), ("cuda", {}), ("cuda", {"precision": "fp32", "compile": False})):
        opened(tmp_path, clip_run, device, **section)
    assert read == ["fp32", "bf16", "fp32"]
    assert len(compiled) == 1


class Loaded:
    """What a loaded teacher's log line asks for."""

    model, source = None, "a file"
    config = SimpleNamespace(name="a teacher", open_clip=None)


@pytest.mark.slow
def test_compiled_blocks_say_the_same(tmp_path, clip_run, image) -> None:
    teacher = opened(tmp_path, clip_run)
    plain = tokens_of(teacher, image)
    assert compile_blocks(teacher.loaded.model, torch.device("cpu"))
    torch.testing.assert_close(tokens_of(teacher, image), plain, rtol=1e-4, atol=1e-5)
