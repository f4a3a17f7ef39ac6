"""What lies beside weights describes the model, and is believed: architecture, activation, input, tokenizer."""

import json
from pathlib import Path
from typing import Any

import numpy as np
import open_clip
import pytest
import torch
from open_clip import CustomTextCLIP
from PIL import Image
from safetensors.torch import save_file

import evatool
from evatool.core.errors import CheckpointError, DependencyError, UsageError
from evatool.data.image.eval_transforms import EvalTransform
from evatool.recipe.load import resolve_table
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage
from evatool.weights.description import describe_model
from evatool.weights.named import tagged_config

TEXT = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 2}
VIT = {"image_size": 32, "layers": 2, "width": 64, "head_width": 32, "patch_size": 8}
RESNET = {"image_size": 32, "layers": [1, 1, 1, 1], "width": 8, "patch_size": None}
TIMM = {"timm_model_name": "convnext_atto", "timm_model_pretrained": False, "timm_pool": "", "timm_proj": "linear"}
SIGLIP_TEXT = TEXT | {"no_causal_mask": True, "pool_type": "last", "tokenizer_kwargs": {"clean": "canonicalize"}}
SIGLIP_TEXT |= {"proj_bias": True}
COCA = {"context_length": 16, "vocab_size": 49408, "width": 32, "heads": 2, "layers": 1}

ARCHITECTURES: dict[str, dict[str, Any]] = {
    "vit": {"vision_cfg": VIT},
    "vit, QuickGELU": {"vision_cfg": VIT, "quick_gelu": True},
    "vit, a text tower of its own": {"vision_cfg": VIT, "custom_text": True},
    "vit, average pooling": {"vision_cfg": VIT | {"pool_type": "avg", "final_ln_after_pool": True}},
    "vit, rectangular": {"vision_cfg": VIT | {"image_size": [16, 32]}},
    "resnet": {"vision_cfg": RESNET},
    "convnext": {"vision_cfg": TIMM | {"image_size": 64}},
    "siglip": {"vision_cfg": VIT, "text_cfg": SIGLIP_TEXT, "init_logit_bias": -10.0, "custom_text": True},
    "coca": {
        "vision_cfg": VIT | {"attentional_pool": True, "attn_pooler_heads": 2, "output_tokens": True},
        "text_cfg": TEXT | {"embed_cls": True, "output_tokens": True, "context_length": 15},
        "multimodal_cfg": COCA,
        "custom_text": True,
    },
}
HALF = {"mean": [0.5] * 3, "std": [0.5] * 3, "interpolation": "bicubic", "resize_mode": "squash"}


def described(folder: Path, table: dict[str, Any], preprocess: dict[str, Any] | None = None) -> Path:
    """A folder as open_clip has them, its model with random weights that are not degenerate."""
    folder.mkdir(parents=True, exist_ok=True)
    model_cfg = {"embed_dim": 24, "text_cfg": TEXT} | table
    (folder / "open_clip_config.json").write_text(
        json.dumps({"model_cfg": model_cfg, "preprocess_cfg": preprocess or {}})
    )
    torch.manual_seed(0)
    model = open_clip.create_model(f"local-dir:{folder}")
    with torch.no_grad():
        for name, tensor in model.state_dict(keep_vars=True).items():
            if tensor.is_floating_point() and "running" in name:
                tensor.uniform_(0.5, 1.5)
            elif tensor.ndim > 1:
                tensor.normal_(0, 0.1)
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, folder / "open_clip_model.safetensors")
    return folder


def picture(height: int = 50, width: int = 70) -> Image.Image:
    return Image.fromarray(np.random.default_rng(0).integers(0, 256, (height, width, 3), dtype=np.uint8))


