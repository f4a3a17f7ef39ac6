"""Weights of other projects: OpenAI's archives, transformers' folders, DeepSpeed's checkpoints."""

import json
import shutil
from pathlib import Path

import pytest
import torch
from golden import read_golden, relative
from safetensors.torch import load_file, save_file

import evatool
from evatool.core.errors import CheckpointError
from evatool.formats.deepspeed_checkpoint import deepspeed_folder, open_deepspeed
from evatool.formats.safetensors import dtype_of, shape_of
from evatool.model.clip import PROJECTION, TOWER, build_clip
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset
from evatool.weights.description import describe_model
from evatool.weights.detect_preset import fitting_presets
from evatool.weights.key_mapping import canonical_state
from evatool.weights.load import init_text_tower, load_clip_weights
from evatool.weights.open import open_weights

ASSETS = Path(__file__).parents[1] / "assets"
DEEPSPEED = sorted(folder.name for folder in (ASSETS / "deepspeed").iterdir() if folder.is_dir())
TEXT = {"context_length": 16, "vocab_size": 60, "width": 24, "heads": 2, "layers": 2}
VIT = {"tower": "clip-vit", "image_size": 28, "patch_size": 7, "layers": 2}


def tiny(width, head_width):
    vision = VIT | {"width": width, "head_width": head_width}
    return {"embed_dim": 20, "vision_cfg": vision, "text_cfg": TEXT, "quick_gelu": True}


# ------------------------------------------------------------------------------------------------ whole models


@pytest.mark.parity
@pytest.mark.parametrize(
    ("source", "expected", "config"),
    [
        ("openai.pt", "openai.expected", tiny(64, 64)),
        ("transformers", "transformers/expected.safetensors", tiny(32, 16)),
        (
            "transformers/model.safetensors.index.json",
            "transformers/expected.safetensors",
            tiny(32, 16),
        ),
    ],
    ids=["OpenAI's archive", "transformers' folder", "index of shards"],
)
def test_features_are_those_of_the_library_it_came_from(source, expected, config):
    theirs = load_file(ASSETS / "foreign" / expected)
    clip = evatool.load_clip(ASSETS / "foreign" / source, model_config=config)
    assert relative(clip.encode_image(theirs["image"]), theirs["image_features"]) <= 1e-5
    assert relative(clip.encode_text(theirs["tokens"]), theirs["text_features"]) <= 1e-5
    if "visual_tokens" in theirs:
        assert relative(clip.visual_tokens(theirs["image"]), theirs["visual_tokens"]) <= 1e-5


def test_quick_gelu_is_told_by_what_lies_beside(tmp_path):
    with torch.device("meta"):
        shapes = {n: t.shape for n, t in build_clip(resolve_preset("OpenAI-CLIP-B-16")).state_dict().items()}

    class Shapes(dict):  # a file of this size without its bytes
        def __getitem__(self, name):
            return torch.empty(shapes[name], device="meta")

    state = canonical_state(Shapes(shapes))
    assert {c.name for c in fitting_presets(state)} == {"OpenAI-CLIP-B-16", "OpenCLIP-B-16"}
    assert describe_model(tmp_path).quick_gelu is None
    assert describe_model(ASSETS / "foreign" / "transformers").quick_gelu is True
    (tmp_path / "config.json").write_text(json.dumps({"text_config": {}, "vision_config": {}}))
    assert describe_model(tmp_path / "model.safetensors").quick_gelu is True, "transformers' own default"
    tower = {"hidden_act": "gelu"}
    (tmp_path / "config.json").write_text(json.dumps({"text_config": tower, "vision_config": tower}))
    assert describe_model(tmp_path / "model.safetensors").quick_gelu is False


@pytest.mark.parametrize("name", ["eva-clip-8b", "eva-clip-18b"])
def test_remote_code_names_of_eva_clip(name):
    golden = read_golden(name)
    theirs = {}
    for key, tensor in canonical_state(golden.state).items():
        theirs |= remote_code(key, tensor)
    clip = build_clip(golden.config).eval()
    load_clip_weights(clip, theirs)
    assert relative(clip.encode_image(golden.inputs["image"]), golden.expected["image_features"]) <= 1e-5
    assert relative(clip.encode_text(golden.inputs["tokens"]), golden.expected["text_features"]) <= 1e-5


