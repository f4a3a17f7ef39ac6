"""First weights of a model that was trained on otherwise normalised images."""

import json
from dataclasses import replace
from pathlib import Path

import pytest
import torch
from safetensors.torch import save_file

import evatool
from evatool.core.batch import Batch
from evatool.core.errors import RecipeError
from evatool.core.image_input import ImageInput
from evatool.objective.clip import encode_pair
from evatool.recipe.schema import ClipModelSection
from evatool.recipe.schema.model import ImageTowerInit
from evatool.stages.training.build import build_clip_model, clip_config


def test_other_statistics_are_refused_until_the_recipe_says_them(tmp_path: Path) -> None:
    half = ImageInput(mean=(0.5, 0.5, 0.5), std=(0.5, 0.5, 0.5))
    theirs = replace(evatool.resolve_preset("EVA02-CLIP-debug"), input=half)
    save_file({k: v.contiguous() for k, v in evatool.build_clip(theirs).state_dict().items()}, tmp_path / "model.pt")
    (tmp_path / "model.pt").rename(tmp_path / "model.safetensors")
    (tmp_path / "model_config.json").write_text(json.dumps(theirs.to_json()))
    assert evatool.load_clip(tmp_path).config.input == half
    section = ClipModelSection(preset="EVA02-CLIP-debug", init=ImageTowerInit(path=tmp_path))
    with pytest.raises(RecipeError, match=r"mean \[0\.5, 0\.5, 0\.5\]") as refusal:
        build_clip_model(clip_config(section), section, is_resumed=False)
    assert "model.image_mean='[0.5, 0.5, 0.5]'" in str(refusal.value)
    said = section.model_copy(update={"image_mean": half.mean, "image_std": half.std})
    assert build_clip_model(clip_config(said), said, is_resumed=False).image_input == half


def test_training_normalises_as_the_recipe_says() -> None:
    section = ClipModelSection(preset="EVA02-CLIP-debug", image_mean=(0.5, 0.4, 0.3), image_std=(0.5, 0.5, 0.5))
    config = clip_config(section)
    assert config.input == ImageInput(mean=(0.5, 0.4, 0.3), std=(0.5, 0.5, 0.5))
    model = evatool.build_clip(config).eval()
    image = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    tokens = torch.zeros(2, 16, dtype=torch.long)
    tokens[:, 1] = 49407
    lengths = torch.tensor([2, 2])
    batch = Batch(image=image, tokens=tokens, text_lengths=lengths, keys=["a", "b"])
    found, _ = encode_pair(model, batch)
    statistics = [torch.tensor(values).view(1, 3, 1, 1) for values in (config.input.mean, config.input.std)]
    pixels = (image / 255 - statistics[0]) / statistics[1]
    assert torch.allclose(found, model.encode_image(pixels, normalize=True), atol=1e-5)
