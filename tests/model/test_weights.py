"""Weights into models: names, exactness, initialisation from other models, resizing."""

import math

import pytest
import torch
from golden import CLIP_FILES, read_golden, relative

from evatool.core.errors import CheckpointError
from evatool.formats.safetensors import SafetensorsMap, write_safetensors
from evatool.model.clip import TOWER, build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import ModelConfig, resolve_preset
from evatool.weights.key_mapping import baai_name, canonical_state
from evatool.weights.load import init_image_tower, load_clip_weights, load_mim_weights
from evatool.weights.resize import resize_patch_kernel, resize_positions

DEBUG = resolve_preset("EVA02-CLIP-debug")


@pytest.fixture
def clip():
    torch.manual_seed(1)
    return build_clip(DEBUG)


def snapshot(module):
    return {name: tensor.clone() for name, tensor in module.state_dict().items()}


def assert_same(module, before):
    for name, tensor in module.state_dict().items():
        assert torch.equal(tensor, before[name]), name


# ------------------------------------------------------------------------------------------------ names


@pytest.mark.parametrize("name", CLIP_FILES)
def test_baai_names_there_and_back(name):
    golden = read_golden(name)
    kept = {key for key in golden.state if "rope" not in key}
    ours = canonical_state(golden.state)
    vision = golden.config.vision
    swiglu = vision["naiveswiglu"] or vision["swiglu"]
    back = {baai_name(key, separate_qkv=vision["subln"], swiglu=swiglu) for key in ours}
    assert back == kept
    assert set(ours) == set(build_clip(golden.config).state_dict())


def test_our_own_names_pass_unchanged(clip):
    state = clip.state_dict()
    assert set(canonical_state(state)) == set(state)


@pytest.mark.parametrize("prefix", ["module.", "_orig_mod.", "module._orig_mod."])
def test_wrappers_are_stripped(clip, prefix):
    state = {prefix + name: tensor for name, tensor in clip.state_dict().items()}
    assert set(canonical_state(state)) == set(clip.state_dict())


def test_temperature_inside_the_text_tower_as_eva01_has_it(clip):
    state = clip.state_dict()
    state["text.logit_scale"] = state.pop("logit_scale")
    load_clip_weights(clip, state)
    assert "logit_scale" in canonical_state(state)


def test_text_tower_at_the_root_as_old_files_have_it(clip):
    state = {name.removeprefix("text."): tensor for name, tensor in clip.state_dict().items()}
    assert set(canonical_state(state)) == set(clip.state_dict())


def test_two_tensors_for_one_name_are_refused(clip):
    state = clip.state_dict()
    state["module.logit_scale"] = state["logit_scale"]
    with pytest.raises(CheckpointError, match="logit_scale"):
        canonical_state(state)


def test_a_file_without_an_eva_tower_says_what_it_has():
    with pytest.raises(CheckpointError, match=r"no image tower(.|\n)*conv1\.weight"):
        canonical_state({"conv1.weight": torch.zeros(1)})


# ------------------------------------------------------------------------------------------------ exactness


def test_missing_unexpected_and_misshapen_are_listed_and_nothing_is_changed(clip):
    state = snapshot(build_clip(DEBUG))
    del state["visual.trunk.norm.weight"]
    state["text.extra"] = torch.zeros(3)
    state["text.ln_final.bias"] = torch.zeros(5)
    before = snapshot(clip)
    with pytest.raises(CheckpointError) as caught:
        load_clip_weights(clip, state, where="file.pt")
    text = str(caught.value)
    for part in ("visual.trunk.norm.weight", "text.extra", "text.ln_final.bias is (5,)", "file.pt"):
        assert part in text
    assert_same(clip, before)


def test_a_text_tower_is_not_a_clip(clip):
    state = {name: t for name, t in build_clip(DEBUG).state_dict().items() if not name.startswith("text.")}
    with pytest.raises(CheckpointError, match="missing"):
        load_clip_weights(clip, state)


def test_scalar_and_one_element_temperatures_are_the_same_number(clip):
    state = snapshot(clip)
    state["logit_scale"] = torch.tensor(3.25)
    load_clip_weights(clip, state)
    assert clip.logit_scale.shape == (1,)
    assert clip.logit_scale.item() == 3.25


# ------------------------------------------------------------------------------------------------ from MIM to CLIP


@pytest.fixture
def mim():
    torch.manual_seed(2)
    return build_mim(DEBUG, predict_dim=32)


