"""First weights as released (docs/reference/eva.md#first-weights), judged by their statistics."""

import math

import pytest
import torch

from evatool.model.clip import build_clip, image_projection
from evatool.model.mim import build_mim
from evatool.model.presets import ModelConfig

TEXT = {"width": 128, "heads": 2, "layers": 3, "vocab_size": 2000, "context_length": 77}
EVA02 = {"rope": True, "intp_freq": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667}
EVA_18B = {"qkv_bias": False, "use_rms_norm": True, "postnorm": True, "mlp_ratio": 5.0}


def config(vision, *, text=True, predict_dim=None):
    table = {"vision_cfg": {"image_size": 224, "patch_size": 14, "layers": 4, "width": 256, "head_width": 64} | vision}
    table |= {"text_cfg": TEXT, "embed_dim": 512} if text else {"predict_dim": predict_dim}
    return ModelConfig.from_json(table, name="test")


def assert_std(tensor, std):
    tensor = tensor.detach()
    # the standard deviation of n samples is known to about 1 / sqrt(2 n)
    assert float(tensor.std()) == pytest.approx(std, rel=5 / math.sqrt(2 * tensor.numel()))
    assert abs(float(tensor.mean())) < 5 * std / math.sqrt(tensor.numel())


@pytest.mark.parametrize("vision", [{}, EVA02, EVA_18B], ids=["eva01", "eva02", "18b"])
def test_clip(vision):
    torch.manual_seed(0)
    clip = build_clip(config(vision))
    trunk = clip.visual.trunk
    assert_std(trunk.pos_embed, 0.02)
    assert_std(trunk.cls_token, 0.02)
    for number, block in enumerate(trunk.blocks, start=1):
        scaled = {block.attn.proj, block.mlp.fc2}
        for layer in block.modules():
            if isinstance(layer, torch.nn.Linear):
                assert_std(layer.weight, 0.02 / math.sqrt(2 * number) if layer in scaled else 0.02)
                assert layer.bias is None or not layer.bias.any()
        assert bool((block.norm1.weight == 1).all())
    projection = image_projection(clip)
    assert_std(projection.weight, 0.02 * 0.001)
    assert (projection.bias is None) == (vision is EVA_18B)
    assert projection.bias is None or not projection.bias.any()
    assert clip.logit_scale.shape == (1,)
    assert clip.logit_scale.item() == pytest.approx(math.log(1 / 0.07))


def test_clip_text_tower():
    torch.manual_seed(0)
    text = build_clip(config({})).text
    width, layers = TEXT["width"], TEXT["layers"]
    assert_std(text.token_embedding.weight, 0.02)
    assert_std(text.positional_embedding, 0.01)
    assert_std(text.text_projection, width**-0.5)
    for block in text.transformer.resblocks:
        assert_std(block.attn.in_proj_weight, width**-0.5)
        assert_std(block.attn.out_proj.weight, width**-0.5 * (2 * layers) ** -0.5)
        assert_std(block.mlp.c_fc.weight, (2 * width) ** -0.5)
        assert_std(block.mlp.c_proj.weight, width**-0.5 * (2 * layers) ** -0.5)


def test_head_scale_is_a_choice():
    torch.manual_seed(0)
    assert_std(image_projection(build_clip(config({"head_init_scale": 1.0}))).weight, 0.02)


def xavier(layer):
    return math.sqrt(2 / (layer.in_features + layer.out_features))


@pytest.mark.parametrize("packed", [False, True], ids=["sub-LN (B, L)", "packed (Ti, S)"])
def test_eva02_mim(packed):
    torch.manual_seed(0)
    vision = EVA02 | {"init": "eva-02", "inner_attn_ln": False}
    if packed:
        vision |= {"naiveswiglu": False, "subln": False, "swiglu": True}
    model = build_mim(config(vision, text=False, predict_dim=512), predict_dim=512)
    factor = 1.0 if packed else math.sqrt(math.log(2 * 4))
    for block in model.visual.blocks:
        attention, mlp = block.attn, block.mlp
        assert_std(attention.proj.weight, factor * xavier(attention.proj))
        assert_std(mlp.fc2.weight, factor * xavier(mlp.fc2))
        if packed:
            assert_std(attention.qkv.weight, xavier(attention.qkv))
            assert_std(mlp.fc1.weight, xavier(mlp.fc1))
        else:
            assert_std(attention.v_proj.weight, factor * xavier(attention.v_proj))
            assert_std(attention.q_proj.weight, xavier(attention.q_proj))
            assert_std(attention.k_proj.weight, xavier(attention.k_proj))
            assert_std(mlp.fc1_g.weight, factor * xavier(mlp.fc1_g))
            assert_std(mlp.fc1_x.weight, factor * xavier(mlp.fc1_x))
    assert_std(model.lm_head.weight, xavier(model.lm_head))
    assert not model.lm_head.bias.any()
    for token in (model.mask_token, model.visual.cls_token, model.visual.pos_embed):
        assert_std(token, 0.02)
    kernel = model.visual.patch_embed.proj.weight
    bound = math.sqrt(6 / (kernel.shape[0] + kernel[0].numel()))
    assert_std(kernel, bound / math.sqrt(3))
    assert float(kernel.abs().max()) <= bound


def test_eva01_mim():
    torch.manual_seed(0)
    model = build_mim(config({"init": "eva-01", "init_std": 0.015}, text=False, predict_dim=512), predict_dim=512)
    for number, block in enumerate(model.visual.blocks, start=1):
        assert_std(block.attn.qkv.weight, 0.015)
        assert_std(block.mlp.fc1.weight, 0.015)
        assert_std(block.attn.proj.weight, 0.015 / math.sqrt(2 * number))
        assert_std(block.mlp.fc2.weight, 0.015 / math.sqrt(2 * number))
    assert_std(model.lm_head.weight, 0.015)
    for token in (model.mask_token, model.visual.cls_token, model.visual.pos_embed):
        assert_std(token, 0.015)
