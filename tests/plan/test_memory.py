"""Activations against the bytes that autograd keeps; what the closed formulas say of corners."""

from __future__ import annotations

import pytest
from saved_bytes import tower_bytes

from evatool.model.presets import resolve_preset
from evatool.plan.engines import Setup, engine_buffers, fsdp2_states, states
from evatool.plan.memory import NUMERICS, contrastive_bytes, image_activations, text_activations

TOWERS = [
    *("EVA02-CLIP-B-16", "EVA02-CLIP-L-14"),
    *(pytest.param(name, marks=pytest.mark.slow) for name in ("EVA02-CLIP-L-14-336", "EVA02-CLIP-bigE-14-plus")),
]
SETTINGS = {"full": {}, "checkpointing": {"checkpointing": "full"}, "half of the patches": {"patch_dropout": 0.5}}
# Other blocks: RMSNorm before and after, biases on all of q, k and v, QuickGELU.
OTHERS = [
    ("EVA-CLIP-8B", "autocast", "full"),
    ("EVA-CLIP-18B", "bf16", "half of the patches"),
    ("EVA01-CLIP-g-14", "autocast", "checkpointing"),
    ("OpenAI-CLIP-B-16", "bf16", "full"),
    ("OpenAI-CLIP-B-16", "autocast", "checkpointing"),
    ("EVA02-CLIP-toy", "fp32", "full"),
]
SELECTIVE = [
    ("EVA02-CLIP-B-16", "visual", "autocast"),
    ("EVA02-CLIP-B-16", "text", "autocast"),
    ("EVA02-CLIP-L-14", "visual", "bf16"),
    ("EVA-CLIP-18B", "visual", "autocast"),
    ("OpenAI-CLIP-B-16", "visual", "autocast"),
    ("EVA01-CLIP-g-14", "visual", "fp32"),
    pytest.param("EVA02-CLIP-bigE-14-plus", "visual", "autocast", marks=pytest.mark.slow),
    pytest.param("EVA02-CLIP-bigE-14-plus", "text", "autocast", marks=pytest.mark.slow),
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


@pytest.mark.parametrize(("name", "tower", "numerics"), SELECTIVE)
def test_selective_checkpointing_keeps_products(name: str, tower: str, numerics: str) -> None:
    activations = image_activations if tower == "visual" else text_activations
    said = activations(resolve_preset(name), NUMERICS[numerics], checkpointing="selective").kept
    assert said == pytest.approx(tower_bytes(name, tower, numerics, checkpointing="selective"), rel=0.03)


def test_float16_keeps_what_bfloat16_keeps() -> None:
    kinds = [tower_bytes("EVA02-CLIP-B-16", "visual", "autocast", dtype_name=name) for name in ("float16", "bfloat16")]
    assert kinds[0] == kinds[1]


@pytest.mark.parametrize("checkpointing", ["none", "full"])
@pytest.mark.parametrize("numerics", ["fp32", "bf16", "autocast"])
def test_text_tower(numerics: str, checkpointing: str) -> None:
    config = resolve_preset("EVA02-CLIP-L-14")
    said = text_activations(config, NUMERICS[numerics], checkpointing=checkpointing).kept
    measured = tower_bytes("EVA02-CLIP-L-14", "text", numerics, checkpointing=checkpointing)
    assert said == pytest.approx(measured, rel=0.03)


def test_a_recomputed_block_is_one_of_the_kept_ones() -> None:
    config, numerics = resolve_preset("EVA-CLIP-18B"), NUMERICS["bf16"]
    full, saved = (image_activations(config, numerics, checkpointing=kind) for kind in ("none", "full"))
    assert saved.kept + config.depth * saved.block > full.kept > config.depth * saved.block


def test_the_tiled_loss_does_not_grow_with_the_ranks() -> None:
    tiled, whole = NUMERICS["autocast"], NUMERICS["bf16"]
    assert contrastive_bytes(512, 131_072, 768, tiled) == contrastive_bytes(512, 512, 768, tiled)
    assert contrastive_bytes(512, 131_072, 768, tiled) < contrastive_bytes(512, 131_072, 768, whole) / 20
    taught = {"teacher_widths": (1024, 1280)}
    assert contrastive_bytes(512, 131_072, 768, tiled, **taught) == contrastive_bytes(512, 512, 768, tiled, **taught)
    assert contrastive_bytes(512, 512, 768, tiled, **taught) > contrastive_bytes(512, 512, 768, tiled)


def test_zero_divides_what_its_stage_says() -> None:
    numerics, params = NUMERICS["fp32"], 1_000_003
    ours = {stage: states([params], Setup("deepspeed", stage, num_ranks=4), numerics) for stage in range(4)}
    assert ours[0].total == 16 * params
    even = 250_002  # elements of a rank's piece under stages 1 and 2
    assert [ours[stage].optimizer for stage in (1, 2, 3)] == [12 * even, 12 * even, 12 * 250_001]
    assert [ours[stage].weights for stage in (1, 2, 3)] == [16 * even, 16 * even, 4 * 250_001]
    assert [ours[stage].gradients for stage in (1, 2, 3)] == [4 * params, 4 * even, 4 * 250_001]


def test_fsdp2_is_not_zero_3() -> None:
    """No second copy of float32 weights; whole gradients where several passes add up; rows are what is divided."""
    numerics, params = NUMERICS["autocast"], 4_000_000
    once, twice = (
        states([params], Setup("fsdp2", num_ranks=8, accumulates=several), numerics) for several in (False, True)
    )
    assert once.total == 16 * params / 8
    assert states([params], Setup("deepspeed", 3, num_ranks=8), numerics).total == 20 * params / 8
    assert twice.gradients == once.gradients + 4 * params
    held = [fsdp2_states([(10, 3), (1, 8)], Setup("fsdp2", num_ranks=4), numerics, rank) for rank in range(4)]
    assert [each.weights for each in held] == [4 * (9 + 2)] * 4
    assert [each.optimizer for each in held] == [8 * (9 + 2)] * 3 + [8 * (3 + 2)]


def test_offload_moves_states_to_the_host() -> None:
    numerics, params = NUMERICS["fp32"], 4_000_000
    at_home = states([params], Setup("deepspeed", 3, num_ranks=4), numerics)
    moved = states([params], Setup("deepspeed", 3, "optimizer", num_ranks=4), numerics)
    all_moved = states([params], Setup("deepspeed", 3, "optimizer-and-weights", num_ranks=4), numerics)
    assert (moved.weights, moved.total, moved.host) == (at_home.weights, at_home.weights, 5 * params)
    assert (all_moved.total, all_moved.host) == (0, 6 * params)


def test_sixteen_bit_engine_is_the_published_formula() -> None:
    """docs/reference/memory-and-scale.md#states: 4P + 12P/N, 2P + 14P/N, 16P/N."""
    params, ranks, numerics = 4_000_000, 8, NUMERICS["bf16"]
    totals = [states([params], Setup("deepspeed", stage, num_ranks=ranks), numerics).total for stage in (1, 2, 3)]
    assert totals == [4 * params + 12 * params / ranks, 2 * params + 14 * params / ranks, 16 * params / ranks]


def test_buckets_are_there_whatever_the_model() -> None:
    numerics = NUMERICS["fp32"]
    for params in (1000, 10**11):
        assert engine_buffers(params, 10, 10, Setup("deepspeed", 2, num_ranks=2), numerics) == 2 * 4 * 500_000_000
    assert engine_buffers(1000, 10, 10, Setup("ddp", num_ranks=2), numerics) == 0
