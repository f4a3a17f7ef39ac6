"""Closed formulas against what meta builds hold and what torch's counter counts, for every preset."""

from __future__ import annotations

import pytest
import torch
from torch.utils.flop_counter import FlopCounterMode

from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import PRESETS, mim_config, resolve_preset
from evatool.plan.memory import model_buffers
from evatool.plan.towers import (
    count_parameters,
    image_flops,
    kept_tokens,
    mim_flops,
    num_patches,
    text_flops,
)

CLIP = [name for name, config in PRESETS.items() if config.task == "clip"]
MIM = [name for name, config in PRESETS.items() if config.task == "mim"]
B = 2
# Every kind of block, and the largest; the others in make test-full.
COVERING = {"EVA02-CLIP-debug", "EVA02-CLIP-B-16", "EVA-CLIP-18B", "OpenAI-CLIP-B-16", "EVA-01-g", "EVA-02-Ti", "EVA-L"}


def covering(names: list[str]) -> list:
    return [name if name in COVERING else pytest.param(name, marks=pytest.mark.slow) for name in names]


def count(module: torch.nn.Module) -> int:
    return sum(p.numel() for p in module.parameters())


def counted(call) -> float:
    """Operations a sample by torch's counter."""
    with FlopCounterMode(display=False) as counter, torch.no_grad():
        call()
    return counter.get_total_flops() / B


def masks(config, masked: int) -> torch.Tensor:
    mask = torch.zeros(B, num_patches(config), dtype=torch.bool, device="cpu")
    mask[:, :masked] = True
    return mask


@pytest.mark.parametrize("name", covering(CLIP))
def test_clip(name: str) -> None:
    config = resolve_preset(name)
    with torch.device("meta"):  # build_clip inside: its towers must not be made on the CPU first
        clip = build_clip(config)
        image = torch.empty(B, 3, config.image_size, config.image_size)
        tokens = torch.empty(B, config.context_length, dtype=torch.long)
    said = count_parameters(config)
    assert (said.image, said.text, said.total) == (count(clip.visual), count(clip.text), count(clip))
    assert model_buffers(config) == sum(buffer.numel() * buffer.element_size() for buffer in clip.buffers())
    assert image_flops(config) == pytest.approx(counted(lambda: clip.visual(image)), rel=0.01)
    assert text_flops(config) == pytest.approx(counted(lambda: clip.text(tokens)), rel=0.01)


@pytest.mark.parametrize("name", covering([name for name in CLIP if PRESETS[name].is_eva]))
def test_patch_dropout(name: str) -> None:
    config = resolve_preset(name)
    with torch.device("meta"):
        tower = build_clip(config, patch_dropout=0.5).visual.train()
        image = torch.empty(B, 3, config.image_size, config.image_size)
    assert image_flops(config, 0.5) == pytest.approx(counted(lambda: tower(image)), rel=0.01)


@pytest.mark.parametrize("name", covering(MIM))
def test_mim(name: str) -> None:
    config = resolve_preset(name)
    masked = round(0.41 * num_patches(config))
    with torch.device("meta"):
        model = build_mim(config, predict_dim=config.predict_dim)
        image = torch.empty(B, 3, config.image_size, config.image_size)
    said = count_parameters(config)
    assert (said.image, said.text, said.total) == (count(model.visual), 0, count(model))
    if config.decoder is None:  # boolean indexing has no size on meta: encoder by the counter, head by hand
        mask = masks(config, masked).to("meta")
        encoder = counted(lambda: model.encode(image, mask))
        expected = encoder + 2 * masked * config.width * config.predict_dim
    else:
        visible = torch.empty(B, 1 + num_patches(config) - masked, config.width, device="meta")
        every = torch.empty(B, 1 + num_patches(config), config.decoder["width"], device="meta")
        hidden = torch.empty(B, masked, config.decoder["width"], device="meta")
        blocks = torch.nn.Sequential(*model.decoder_blocks)
        parts = [
            (model.visual.patch_embed, image),
            (model.visual.blocks, visible),
            (model.decoder_embed, visible),
            (blocks, every),
            (model.lm_head, hidden),
        ]
        expected = sum(counted(lambda part=part, x=x: part(x)) for part, x in parts)
    assert mim_flops(config, masked) == pytest.approx(expected, rel=0.01)


def test_a_clip_preset_can_be_a_mim_student() -> None:
    config = mim_config(resolve_preset("EVA02-CLIP-B-16"), 512)
    with torch.device("meta"):
        model = build_mim(config, predict_dim=512)
    assert count_parameters(config).total == count(model)


def test_backward_costs_twice_the_forward_pass() -> None:
    config = resolve_preset("EVA02-CLIP-debug")
    with torch.device("meta"):
        clip = build_clip(config)
        image = torch.empty(B, 3, config.image_size, config.image_size)
    with FlopCounterMode(display=False) as counter:
        clip.visual(image).sum().backward()
    conv_input = 2 * 3 * config.patch_size**2 * config.width * num_patches(config)  # pictures get no gradient
    assert 3 * image_flops(config) - conv_input == pytest.approx(counter.get_total_flops() / B, rel=0.01)


@pytest.mark.parametrize(("dropout", "tokens"), [(0.0, 257), (0.5, 129), (0.99, 3), (0.999, 2)])
def test_kept_tokens(dropout: float, tokens: int) -> None:
    assert kept_tokens(resolve_preset("EVA-CLIP-18B"), dropout) == tokens


def test_trimmed_captions_cost_less() -> None:
    config = resolve_preset("EVA02-CLIP-L-14")
    assert text_flops(config, 16) < text_flops(config) / 4
    assert text_flops(config, 500) == text_flops(config)
