"""CLIP models against the original EVA-CLIP code."""

import pytest
import torch
from golden import CLIP_FILES, TOLERANCE, read_golden, relative

from evatool.model.clip import build_clip, image_projection, visual_tokens
from evatool.weights.load import load_clip_weights

pytestmark = pytest.mark.parity


@pytest.fixture(params=CLIP_FILES, scope="module")
def golden(request):
    golden = read_golden(request.param)
    clip = build_clip(golden.config).eval()
    report = load_clip_weights(clip, golden.state)
    assert not report.fresh
    assert not report.resized
    return golden, clip


def test_image_features(golden):
    expected, clip = golden
    assert relative(clip.encode_image(expected.inputs["image"]), expected.expected["image_features"]) <= TOLERANCE


def test_text_features(golden):
    expected, clip = golden
    assert relative(clip.encode_text(expected.inputs["tokens"]), expected.expected["text_features"]) <= TOLERANCE


def test_temperature(golden):
    expected, clip = golden
    assert relative(clip.logit_scale.exp().squeeze(), expected.expected["logit_scale_exp"]) <= TOLERANCE


def test_tokens_after_the_last_block(golden):
    expected, clip = golden
    seen = []
    handle = clip.visual.trunk.blocks[-1].register_forward_hook(lambda module, args, output: seen.append(output))
    clip.encode_image(expected.inputs["image"])
    handle.remove()
    assert relative(seen[0], expected.expected["visual_tokens_before_norm"]) <= TOLERANCE


def test_visual_tokens_are_the_normed_and_projected_patches(golden):
    expected, clip = golden
    tokens = expected.expected["visual_tokens_before_norm"]
    state = expected.state
    width = tokens.shape[-1]
    weight, bias = state["visual.norm.weight"], state.get("visual.norm.bias")
    if bias is None:  # RMSNorm
        normed = tokens * (tokens.pow(2).mean(-1, keepdim=True) + 1e-6).rsqrt() * weight
    else:
        normed = torch.nn.functional.layer_norm(tokens, (width,), weight, bias, eps=1e-6)
    target = normed[:, 1:] @ state["visual.head.weight"].T + state.get("visual.head.bias", torch.zeros(()))
    assert relative(visual_tokens(clip, expected.inputs["image"]), target) <= TOLERANCE


def test_projection_has_a_bias_only_where_the_release_has_one(golden):
    expected, clip = golden
    assert (image_projection(clip).bias is not None) == ("visual.head.bias" in expected.state)
