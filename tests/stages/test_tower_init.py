"""`[model.init] kind = "towers"`: each tower from a file of its own."""

from pathlib import Path

import pytest
import torch
from pydantic import ValidationError
from safetensors.torch import save_file

from evatool.core.errors import CheckpointError
from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import ClipModelSection
from evatool.stages.training.build import build_clip_model

DEBUG = resolve_preset("EVA02-CLIP-debug")


def section(**init) -> ClipModelSection:
    return ClipModelSection.model_validate({"preset": DEBUG.name, "init": {"kind": "towers"} | init}, strict=False)


def write(model: torch.nn.Module, path: Path) -> str:
    save_file({name: tensor.detach().clone() for name, tensor in model.state_dict().items()}, path)
    return str(path)


@pytest.fixture
def files(tmp_path):
    torch.manual_seed(5)
    mim, clip = build_mim(DEBUG, predict_dim=32), build_clip(DEBUG)
    return mim, write(mim, tmp_path / "mim.safetensors"), clip, write(clip, tmp_path / "clip.safetensors")


def test_two_towers_from_two_files(files):
    mim, mim_file, clip, clip_file = files
    built = build_clip_model(DEBUG, section(image={"path": mim_file}, text={"path": clip_file}), is_resumed=False)
    assert torch.equal(built.visual.trunk.patch_embed.proj.weight, mim.visual.patch_embed.proj.weight)
    assert torch.equal(built.text.token_embedding.weight, clip.text.token_embedding.weight)
    assert not torch.equal(built.text.text_projection, clip.text.text_projection)


def test_named_parameters_stay_fresh(files):
    _, _, clip, clip_file = files
    text = {"path": clip_file, "fresh": ["text.positional_embedding"]}
    built = build_clip_model(DEBUG, section(text=text), is_resumed=False)
    assert torch.equal(built.text.text_projection, clip.text.text_projection)
    assert not torch.equal(built.text.positional_embedding, clip.text.positional_embedding)


def test_what_is_not_named_fresh_must_be_there(files):
    _, mim_file, _, _ = files
    image = {"path": mim_file, "fresh": ["visual.trunk.head.*"]}
    with pytest.raises(CheckpointError, match=r"missing: visual\.trunk\.blocks\.0\.attn\.norm\.weight"):
        build_clip_model(DEBUG, section(image=image), is_resumed=False)


def test_a_file_without_the_tower_is_refused(files):
    _, mim_file, _, _ = files
    with pytest.raises(CheckpointError, match="nothing in this file matches"):
        build_clip_model(DEBUG, section(text={"path": mim_file}), is_resumed=False)


def test_no_tower_is_a_recipe_error():
    with pytest.raises(ValidationError, match="names no tower"):
        section()
