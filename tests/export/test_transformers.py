"""Folders for transformers: its own CLIP opens them without evatool; BAAI's layout of 8B and 18B goes out and in."""

import json
import subprocess
import sys
from dataclasses import replace

import pytest
import torch
from golden import read_golden, relative
from safetensors.torch import load_file, save_file

from evatool.core.errors import RecipeError
from evatool.core.image_input import ImageInput
from evatool.export.folder import Target
from evatool.export.model_card import CardFacts
from evatool.export.timm import TimmExporter
from evatool.export.transformers import TransformersExporter
from evatool.inference.loaded_clip import load_clip
from evatool.model.clip import build_clip
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset

pytest.importorskip("transformers")

FACTS = CardFacts(name="test", source="test", architecture=[], parameters={"image": 1})
VIT = ModelConfig.from_json(
    {
        "name": "tiny",
        "embed_dim": 24,
        "quick_gelu": True,
        "vision_cfg": {
            "tower": "clip-vit",
            "image_size": 32,
            "patch_size": 8,
            "layers": 2,
            "width": 32,
            "head_width": 16,
        },
        "text_cfg": {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2},
    }
)


def saved(config, folder):
    """A model of this configuration with weights far from the initial ones, read from a file."""
    torch.manual_seed(0)
    model = build_clip(config)
    for parameter in model.parameters():
        parameter.data += 0.05 * torch.randn_like(parameter)
    save_file({name: tensor.clone() for name, tensor in model.state_dict().items()}, folder / "source.safetensors")
    return load_clip(folder / "source.safetensors", config)


@pytest.mark.parametrize("activation", ["quick_gelu", pytest.param("gelu", marks=pytest.mark.slow)])
def test_transformers_opens_the_folder_without_evatool(tmp_path, activation):
    half = ImageInput(mean=(0.5,) * 3, std=(0.5,) * 3, interpolation="bilinear", resize="squash")
    clip = saved(replace(VIT, quick_gelu=activation == "quick_gelu", input=half), tmp_path)
    done = TransformersExporter().export(clip, FACTS, Target(tmp_path / "out", 1e-5))
    assert 0 < done.difference <= 1e-5, "the other process is stopped where it imports evatool"
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["vision_config"]["hidden_act"] == config["text_config"]["hidden_act"] == activation
    again = load_clip(tmp_path / "out")
    images = torch.randint(0, 256, (2, 3, 32, 32), dtype=torch.uint8)
    assert again.config.quick_gelu == clip.config.quick_gelu
    assert again.config.input == half
    assert relative(again.encode_image(images), clip.encode_image(images)) <= 1e-6
    assert again.logit_scale == pytest.approx(clip.logit_scale)


@pytest.mark.parametrize("name", ["eva-clip-8b", "eva-clip-18b"])
def test_baais_layout_goes_out_and_in_without_a_temperature(name, tmp_path):
    golden = read_golden(name)
    state = dict(golden.state) | {"logit_scale": torch.tensor(100.0).log()}
    torch.save(state, tmp_path / "weights.pt")
    clip = load_clip(tmp_path / "weights.pt", model_config=golden.config)
    TransformersExporter().export(clip, FACTS, Target(tmp_path / "out", 1e-5))
    written = load_file(tmp_path / "out" / "model.safetensors")
    assert "logit_scale" not in written
    assert "vision_model.encoder.layers.0.self_attn.k_proj.weight" in written
    config = json.loads((tmp_path / "out" / "config.json").read_text())
    assert config["architectures"] == ["EvaCLIPModel"]
    assert config["vision_config"]["post_layernorm"] == (name == "eva-clip-18b")
    again = load_clip(tmp_path / "out", model_config=golden.config)
    assert again.logit_scale == pytest.approx(100)
    assert relative(again.encode_image(golden.inputs["image"]), golden.expected["image_features"]) <= 1e-5
    assert relative(again.encode_text(golden.inputs["tokens"]), golden.expected["text_features"]) <= 1e-5


def test_models_that_transformers_has_no_class_for_are_refused(tmp_path):
    eva02 = load_clip("EVA02-CLIP-debug")
    with pytest.raises(RecipeError, match="parts that transformers' CLIP has not"):
        TransformersExporter().export(eva02, FACTS, Target(tmp_path / "out", 1e-5))
    sigmoid = saved(VIT.with_logit_bias(True), tmp_path)
    with pytest.raises(RecipeError, match="no place for a sigmoid model's logit_bias"):
        TransformersExporter().export(sigmoid, FACTS, Target(tmp_path / "out", 1e-5))
    golden = read_golden("eva-clip-8b")
    torch.save(golden.state | {"logit_scale": torch.tensor(3.0)}, tmp_path / "weights.pt")
    other_scale = load_clip(tmp_path / "weights.pt", model_config=golden.config)
    with pytest.raises(RecipeError, match="fixed scale of 100"):
        TransformersExporter().export(other_scale, FACTS, Target(tmp_path / "out", 1e-5))
    assert not (tmp_path / "out").exists()


WRAPPER = """
import sys
sys.modules["evatool"] = None
import torch
from safetensors.torch import load_file, save_file
from transformers import AutoModelForImageClassification
model = AutoModelForImageClassification.from_pretrained(sys.argv[1]).eval()
assert type(model).__name__ == "TimmWrapperForImageClassification"
with torch.no_grad():
    save_file({"features": model(load_file(sys.argv[2])["image"]).logits.contiguous()}, sys.argv[3])
"""


@pytest.mark.slow
def test_transformers_opens_a_timm_folder_as_its_wrapper(tmp_path):
    clip = saved(resolve_preset("EVA02-CLIP-debug"), tmp_path)
    TimmExporter().export(clip, FACTS, Target(tmp_path / "out", 1e-5))
    image = torch.randn(2, 3, 32, 32)
    save_file({"image": image}, tmp_path / "in")
    arguments = [str(tmp_path / name) for name in ("out", "in", "made")]
    subprocess.run([sys.executable, "-c", WRAPPER, *arguments], check=True)
    assert relative(load_file(tmp_path / "made")["features"], clip.encode_image(image)) <= 1e-5
