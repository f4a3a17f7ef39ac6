"""pretrain-mim with teachers that are no CLIP, live and stored."""

from __future__ import annotations

import pytest
import timm
import torch
from safetensors.torch import load_file, save_file

from evatool.errors import RecipeError
from evatool.recipe.load import resolve_table
from evatool.stages import teachers
from evatool.train.hooks import read_metrics

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