def test_tower_from_mim_keeps_the_projection_and_attention_norms_fresh(clip, mim):
    before = snapshot(clip)
    report = init_image_tower(clip, mim.state_dict())
    after = clip.state_dict()
    fresh = {name for name in after if ".attn.norm." in name or name.startswith(f"{TOWER}head.")}
    assert set(report.fresh) == fresh
    assert set(report.unused) == {"mask_token", "lm_head.weight", "lm_head.bias"}
    for name, tensor in after.items():
        if name.startswith(TOWER) and name not in fresh:
            assert torch.equal(tensor, mim.state_dict()["visual." + name.removeprefix(TOWER)]), name
        else:
            assert torch.equal(tensor, before[name]), name


def test_tower_from_a_released_mim_file_under_its_own_names():
    golden = read_golden("eva02-mim")
    config = ModelConfig.from_json(
        {"embed_dim": 24, "vision_cfg": golden.config.vision | {"inner_attn_ln": True, "intp_freq": True}, "text_cfg":
         {"width": 16, "heads": 1, "layers": 1, "vocab_size": 100}}
    )  # fmt: skip
    clip = build_clip(config)
    init_image_tower(clip, golden.state)
    assert torch.equal(clip.visual.trunk.norm.weight, golden.state["norm.weight"])
    assert torch.equal(clip.visual.trunk.blocks[1].mlp.fc1_x.weight, golden.state["blocks.1.mlp.w2.weight"])


def test_tower_from_a_clip_takes_its_attention_norms_but_not_its_projection(clip):
    torch.manual_seed(3)
    other = build_clip(DEBUG)
    torch.nn.init.normal_(other.visual.trunk.blocks[0].attn.norm.weight)
    projection = clip.visual.trunk.head.weight.clone()
    text = clip.text.token_embedding.weight.clone()
    report = init_image_tower(clip, other.state_dict())
    assert torch.equal(clip.visual.trunk.blocks[0].attn.norm.weight, other.visual.trunk.blocks[0].attn.norm.weight)
    assert torch.equal(clip.visual.trunk.head.weight, projection)
    assert torch.equal(clip.text.token_embedding.weight, text)
    assert set(report.fresh) == {f"{TOWER}head.weight", f"{TOWER}head.bias"}


def test_only_some_attention_norms_are_refused(clip):
    state = build_clip(DEBUG).state_dict()
    del state[f"{TOWER}blocks.1.attn.norm.weight"]
    with pytest.raises(CheckpointError, match=r"blocks\.1\.attn\.norm\.weight"):
        init_image_tower(clip, state)


def test_a_deeper_tower_is_refused(clip):
    state = build_mim(resolve_preset("EVA02-CLIP-toy"), predict_dim=32).state_dict()
    before = snapshot(clip)
    with pytest.raises(CheckpointError, match=r"blocks\.2\.(.|\n)*of another shape|of another shape"):
        init_image_tower(clip, state)
    assert_same(clip, before)


def test_norm_of_an_average_pooling_timm_tower_becomes_the_final_norm(clip, mim):
    state = {name.removeprefix("visual."): t for name, t in mim.visual.state_dict().items()}
    state["fc_norm.weight"], state["fc_norm.bias"] = state.pop("norm.weight") + 1, state.pop("norm.bias")
    init_image_tower(clip, state)
    assert torch.equal(clip.visual.trunk.norm.weight, state["fc_norm.weight"])


def test_mim_checkpoint_reads_back(mim):
    torch.manual_seed(4)
    other = build_mim(DEBUG, predict_dim=32)
    load_mim_weights(other, mim.state_dict())
    assert_same(other, mim.state_dict())


# ------------------------------------------------------------------------------------------------ resizing


def test_positions_are_resized_when_the_image_grows(mim):
    clip = build_clip(DEBUG.with_image_size(64))
    report = init_image_tower(clip, mim.state_dict())
    assert report.resized == [f"{TOWER}pos_embed"]
    table = clip.visual.trunk.pos_embed
    assert table.shape == (1, 65, 64)
    assert torch.equal(table[:, 0], mim.visual.pos_embed[:, 0])
    assert clip.encode_image(torch.zeros(1, 3, 64, 64)).shape == (1, 32)


def cubic_weights(source, target):
    """Cubic convolution with a = -0.75 from `source` to `target` points, half-pixel centres, clamped borders."""
    matrix = torch.zeros(target, source, dtype=torch.float64)
    for i in range(target):
        centre = (i + 0.5) * source / target - 0.5
        for j in range(math.floor(centre) - 1, math.floor(centre) + 3):
            x, a = abs(centre - j), -0.75
            weight = ((a + 2) * x - (a + 3)) * x * x + 1 if x <= 1 else ((a * x - 5 * a) * x + 8 * a) * x - 4 * a
            matrix[i, min(max(j, 0), source - 1)] += weight
    return matrix


