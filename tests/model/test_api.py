"""load_clip: one function for everything that is on disk, and for presets."""

import json
import logging
import subprocess
import sys

import pytest
import torch
from golden import read_golden, relative
from PIL import Image
from safetensors.torch import save_file

import evatool
from evatool.checkpoint.save import save_run
from evatool.core.errors import CheckpointError, UsageError
from evatool.core.image_norm import normalize_images
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import PRESETS, resolve_preset
from evatool.weights.source import read_weights

DEBUG = resolve_preset("EVA02-CLIP-debug")


@pytest.fixture(scope="module")
def clip():
    torch.manual_seed(0)
    return build_clip(DEBUG).eval()


@pytest.fixture
def file(clip, tmp_path):
    path = tmp_path / "weights"
    save_file({name: tensor.clone() for name, tensor in clip.state_dict().items()}, path)
    return path


def images(side=32):
    return torch.randint(0, 256, (2, 3, side, side), dtype=torch.uint8, generator=torch.Generator().manual_seed(1))


def write_run(folder, model, config, step=3):
    save_run(
        folder / "checkpoints",
        step,
        objective_state=ShardedState.whole({f"model.{name}": t for name, t in model.state_dict().items()}),
        optimizer_state=ShardedState(),
        groups=[],
        train_state={},
        model_config=config.to_json(),
        resolved_toml="stage = 'train-clip'\n",
        keep=2,
    )


def test_import_is_free_of_torch():
    code = "import evatool, sys; assert 'torch' not in sys.modules; evatool.load_clip; assert 'torch' in sys.modules"
    assert subprocess.run([sys.executable, "-c", code], check=False).returncode == 0


def test_a_weight_file_finds_its_preset(clip, file):
    loaded = evatool.load_clip(file)
    assert loaded.config == DEBUG
    assert (loaded.image_size, loaded.context_length, loaded.embed_dim) == (32, 16, 32)
    assert loaded.logit_scale == pytest.approx(1 / 0.07)
    image = images()
    with torch.no_grad():
        assert relative(loaded.encode_image(image), clip.encode_image(normalize_images(image))) < 1e-6
        tokens = loaded.tokenizer(["a cat", "two dogs"])
        assert relative(loaded.encode_text(tokens), clip.encode_text(tokens)) < 1e-6
    assert not any(p.requires_grad or p.is_meta for p in loaded.model.parameters())
    assert not any(buffer.is_meta for buffer in loaded.model.buffers())


def test_features_can_be_normalised_and_text_may_be_short(file):
    loaded = evatool.load_clip(file)
    tokens = loaded.tokenizer(["a cat"])
    assert relative(loaded.encode_text(tokens[:, :5]), loaded.encode_text(tokens)) < 1e-6
    unit = loaded.encode_image(images(), normalize=True)
    assert torch.allclose(unit.norm(dim=-1), torch.ones(2))


def test_preprocess_gives_the_model_its_input(file):
    loaded = evatool.load_clip(file)
    image = loaded.preprocess(Image.new("RGB", (50, 40), "white"))
    assert image.shape == (3, 32, 32)
    assert loaded.encode_image(image[None]).shape == (1, 32)


def test_visual_tokens_pool_to_nothing_but_project_alike(file):
    loaded = evatool.load_clip(file)
    assert loaded.visual_tokens(images()).shape == (2, 16, 32)


def test_run_folder_checkpoint_and_fingerprint(clip, file, tmp_path):
    write_run(tmp_path / "run", clip, DEBUG)
    run = evatool.load_clip(tmp_path / "run")
    assert run.source.endswith("step_00000003")
    assert evatool.load_clip(run.source).fingerprint == run.fingerprint == evatool.load_clip(file).fingerprint
    other = build_clip(DEBUG)
    write_run(tmp_path / "other", other, DEBUG)
    assert evatool.load_clip(tmp_path / "other").fingerprint != run.fingerprint