@pytest.mark.parametrize("name", ARCHITECTURES)
def test_a_described_folder_gives_open_clips_features(name: str, tmp_path: Path) -> None:
    folder = described(tmp_path / "model", ARCHITECTURES[name], HALF)
    theirs, _, preprocess = open_clip.create_model_and_transforms(f"local-dir:{folder}")
    theirs = theirs.eval()
    clip = evatool.load_clip(folder)
    captions = ["a dog", "Two Cats, on a mat!", "x " * 40]
    ids = open_clip.get_tokenizer(f"local-dir:{folder}")(captions)
    assert torch.equal(clip.tokenizer(captions), ids)
    pixels = preprocess(picture())[None]
    assert torch.equal(clip.preprocess(picture())[None], pixels)
    with torch.no_grad():
        expected = theirs.encode_image(pixels, normalize=True), theirs.encode_text(ids, normalize=True)
    assert float((clip.encode_image(pixels, normalize=True) - expected[0]).norm()) <= 1e-5
    assert float((clip.encode_text(ids, normalize=True) - expected[1]).norm()) <= 1e-5
    assert clip.logit_scale == pytest.approx(theirs.logit_scale.exp().item())
    bias = getattr(theirs, "logit_bias", None)
    assert clip.logit_bias == (None if bias is None else pytest.approx(bias.item()))


@pytest.mark.parametrize("resize", ["shortest", "squash", "longest"])
@pytest.mark.parametrize("sides", [(50, 70), (71, 20), (32, 32), (9, 11)])
@pytest.mark.parametrize("interpolation", ["bicubic", "bilinear"])
@pytest.mark.parametrize("size", [32, (16, 32)])
def test_eval_transforms_are_open_clips(
    resize: Any, sides: tuple[int, int], interpolation: Any, size: int | tuple[int, int], tmp_path: Path
) -> None:
    picture(*sides).save(tmp_path / "p.png")
    theirs = open_clip.transform.image_transform(
        size, False, (0.0,) * 3, (1.0,) * 3, resize_mode=resize, interpolation=interpolation, fill_color=7
    )
    expected = (theirs(picture(*sides)) * 255).round().to(torch.uint8)
    made = EvalTransform(size, resize, "exact", interpolation, 7)((tmp_path / "p.png").read_bytes())
    assert torch.equal(made, expected)