def remote_code(name, tensor):
    """Our names -> those of BAAI's remote code for transformers (docs/reference/eva.md#names-in-transformers), written
    down a second time.
    """
    if name in ("logit_scale",):
        return {name: tensor}
    if name == PROJECTION:
        return {"visual_projection.weight": tensor}
    if name == "text.text_projection":
        return {"text_projection.weight": tensor.T.contiguous()}
    simple = {
        f"{TOWER}cls_token": ("vision_model.embeddings.class_embedding", (-1,)),
        f"{TOWER}pos_embed": ("vision_model.embeddings.position_embedding.weight", tensor.shape[-2:]),
        "text.token_embedding.weight": ("text_model.embeddings.token_embedding.weight", tensor.shape),
        "text.positional_embedding": ("text_model.embeddings.position_embedding.weight", tensor.shape),
    }
    if name in simple:
        key, shape = simple[name]
        return {key: tensor.reshape(shape)}
    prefixes = {
        f"{TOWER}patch_embed.proj.": "vision_model.embeddings.patch_embedding.",
        f"{TOWER}norm.": "vision_model.post_layernorm.",
        "text.ln_final.": "text_model.final_layer_norm.",
    }
    for ours, key in prefixes.items():
        if name.startswith(ours):
            return {key + name.removeprefix(ours): tensor}
    tower = "vision_model" if name.startswith(TOWER) else "text_model"
    rest = name.removeprefix(f"{TOWER}blocks.").removeprefix("text.transformer.resblocks.")
    number, rest = rest.split(".", 1)
    layer = f"{tower}.encoder.layers.{number}."
    if rest.startswith(("attn.qkv", "attn.in_proj")):
        leaf = "bias" if rest.endswith("bias") else "weight"
        q, k, v = tensor.chunk(3)
        return {f"{layer}self_attn.{part}_proj.{leaf}": t for part, t in (("k", k), ("v", v), ("q", q))}
    pairs = {"attn.proj": "self_attn.out_proj", "attn.out_proj": "self_attn.out_proj", "norm1": "layer_norm1",
             "norm2": "layer_norm2", "ln_1": "layer_norm1", "ln_2": "layer_norm2", "mlp.c_fc": "mlp.fc1",
             "mlp.c_proj": "mlp.fc2", "mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}  # fmt: skip
    part, leaf = rest.rsplit(".", 1)
    return {f"{layer}{pairs[part]}.{leaf}": tensor}


# ------------------------------------------------------------------------------------------------ towers


@pytest.mark.parametrize("source", ["foreign/openai.pt", "foreign/transformers"])
def test_text_tower_as_the_start_of_an_eva_clip(source):
    config = ModelConfig.from_json({"embed_dim": 20, "vision_cfg": {"image_size": 28, "patch_size": 7, "layers": 1,
                                    "width": 32, "head_width": 16}, "text_cfg": TEXT})  # fmt: skip
    clip = build_clip(config)
    image, projection = clip.visual.trunk.cls_token.clone(), clip.text.text_projection.clone()
    state = open_weights(ASSETS / source)
    report = init_text_tower(clip, state)
    assert report.fresh == ["text.text_projection"]
    expected = canonical_state(state)["text.token_embedding.weight"].float()
    assert torch.equal(clip.text.token_embedding.weight, expected)
    assert torch.equal(clip.text.text_projection, projection)
    assert torch.equal(clip.visual.trunk.cls_token, image)


def test_a_pattern_of_fresh_names_that_matches_nothing_is_an_error():
    clip = build_clip(resolve_preset("EVA02-CLIP-debug"))
    with pytest.raises(CheckpointError, match=r"no parameter of the model matches text\.projection"):
        init_text_tower(clip, clip.state_dict(), may_be_fresh=["text.projection"])


# ------------------------------------------------------------------------------------------------ shards


def copy_of(tmp_path):
    return Path(shutil.copytree(ASSETS / "foreign" / "transformers", tmp_path / "model"))


def test_a_missing_shard_is_named(tmp_path):
    folder = copy_of(tmp_path)
    (folder / "model-00002-of-00004.safetensors").unlink()
    with pytest.raises(CheckpointError, match=r"1 of 4 shards are not in the folder: model-00002-of-00004"):
        open_weights(folder)


def test_shards_of_another_model_are_noticed(tmp_path):
    folder = copy_of(tmp_path)
    save_file({"x": torch.zeros(1)}, folder / "model-00003-of-00004.safetensors")
    with pytest.raises(CheckpointError, match="not in the shards"):
        open_weights(folder)


def test_an_index_cannot_point_outside_its_folder(tmp_path):
    (tmp_path / "model.safetensors.index.json").write_text(json.dumps({"weight_map": {"x": "../secret"}}))
    with pytest.raises(CheckpointError, match="not in the folder"):
        open_weights(tmp_path)


def test_bin_shards(tmp_path):
    tensors = {"a": torch.ones(2), "b": torch.zeros(3)}
    for name in tensors:
        torch.save({name: tensors[name]}, tmp_path / f"{name}.bin")
    (tmp_path / "pytorch_model.bin.index.json").write_text(json.dumps({"weight_map": {n: f"{n}.bin" for n in tensors}}))
    read = open_weights(tmp_path)
    assert all(torch.equal(read[name], tensors[name]) for name in tensors)
    assert set(read) == set(tensors)


# ------------------------------------------------------------------------------------------------ DeepSpeed


@pytest.mark.parity
@pytest.mark.parametrize("name", DEEPSPEED)
def test_zero_partitions_give_what_deepspeed_itself_reads(name):
    folder = ASSETS / "deepspeed" / name
    read, expected = open_weights(folder), load_file(folder / "expected.safetensors")
    assert set(read) == set(expected)
    for key, tensor in expected.items():
        assert shape_of(read, key) == tuple(tensor.shape)
        assert dtype_of(read, key) == read[key].dtype
        assert torch.equal(read[key].float(), tensor.float()), key


@pytest.mark.parity
def test_masters_are_read_and_not_their_rounded_copies():
    folder = ASSETS / "deepspeed" / "zero2-bf16-2"
    masters = open_weights(folder)
    rounded = open_weights(folder / "epoch_1" / "mp_rank_00_model_states.pt")
    assert masters["a.weight"].dtype == torch.float32
    assert not torch.equal(masters["a.weight"], rounded["a.weight"].float())
    assert torch.equal(masters["a.weight"].bfloat16(), rounded["a.weight"])


def test_a_missing_rank_is_named(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "deepspeed" / "zero1-bf16-3", tmp_path / "run"))
    (folder / "epoch_1" / "bf16_zero_pp_rank_1_mp_rank_00_optim_states.pt").unlink()
    with pytest.raises(CheckpointError, match=r"written by 3 ranks(.|\n)*rank 1"):
        open_weights(folder)


def test_zero3_without_its_optimiser_files_has_no_weights(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "deepspeed" / "zero3-bf16-2", tmp_path / "run"))
    for file in folder.glob("epoch_1/*optim_states.pt"):
        file.unlink()
    with pytest.raises(CheckpointError, match="ZeRO-3 checkpoint has its weights in the optimiser's files"):
        open_weights(folder)


def test_model_states_alone_are_enough_below_zero3(tmp_path):
    folder = Path(shutil.copytree(ASSETS / "deepspeed" / "zero2-bf16-2", tmp_path / "run"))
    for file in folder.glob("epoch_1/*optim_states.pt"):
        file.unlink()
    assert open_weights(folder)["a.weight"].dtype == torch.bfloat16


def test_latest_that_names_nothing(tmp_path):
    (tmp_path / "latest").write_text("epoch_9")
    with pytest.raises(CheckpointError, match="epoch_9"):
        deepspeed_folder(tmp_path)
    assert deepspeed_folder(ASSETS / "foreign") is None
    assert open_deepspeed(ASSETS / "deepspeed" / "zero0-fp32-1" / "epoch_1")