def test_released_file_with_its_json(tmp_path):
    golden = read_golden("eva02-clip-l14")
    torch.save(golden.state, tmp_path / "EVA02_CLIP.pt")
    table = {"embed_dim": 32, "vision_cfg": golden.config.vision, "text_cfg": golden.config.text}
    (tmp_path / "model.json").write_text(json.dumps(table))
    loaded = evatool.load_clip(tmp_path / "EVA02_CLIP.pt", model_config=tmp_path / "model.json")
    assert relative(loaded.encode_image(golden.inputs["image"]), golden.expected["image_features"]) < 1e-5
    with pytest.raises(CheckpointError, match="no preset has the shapes"):
        evatool.load_clip(tmp_path / "EVA02_CLIP.pt")


def test_larger_images_than_the_file_was_made_for(clip, file):
    loaded = evatool.load_clip(file, model_config=DEBUG.with_image_size(64))
    assert loaded.visual_tokens(images(64)).shape == (2, 64, 32)


def test_a_preset_name_gives_random_weights_and_says_so(caplog):
    with caplog.at_level(logging.WARNING):
        loaded = evatool.load_clip("eva02_clip_debug")
    assert "random" in caplog.text
    assert loaded.source == "random weights of EVA02-CLIP-debug"


@pytest.mark.parametrize(("precision", "worst"), [("bf16", 0.03), ("fp16", 0.005)])
def test_half_precision_keeps_temperature_and_rope_tables(file, precision, worst):
    whole, half = evatool.load_clip(file), evatool.load_clip(file, precision=precision)
    assert half.model.logit_scale.dtype == torch.float32
    assert half.model.visual.trunk.rope.pos_embed.dtype == torch.float32
    assert half.model.visual.trunk.pos_embed.dtype != torch.float32
    assert 0 < relative(half.encode_image(images()), whole.encode_image(images())) < worst


# ------------------------------------------------------------------------------------------------ refusals


def test_the_wrong_preset_is_told_which_fits(file):
    with pytest.raises(CheckpointError) as caught:
        evatool.load_clip(file, model_config="EVA02-CLIP-toy")
    assert "EVA02-CLIP-debug" in (caught.value.fix or "")


def test_a_mim_run_is_not_a_clip(tmp_path):
    model = build_mim(DEBUG, predict_dim=32)
    write_run(tmp_path, model, model.config)
    with pytest.raises(CheckpointError, match="MIM model"):
        evatool.load_clip(tmp_path)
    weights = read_weights(tmp_path)
    assert weights.configs == [model.config]


def test_neither_path_nor_preset():
    with pytest.raises(UsageError, match="neither a file or folder nor a model preset"):
        evatool.load_clip("runs/nothing-here")


def test_an_empty_folder(tmp_path):
    with pytest.raises(CheckpointError, match="holds no model"):
        evatool.load_clip(tmp_path)


# ------------------------------------------------------------------------------------------------ registration


def test_open_clip_and_timm_know_the_presets():
    import open_clip
    import timm

    evatool.register()
    assert set(evatool.register()) == {name for name, config in PRESETS.items() if config.task == "clip"}
    assert set(evatool.register()) <= set(open_clip.list_models())
    with torch.device("meta"):
        clip = open_clip.create_model("EVA-CLIP-18B", device="meta")
        trunk = timm.create_model("eva_8b_patch14_clip_448")
    assert sum(p.numel() for p in clip.parameters()) == 18_325_482_241
    assert trunk.patch_embed.grid_size == (32, 32)


# ---------------------------------------------------------------------------------------------- sigmoid models


