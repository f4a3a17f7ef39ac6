"""Activations against the bytes that autograd keeps; what the closed formulas say of corners."""

from __future__ import annotations

import pytest
from saved_bytes import tower_bytes

from evatool.model.presets import resolve_preset
from evatool.plan.memory import (
    NUMERICS,
    contrastive_bytes,
    engine_buffers,
    image_activations,
    states,
    text_activations,
)

TOWERS = ["EVA02-CLIP-B-16", "EVA02-CLIP-L-14", "EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14-plus"]
SETTINGS = {"full": {}, "checkpointing": {"checkpointing": True}, "half of the patches": {"patch_dropout": 0.5}}
# Other blocks: RMSNorm before and after, biases on all of q, k and v, QuickGELU.
OTHERS = [
    ("EVA-CLIP-8B", "autocast", "full"),
    ("EVA-CLIP-18B", "bf16", "half of the patches"),
    ("EVA01-CLIP-g-14", "autocast", "checkpointing"),
    ("OpenAI-CLIP-B-16", "bf16", "full"),
    ("OpenAI-CLIP-B-16", "autocast", "checkpointing"),
    ("EVA02-CLIP-toy", "fp32", "full"),
]


@pytest.mark.parametrize("setting", SETTINGS)
@pytest.mark.parametrize("numerics", ["bf16", pytest.param("autocast", marks=pytest.mark.slow)])
@pytest.mark.parametrize("name", TOWERS)
def test_image_towers(name: str, numerics: str, setting: str) -> None:
    said = image_activations(resolve_preset(name), NUMERICS[numerics], **SETTINGS[setting]).kept
    assert said == pytest.approx(tower_bytes(name, "visual", numerics, **SETTINGS[setting]), rel=0.03)


@pytest.mark.parametrize(("name", "numerics", "setting"), OTHERS, ids=lambda value: str(value))
def test_other_blocks(name: str, numerics: str, setting: str) -> None:
    said = image_activations(resolve_preset(name), NUMERICS[numerics], **SETTINGS[setting]).kept
    assert said == pytest.approx(tower_bytes(name, "visual", numerics, **SETTINGS[setting]), rel=0.03)


@pytest.mark.parametrize("checkpointing", [False, True])
@pytest.mark.parametrize("numerics", ["fp32", "bf16", "autocast"])
def test_text_tower(numerics: str, checkpointing: bool) -> None:
    config = resolve_preset("EVA02-CLIP-L-14")
    said = text_activations(config, NUMERICS[numerics], checkpointing=checkpointing).kept
    measured = tower_bytes("EVA02-CLIP-L-14", "text", numerics, checkpointing=checkpointing)
    assert said == pytest.approx(measured, rel=0.03)


def test_a_recomputed_block_is_one_of_the_kept_ones() -> None:
    config, numerics = resolve_preset("EVA-CLIP-18B"), NUMERICS["bf16"]
    full, saved = (image_activations(config, numerics, checkpointing=on) for on in (False, True))
    assert saved.kept + config.depth * saved.block > full.kept > config.depth * saved.block


def test_the_tiled_loss_does_not_grow_with_the_ranks() -> None:
    tiled, whole = NUMERICS["autocast"], NUMERICS["bf16"]
    assert contrastive_bytes(512, 131_072, 768, tiled) == contrastive_bytes(512, 512, 768, tiled)
    assert contrastive_bytes(512, 131_072, 768, tiled) < contrastive_bytes(512, 131_072, 768, whole) / 20
    assert contrastive_bytes(512, 131_072, 768, tiled, distils=True) > 9 * 4 * 512 * 131_072


def test_zero_divides_what_its_stage_says() -> None:
    numerics, params = NUMERICS["fp32"], 1_000_003
    ours = {
        stage: states([params], is_zero=True, zero_stage=stage, num_ranks=4, numerics=numerics) for stage in range(4)
    }
    assert ours[0].total == 16 * params
    even = 250_002  # elements of a rank's piece under stages 1 and 2
    assert [ours[stage].optimizer for stage in (1, 2, 3)] == [12 * even, 12 * even, 12 * 250_001]
    assert [ours[stage].weights for stage in (1, 2, 3)] == [16 * even, 16 * even, 4 * 250_001]
    assert [ours[stage].gradients for stage in (1, 2, 3)] == [4 * params, 4 * even, 4 * 250_001]


def test_sixteen_bit_engine_is_the_published_formula() -> None:
    """scale.md 2.3: 4P + 12P/N, 2P + 14P/N, 16P/N."""
    params, ranks, numerics = 4_000_000, 8, NUMERICS["bf16"]
    totals = [
        states([params], is_zero=True, zero_stage=stage, num_ranks=ranks, numerics=numerics).total
        for stage in (1, 2, 3)
    ]
    assert totals == [4 * params + 12 * params / ranks, 2 * params + 14 * params / ranks, 16 * params / ranks]


def test_buckets_are_no_larger_than_the_model() -> None:
    numerics = NUMERICS["fp32"]
    small, large = (
        engine_buffers(params, 10, is_zero=True, zero_stage=2, num_ranks=2, numerics=numerics)
        for params in (1000, 10**11)
    )
    assert small == 2 * 4 * 1000
    assert large == 2 * 4 * 500_000_000
    assert engine_buffers(1000, 10, is_zero=False, zero_stage=0, num_ranks=2, numerics=numerics) == 0
