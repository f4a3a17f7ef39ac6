"""First weights that are made one tensor at a time are those of the module built at once, bit for bit."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from tiny_clip import TinyTeacher, tiny_clip
from torch import nn

from evatool.distributed.engines.meta_init import InitialWeights, MetaBuild
from evatool.model.clip import build_clip
from evatool.model.mim import build_mim
from evatool.model.presets import PRESETS, resolve_preset
from evatool.model.vision import restore_buffers
from evatool.objective.build import build_objective
from evatool.recipe import schema
from evatool.recipe.schema import SigmoidObjective
from evatool.teachers.base import Teacher

SMALL = [name for name, config in PRESETS.items() if "debug" in name or "toy" in name]


def both(build: Callable[[], nn.Module]) -> tuple[nn.Module, InitialWeights]:
    torch.manual_seed(3)
    at_once = build()
    torch.manual_seed(3)
    with torch.device("meta"), MetaBuild() as deferred:
        module = build()
    restore_buffers(module)
    return at_once, InitialWeights(module, deferred, {})


def assert_equal(at_once: nn.Module, first: InitialWeights) -> None:
    state = at_once.state_dict()
    assert list(first) == list(state)
    # The last one first: the order in which they are asked for makes no difference.
    for name in reversed(list(state)):
        assert first[name].is_contiguous()
        assert torch.equal(first[name], state[name]), name


@pytest.mark.parametrize("name", SMALL)
def test_clip_and_mim_models(name):
    config = resolve_preset(name)
    if config.task == "clip":
        assert_equal(*both(lambda: build_clip(config, patch_dropout=0.5, drop_path_rate=0.1 if config.is_eva else 0.0)))
    if config.is_eva:
        assert_equal(*both(lambda: build_mim(config, predict_dim=16, drop_path_rate=0.1)))


def test_objectives_with_weights_of_their_own():
    config = resolve_preset("EVA02-CLIP-debug")
    sigmoid, distill = SigmoidObjective(kind="sigmoid"), schema.DistillObjective(kind="distill", feature_weight=1.0)
    teacher = Teacher(TinyTeacher(tiny_clip(width=7), context_length=8), width=7)
    given = {"teachers": [teacher], "context_length": 8, "embed_dim": config.embed_dim or 0}
    assert_equal(*both(lambda: build_objective(sigmoid, build_clip(config))))
    assert_equal(*both(lambda: build_objective(distill, build_clip(config), **given)))
    taught = schema.DistillObjective(loss="sigmoid", logit_weight=0.0, interactive_weight=1.0)
    assert_equal(*both(lambda: build_objective(taught, build_clip(config), **given)))


def test_the_stream_of_random_numbers_is_left_alone():
    torch.manual_seed(5)
    with torch.device("meta"), MetaBuild() as deferred:
        module = nn.Linear(4, 4)
    expected = torch.get_rng_state()
    first = InitialWeights(module, deferred, {"bias": lambda: torch.ones(4)})
    assert first["weight"].shape == (4, 4)
    assert torch.equal(first["bias"], torch.ones(4))
    assert torch.equal(torch.get_rng_state(), expected)