@pytest.mark.parametrize("shape", [(), (1,)], ids=["scalar", "of one"])
def test_a_model_trained_with_the_sigmoid_loss_keeps_its_bias(clip, tmp_path, shape):
    state = dict(clip.state_dict()) | {"logit_scale": torch.full(shape, 4.6), "logit_bias": torch.full(shape, -9.5)}
    torch.save({"state_dict": {f"module.{name}": t for name, t in state.items()}, "epoch": 1}, tmp_path / "siglip.pt")
    loaded = evatool.load_clip(tmp_path / "siglip.pt")
    assert loaded.logit_bias == -9.5
    image, text = loaded.encode_image(images()), loaded.encode_text(loaded.tokenizer(["a cat", "dogs", "sea"]))
    cosines = torch.nn.functional.cosine_similarity(image[:, None], text[None], dim=-1)
    torch.testing.assert_close(loaded.probabilities(image, text), torch.sigmoid(cosines * 99.4843 - 9.5))
    plain = evatool.load_clip(DEBUG.name)
    assert plain.logit_bias is None
    assert plain.fingerprint != loaded.fingerprint
    torch.testing.assert_close(plain.probabilities(image, text).sum(dim=1), torch.ones(2))


def test_a_configuration_with_a_bias_and_weights_without_one_are_a_contradiction(file):
    with pytest.raises(CheckpointError, match="missing: logit_bias"):
        evatool.load_clip(file, DEBUG.to_json() | {"init_logit_bias": -10, "init_logit_scale": 2.3})


def test_a_checkpoint_of_the_sigmoid_loss_gives_the_learned_bias(clip, tmp_path):
    weights = {f"model.{name}": tensor for name, tensor in clip.state_dict().items()}
    save_run(
        tmp_path / "checkpoints",
        3,
        objective_state=ShardedState.whole(weights | {"logit_bias": torch.tensor([-8.25])}),
        optimizer_state=ShardedState(),
        groups=[],
        train_state={},
        model_config=DEBUG.to_json(),
        resolved_toml="stage = 'train-clip'\n",
        keep=2,
    )
    assert evatool.load_clip(tmp_path).logit_bias == -8.25
    with pytest.raises(CheckpointError, match="kept no average"):
        evatool.load_clip(tmp_path, weights="ema")


# ------------------------------------------------------------------------------------- inputs outside the contract


def test_token_rows_longer_than_the_context_are_refused(file):
    loaded = evatool.load_clip(file)
    long = torch.nn.functional.pad(loaded.tokenizer(["a dog"]), (0, 77 - 16))
    with pytest.raises(UsageError, match="token rows of 77 are longer than the context of 16"):
        loaded.encode_text(long)


@pytest.mark.parametrize(
    ("tokens", "words"),
    [
        (torch.zeros(0, 16, dtype=torch.long), "no token"),
        (torch.zeros(16, dtype=torch.long), "shape"),
        (torch.zeros(2, 16), "dtype float32"),
        (torch.full((1, 16), 49408), "not all in the vocabulary"),
        (torch.full((1, 16), -1), "not all in the vocabulary"),
    ],
    ids=["empty", "one row without a batch", "floats", "beyond the vocabulary", "negative"],
)
def test_other_tokens_are_refused(file, tokens, words):
    with pytest.raises(UsageError, match=words):
        evatool.load_clip(file).encode_text(tokens)


@pytest.mark.parametrize(
    ("image", "words"),
    [
        (torch.zeros(2, 3, 48, 48, dtype=torch.uint8), r"\(2, 3, 48, 48\)"),
        (torch.zeros(2, 3, 32, 16), r"\(2, 3, 32, 16\)"),
        (torch.zeros(2, 32, 32, 3, dtype=torch.uint8), r"\(2, 32, 32, 3\)"),
        (torch.zeros(3, 32, 32, dtype=torch.uint8), r"\(3, 32, 32\)"),
        (torch.zeros(2, 3, 32, 32, dtype=torch.int64), "dtype int64"),
        (torch.zeros(0, 3, 32, 32, dtype=torch.uint8), "no image"),
    ],
    ids=["size", "side", "channels last", "no batch", "dtype", "empty"],
)
def test_other_images_are_refused(file, image, words):
    loaded = evatool.load_clip(file)
    for encode in (loaded.encode_image, loaded.visual_tokens):
        with pytest.raises(UsageError, match=words):
            encode(image)
