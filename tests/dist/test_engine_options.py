"""Recomputed blocks, offloaded optimisers and compiled blocks change no result."""

from __future__ import annotations

import logging
import shutil
from functools import partial

import pytest
import torch
from test_eva_engines import ALL, DDP, FSDP2, SINGLE, ZERO, curve
from torch.utils.flop_counter import FlopCounterMode

from evatool.distributed.engines.blocks import blocks_of, checkpoint_blocks, compile_blocks
from evatool.distributed.engines.build import build_engine
from evatool.distributed.engines.amp import autocast
from evatool.distributed.world import World
from evatool.core.errors import RecipeError
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.recipe.schema import EngineSection

CPU = torch.device("cpu")


def tiny_clip() -> torch.nn.Module:
    torch.manual_seed(0)
    return build_clip(resolve_preset("EVA02-CLIP-debug"), patch_dropout=0.5, drop_path_rate=0.2)


def towers_flops(kind: str, precision: str = "fp32") -> tuple[int, dict[str, torch.Tensor]]:
    """Operations of one forward and backward pass through both towers, and the gradients."""
    clip = tiny_clip().train()
    if kind != "none":
        checkpoint_blocks(clip, kind)
    generator = torch.Generator().manual_seed(2)
    image = torch.randn(3, 3, *clip.visual.image_size, generator=generator)
    tokens = torch.randint(1, 49000, (3, 16), generator=generator)
    torch.manual_seed(3)
    with FlopCounterMode(display=False) as counter:
        with autocast(precision, CPU):
            loss = clip.visual(image).square().sum() + clip.text(tokens).square().sum()
        loss.backward()
    return counter.get_total_flops(), {n: p.grad for n, p in clip.named_parameters() if p.grad is not None}


def test_selective_checkpointing_repeats_no_product_and_full_repeats_all():
    flops, grads = towers_flops("none")
    selective, selective_grads = towers_flops("selective")
    full, full_grads = towers_flops("full")
    assert selective == flops
    assert 1.2 * flops < full < 1.5 * flops
    for name, grad in grads.items():  # dropout's random numbers are the same again
        torch.testing.assert_close(selective_grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)
        torch.testing.assert_close(full_grads[name], grad, rtol=1e-5, atol=1e-7, msg=name)


@pytest.mark.parametrize("kind", ["selective", "full"])
def test_checkpointing_in_half_precision_gives_the_same_gradients(kind):
    _, grads = towers_flops("none", "bf16")
    _, recomputed = towers_flops(kind, "bf16")
    for name, grad in grads.items():
        torch.testing.assert_close(recomputed[name], grad, rtol=1e-2, atol=1e-4, msg=name)


def test_without_a_compiler_blocks_run_as_they_are_and_that_is_said_once(monkeypatch, caplog):
    monkeypatch.setattr(shutil, "which", lambda name: None)
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)
    clip = tiny_clip()
    forwards = [block.forward for block in blocks_of(clip)]
    assert not compile_blocks(clip, CPU)
    assert [block.forward for block in blocks_of(clip)] == forwards
    assert [r.message for r in caplog.records] == [
        "engine.compile = true, but no compiler is found (g++, clang++): the blocks run as they are"
    ]


def test_locked_weights_with_checkpointing_on_zero_3():
    clip = tiny_clip()
    clip.visual.requires_grad_(False)
    optimizer = torch.optim.AdamW(clip.text.parameters())
    section = EngineSection(kind="deepspeed", zero_stage=3, activation_checkpointing="full")
    settings = {"precision": "fp32", "grad_clip_norm": None, "optimizer": optimizer, "bounds": {}}
    with pytest.raises(RecipeError, match="ZeRO-3 cannot recompute blocks with locked weights") as error:
        build_engine(section, World(0, 1, 0, CPU), clip, [], **settings)
    assert "fsdp2" in (error.value.fix or "")


def curves(cells: list[dict]) -> list:
    return [curve(settings, "fp32", "adamw") for settings in cells]


RECOMPUTED = [{**cell, "activation_checkpointing": kind} for cell in ALL[:-1] for kind in ("selective", "full")]
RECOMPUTED += [{**ZERO[3], "activation_checkpointing": "full"}]
OFFLOADED = [{**ZERO[stage], "offload": "optimizer"} for stage in (1, 2, 3)]
OFFLOADED += [{**ZERO[3], "offload": "optimizer-and-weights"}]
COMPILED = [{**cell, "compile": True} for cell in (DDP, FSDP2, ZERO[2])]
COMPILED += [{**FSDP2, "compile": True, "activation_checkpointing": "selective"}]
slow = partial(pytest.param, marks=pytest.mark.slow)


@pytest.mark.dist
@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [
        pytest.param(2, [RECOMPUTED[2], RECOMPUTED[-1], OFFLOADED[1]], id="covering"),
        pytest.param(2, RECOMPUTED, id="recomputed", marks=pytest.mark.slow),
        pytest.param(2, OFFLOADED, id="offloaded", marks=pytest.mark.slow),
        pytest.param(
            1, [{**SINGLE, "activation_checkpointing": "selective"}], id="one process", marks=pytest.mark.slow
        ),
        pytest.param(
            2, [{**cell, "compile": True} for cell in (DDP, FSDP2, ZERO[2])], id="compiled", marks=pytest.mark.slow
        ),
        pytest.param(
            2,
            [{**FSDP2, "compile": True, "activation_checkpointing": "selective"}],
            id="compiled and recomputed",
            marks=pytest.mark.slow,
        ),
    ],
)
def test_options_change_no_curve(run_on_ranks, num_ranks, cells):
    reference, weights = curve(SINGLE, "fp32", "adamw")
    for answer in run_on_ranks(curves, num_ranks, cells, timeout_sec=900):
        for cell, (losses, found) in zip(cells, answer, strict=True):
            assert losses == pytest.approx(reference, rel=1e-5), cell
            assert float((found - weights).norm() / weights.norm()) <= 1e-4, cell