def test_transformers_processors_are_read(tmp_path: Path) -> None:
    tower = {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": tower, "vision_config": tower}))
    processor = {"image_mean": [0.5] * 3, "image_std": [0.5] * 3, "resample": 2, "size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    wanted = describe_model(tmp_path).input
    assert wanted is not None
    assert (wanted.mean, wanted.interpolation, wanted.resize) == ((0.5, 0.5, 0.5), "bilinear", "squash")
    processor |= {"size": {"shortest_edge": 256}, "do_center_crop": True, "crop_size": {"height": 224, "width": 224}}
    (tmp_path / "preprocessor_config.json").write_text(json.dumps(processor))
    with pytest.raises(CheckpointError, match="resized to 256 x 256 pixels and cropped to 224 x 224"):
        describe_model(tmp_path)


@pytest.mark.parametrize(
    ("preprocess", "said"),
    [
        ({"size": 64}, "says images of 64 x 64 pixels, and the model takes 32 x 32"),
        ({"mean": [0.5, 0.5]}, "is not three numbers"),
        ({"std": [0.5, 0.5, 0.0]}, "larger than 0"),
        ({"resize_mode": "crop"}, "'crop' is not known"),
        ({"interpolation": "lanczos"}, "'lanczos' is not known"),
        ({"mode": "L"}, "mode is 'L'"),
    ],
)
def test_what_cannot_be_honoured_is_refused(preprocess: dict[str, Any], said: str, tmp_path: Path) -> None:
    folder = described(tmp_path, {"vision_cfg": VIT})
    table = json.loads((folder / "open_clip_config.json").read_text())
    (folder / "open_clip_config.json").write_text(json.dumps(table | {"preprocess_cfg": preprocess}))
    with pytest.raises(CheckpointError, match=said):
        evatool.load_clip(folder)


@pytest.mark.parametrize(
    "change", [{"vision_cfg": VIT | {"layers": 3}}, {"vision_cfg": VIT | {"image_size": 64}}, {"embed_dim": 32}]
)
def test_a_description_of_other_weights_is_refused(change: dict[str, Any], tmp_path: Path) -> None:
    folder = described(tmp_path, {"vision_cfg": VIT})
    table = json.loads((folder / "open_clip_config.json").read_text())
    table["model_cfg"] |= change
    (folder / "open_clip_config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match="do not fit the model"):
        evatool.load_clip(folder)


def test_quick_gelu_of_an_eva_model_contradicts_its_weights(tmp_path: Path) -> None:
    torch.manual_seed(0)
    model = evatool.build_clip(evatool.resolve_preset("EVA02-CLIP-debug"))
    save_file({k: v.contiguous() for k, v in model.state_dict().items()}, tmp_path / "model.safetensors")
    tower = {"hidden_act": "quick_gelu"}
    table = {"auto_map": {}, "text_config": tower, "vision_config": tower}
    (tmp_path / "config.json").write_text(json.dumps(table))
    with pytest.raises(CheckpointError, match=r"config\.json says QuickGELU.*EVA02-CLIP-debug"):
        evatool.load_clip(tmp_path)


def test_a_model_that_was_described_is_exported_as_it_was(tmp_path: Path) -> None:
    """The record of an export carries the input; a preprocess_cfg that says otherwise is refused."""
    clip = evatool.load_clip(described(tmp_path, {"vision_cfg": VIT}, HALF))
    again = evatool.model.config.ModelConfig.from_json(clip.config.to_json())  # type: ignore[attr-defined]
    assert again == clip.config
    assert again.input.mean == (0.5, 0.5, 0.5)


def test_tags_of_open_clip_say_activation_and_input() -> None:
    assert tagged_config("ViT-L-14", "laion2b_s32b_b82k").input.mean == (0.5, 0.5, 0.5)
    assert tagged_config("ViT-B-16", "openai").quick_gelu
    siglip = tagged_config("ViT-B-16-SigLIP", "webli")
    assert (siglip.input.resize, siglip.open_clip is not None) == ("squash", True)


def test_names_that_open_clip_does_not_know_are_refused() -> None:
    with pytest.raises(UsageError, match="no model 'ViT-B-33'"):
        evatool.load_clip("open_clip:ViT-B-33")
    with pytest.raises(UsageError, match="no weights 'nobody' of ViT-B-32"):
        evatool.load_clip("open_clip:ViT-B-32/nobody")


def test_a_tokenizer_that_is_not_at_hand_is_named(tmp_path: Path) -> None:
    folder = described(tmp_path, {"vision_cfg": VIT, "text_cfg": TEXT})
    table = json.loads((folder / "open_clip_config.json").read_text())
    table["model_cfg"]["text_cfg"]["hf_tokenizer_name"] = "/nobody/has/this"
    (folder / "open_clip_config.json").write_text(json.dumps(table))
    with pytest.raises(DependencyError, match=r"the tokenizer of .*nobody/has/this"):
        evatool.load_clip(folder)


def test_towers_stand_at_their_places_whichever_class_open_clip_chooses(tmp_path: Path) -> None:
    clip = evatool.load_clip(described(tmp_path, ARCHITECTURES["resnet"]))
    assert isinstance(clip.model, CustomTextCLIP)


@pytest.mark.slow
@pytest.mark.parametrize("name", ARCHITECTURES)
def test_any_architecture_is_exported_to_open_clip(name: str, tmp_path: Path) -> None:
    """The exporter itself compares features, temperature and preprocessing in a process without evatool."""
    folder = described(tmp_path / "model", ARCHITECTURES[name], HALF)
    table = {"export": {"checkpoint": str(folder), "format": "open_clip"}}
    run_stage(resolve_table(table, "export"), RunOptions(name="export", run_dir=tmp_path / "out"))
    before, after = evatool.load_clip(folder), evatool.load_clip(tmp_path / "out")
    assert after.config.input == before.config.input
    ids = before.tokenizer(["a dog"])
    assert torch.equal(before.encode_text(ids), after.encode_text(ids))