@pytest.mark.parametrize("side", [6, 16, 24], ids=["smaller", "larger", "336 from 224"])
def test_positions_are_plain_bicubic(side):
    table = torch.randn(1, 65 if side < 24 else 257, 3)
    source = math.isqrt(table.shape[1] - 1)
    resized = resize_positions(table, (side, side))
    assert torch.equal(resized[:, 0], table[:, 0])
    matrix = cubic_weights(source, side)
    patches = table[0, 1:].double().reshape(source, source, 3)
    expected = torch.einsum("ir,jc,rcd->ijd", matrix, matrix, patches)
    assert relative(resized[0, 1:].reshape(side, side, 3), expected) < 1e-6


def test_same_grid_is_untouched():
    table = torch.randn(1, 17, 4)
    assert resize_positions(table, (4, 4)) is table


def test_patch_kernel_14_to_16_is_plain_bicubic():
    kernel = torch.randn(4, 3, 14, 14)
    resized = resize_patch_kernel(kernel, 16)
    expected = torch.nn.functional.interpolate(kernel, size=(16, 16), mode="bicubic", align_corners=False)
    assert torch.equal(resized, expected)
    assert resize_patch_kernel(kernel, 14) is kernel


def test_pseudo_inverse_keeps_the_response_to_resized_patches():
    kernel, patch = torch.randn(2, 3, 14, 14), torch.randn(1, 3, 14, 14)
    larger = torch.nn.functional.interpolate(patch, size=(28, 28), mode="bicubic", antialias=True, align_corners=False)
    small = torch.nn.functional.conv2d(patch, kernel)
    large = torch.nn.functional.conv2d(larger, resize_patch_kernel(kernel, 28, "pseudo-inverse"))
    assert relative(large, small) < 1e-3
    assert relative(torch.nn.functional.conv2d(larger, resize_patch_kernel(kernel, 28)), small) > 0.1


def test_half_precision_tables_keep_their_dtype():
    assert resize_positions(torch.randn(1, 17, 4).half(), (6, 6)).dtype == torch.float16


# ------------------------------------------------------------------------------------------------ memory


def meta_clip():
    with torch.device("meta"):
        return build_clip(DEBUG)


def test_a_model_never_shares_memory_with_a_dictionary(clip):
    state = clip.state_dict()
    other = meta_clip()
    load_clip_weights(other, state)
    before = other.visual.trunk.cls_token.clone()
    state["visual.trunk.cls_token"].add_(1.0)
    assert torch.equal(other.visual.trunk.cls_token, before)


def test_looking_for_a_name_reads_no_tensor(clip, tmp_path):
    class Counting(SafetensorsMap):
        reads = 0

        def __getitem__(self, name):
            Counting.reads += 1
            return super().__getitem__(name)

    write_safetensors(tmp_path / "f", clip.state_dict())
    state = canonical_state(Counting(tmp_path / "f"))
    assert "text.token_embedding.weight" in state
    assert "lm_head.weight" not in state
    assert Counting.reads == 0
    load_clip_weights(meta_clip(), state)
    assert Counting.reads == len(state)


# ------------------------------------------------------------------------------------------------ other refusals


def test_whole_numbers_are_no_weights(clip):
    state = clip.state_dict()
    state["visual.trunk.head.weight"] = state["visual.trunk.head.weight"].to(torch.int8)
    with pytest.raises(CheckpointError, match=r"head\.weight holds int8, not floating point"):
        load_clip_weights(clip, state)


def test_eva_l_reads_its_released_names():
    config = ModelConfig.from_json(
        {"vision_cfg": {"image_size": 28, "patch_size": 7, "layers": 2, "width": 32, "head_width": 16},
         "predict_dim": 24, "decoder": {"width": 16, "layers": 1, "heads": 2}}
    )  # fmt: skip
    torch.manual_seed(6)
    source, model = build_mim(config, predict_dim=24), build_mim(config, predict_dim=24)
    released = {"pos_embed": torch.zeros(1), "decoder_pos_embed": torch.zeros(1)}
    for name, tensor in source.state_dict().items():
        released[name.removeprefix("visual.").replace("lm_head.", "decoder_pred.")] = tensor
    load_mim_weights(model, released)
    assert_same(model, source.state_dict())
    image, mask = torch.randn(2, 3, 28, 28), torch.zeros(2, 16, dtype=torch.bool)
    mask[:, ::3] = True
    assert torch.equal(model(image, mask), source(image, mask))
    mask[0, 1] = True
    with pytest.raises(ValueError, match="equally many"):
        model(image, mask)
