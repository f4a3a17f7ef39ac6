"""Frozen towers, offload and moving averages in the plan, against locked models and what they do."""

from __future__ import annotations

from dataclasses import replace

import pytest
import torch
from saved_bytes import tower_bytes
from torch.utils.flop_counter import FlopCounterMode

from evatool.model.clip import build_clip
from evatool.model.presets import PRESETS, resolve_preset
from evatool.optim.locking import lock
from evatool.plan.engines import Setup, average_bytes, states
from evatool.plan.estimate import learned_params, memory, operations
from evatool.plan.hardware import hardware
from evatool.plan.job import PlannedJob, job_of_recipe
from evatool.plan.locked import Layers, Locks, frozen_params, idle_blocks
from evatool.plan.memory import FP32, NUMERICS, image_activations, text_activations
from evatool.plan.pace import checkpoint_bytes, traffic
from evatool.recipe.load import load_recipe

LOCKS = [Locks("all"), Locks(3), Locks(0, 2), Locks(None, "all"), Locks("all", "all")]
L14 = PRESETS["EVA02-CLIP-L-14"]
B = 2


def locked_clip(name: str, locks: Locks) -> torch.nn.Module:
    """On the meta device."""
    config = resolve_preset(name)
    with torch.device("meta"):
        clip = build_clip(config)
    named = [(f"model.{key}", param) for key, param in clip.named_parameters()]
    for tower, layers, depth in (("visual", locks.visual, config.depth), ("text", locks.text, config.text_depth)):
        if layers is not None:
            lock(named, tower, layers, depth)  # type: ignore[arg-type]
    return clip


def job(**changes: object) -> PlannedJob:
    base = PlannedJob("l14", "train-clip", L14, (), 4_000_000, 1024, 8, "autocast", "fsdp2")
    return replace(base, **changes)  # type: ignore[arg-type]


@pytest.mark.parametrize("locks", LOCKS, ids=str)
@pytest.mark.parametrize("name", ["EVA02-CLIP-B-16", "EVA-CLIP-8B", "EVA01-CLIP-g-14", "OpenAI-CLIP-B-16"])
def test_what_learns_is_counted(name: str, locks: Locks) -> None:
    clip = locked_clip(name, locks)
    frozen = sum(param.numel() for param in clip.parameters() if not param.requires_grad)
    assert frozen_params(resolve_preset(name), locks) == frozen > 0


@pytest.mark.parametrize("locks", [Locks(6), Locks("all"), Locks(None, "all"), Locks(6, 6)], ids=str)
@pytest.mark.parametrize("name", ["EVA02-CLIP-B-16", "OpenAI-CLIP-B-16"])
def test_frozen_layers_go_forward_only(name: str, locks: Locks) -> None:
    config = resolve_preset(name)
    clip = locked_clip(config.name, locks)
    with FlopCounterMode(display=False) as counter, torch.device("meta"):
        image = clip.encode_image(torch.empty(B, 3, config.image_size, config.image_size))
        text = clip.encode_text(torch.zeros(B, config.context_length, dtype=torch.int64))
        (image.sum() + text.sum()).backward()
    planned = operations(job(model=config, locks=locks)).model
    assert planned == pytest.approx(counter.get_total_flops() / B, rel=0.01)


@pytest.mark.parametrize("numerics", ["bf16", "autocast"])
@pytest.mark.parametrize("layers", [0, 12, "all"])
def test_frozen_blocks_of_pictures_keep_nothing(layers: Layers, numerics: str) -> None:
    idle = idle_blocks(L14, Locks(layers))[0]
    planned = image_activations(L14, NUMERICS[numerics], idle_blocks=idle, is_locked=layers == "all").kept
    measured = tower_bytes(L14.name, "visual", numerics, locked=layers)
    assert planned == pytest.approx(measured, rel=0.03)


@pytest.mark.parametrize("layers", [6, "all"])
def test_frozen_blocks_of_captions_keep_nothing(layers: Layers) -> None:
    idle = idle_blocks(L14, Locks(None, layers))[1]
    planned = text_activations(L14, NUMERICS["autocast"], idle_blocks=idle, is_locked=layers == "all").kept
    measured = tower_bytes(L14.name, "text", "autocast", locked=layers)
    assert planned == pytest.approx(measured, rel=0.03)


def test_a_locked_tower_saves_states_work_and_traffic() -> None:
    """LiT: beside a frozen image tower the text tower learns at a fraction of the cost."""
    whole, locked, gpu = job(), job(locks=Locks("all")), hardware("h100")
    frozen = frozen_params(L14, Locks("all"))
    assert learned_params(whole) - learned_params(locked) == frozen
    assert memory(locked).total < memory(whole).total / 3
    assert operations(locked).model < operations(whole).model / 2
    assert traffic(locked, gpu, 1.0).total < traffic(whole, gpu, 1.0).total
    assert checkpoint_bytes(whole) - checkpoint_bytes(locked) == 8 * frozen


def test_the_recipe_says_what_is_locked_and_averaged() -> None:
    settings = ['model.lock.visual="all"', "model.lock.text=2", "train.ema_decay=0.999"]
    settings += ["model.init.kind=clip", "model.init.path=x", "model.drop_path_rate=0.0"]
    resolved = load_recipe("demo/train-clip", settings)
    planned = job_of_recipe(resolved.recipe, resolved.name, 1)
    assert (planned.locks, planned.averages) == (Locks("all", 2), True)
    params = learned_params(planned) + frozen_params(planned.model, planned.locks)
    assert memory(planned).parts["average"] == FP32 * params
    assert checkpoint_bytes(planned) == FP32 * 2 * params + 2 * FP32 * learned_params(planned)


def test_averages_stay_with_the_numbers_they_are_of() -> None:
    learned, frozen, ranks = [4_000_000], [1_000_000], 4
    assert average_bytes(learned, Setup("ddp", num_ranks=ranks), frozen) == (20_000_000, 0)
    assert average_bytes(learned, Setup("fsdp2", num_ranks=ranks), frozen) == (5_000_000, 0)
    assert average_bytes(learned, Setup("deepspeed", 2, num_ranks=ranks), frozen) == (8_000_000, 0)
    assert average_bytes(learned, Setup("deepspeed", 2, "optimizer", ranks), frozen) == (4_000_000, 4_000_000)
    assert average_bytes(learned, Setup("deepspeed", 3, "optimizer-and-weights", ranks), frozen) == (0, 5_000_000)


def test_frozen_weights_are_divided_where_weights_are() -> None:
    numerics, ranks = NUMERICS["fp32"], 4
    for setup, share in ((Setup("ddp", num_ranks=ranks), 1), (Setup("fsdp2", num_ranks=ranks), 4)):
        more, less = (states([4_000_000], setup, numerics, frozen) for frozen in ([1_000_000], ()))
        assert more.total - less.total == FP32 * 1_000_000 // share
