"""The single-process engine beside plain torch, and the choice of engine."""

from __future__ import annotations

import math
import sys

import pytest
import torch
from pydantic import ValidationError
from toy_run import ToyLoader, ToyObjective, toy_engine, toy_groups

from evatool.core.errors import CheckpointError, DependencyError, RecipeError
from evatool.distributed.engines.build import engine_kind
from evatool.distributed.engines.deepspeed import zero_config
from evatool.recipe.load import resolve_table
from evatool.recipe.schema import EngineSection


def test_steps_equal_plain_torch():
    """Clipping, AdamW and the temperature's bounds, against torch's own pieces put together by hand."""
    torch.manual_seed(0)
    ours, theirs = ToyObjective(dropout=0.0), ToyObjective(dropout=0.0)
    theirs.load_state_dict(ours.state_dict())
    groups = toy_groups(ours)
    engine = toy_engine(ours, groups, clip=0.5)
    plain = toy_groups(theirs)
    optimizer = torch.optim.AdamW(
        [{"params": group.params, "weight_decay": group.weight_decay} for group in plain], betas=(0.9, 0.98), eps=1e-6
    )
    for step, batch in zip(range(5), ToyLoader(), strict=False):
        lrs = [0.1 * group.lr_scale / (step + 1) for group in groups]
        engine.set_lrs(lrs)
        engine.backward(engine.forward(batch)["loss"])
        norm = engine.step()

        for group, lr in zip(optimizer.param_groups, lrs, strict=True):
            group["lr"] = lr
        optimizer.zero_grad()
        theirs(batch)["loss"].backward()
        expected_norm = torch.nn.utils.clip_grad_norm_(theirs.parameters(), 0.5)
        optimizer.step()
        with torch.no_grad():
            theirs.model.logit_scale.clamp_(0, math.log(100))
        torch.testing.assert_close(norm, expected_norm, rtol=1e-6, atol=0)
        for name, param in theirs.named_parameters():  # measured worst case 6e-7
            torch.testing.assert_close(dict(ours.named_parameters())[name], param, rtol=1e-5, atol=2e-6, msg=name)


def test_gradients_are_gone_after_the_step():
    objective = ToyObjective()
    engine = toy_engine(objective, toy_groups(objective))
    engine.backward(engine.forward(next(iter(ToyLoader())))["loss"])
    engine.step()
    assert all(param.grad is None for param in objective.parameters())


def test_bf16_keeps_weights_and_moments_in_fp32():
    objective = ToyObjective(dropout=0.0)
    engine = toy_engine(objective, toy_groups(objective), precision="bf16")
    seen = []
    objective.model.visual.blocks[0].register_forward_hook(lambda module, args, out: seen.append(out.dtype))
    engine.backward(engine.forward(next(iter(ToyLoader())))["loss"])
    engine.step()
    assert seen == [torch.bfloat16]
    states = engine.model_state() | engine.optimizer_state()
    assert {t.dtype for name, t in states.items() if name != "num_updates"} == {torch.float32}


def test_a_parameter_without_gradient_is_left_alone():
    objective = ToyObjective(has_projection=True)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups)
    objective.projection, projection = None, objective.projection
    before = projection.weight.detach().clone()
    engine.set_lrs([group.lr for group in groups])
    engine.backward(engine.forward(next(iter(ToyLoader())))["loss"])
    engine.step()
    assert torch.equal(projection.weight, before), "not even decayed"
    assert "exp_avg.projection.weight" not in engine.optimizer_state()


@pytest.mark.parametrize(
    ("kind", "world_size", "expected"),
    [
        ("auto", 1, "single"),
        ("auto", 2, "fsdp2"),
        ("single", 1, "single"),
        ("ddp", 2, "ddp"),
        ("ddp", 1, "ddp"),
        ("fsdp2", 1, "fsdp2"),
        ("deepspeed", 4, "deepspeed"),
    ],
)
def test_choice_of_engine(kind, world_size, expected):
    assert engine_kind(EngineSection(kind=kind), world_size) == expected


def test_single_in_several_processes():
    with pytest.raises(RecipeError, match='"single" runs in one process, but this job has 2') as error:
        engine_kind(EngineSection(kind="single"), 2)
    assert "fsdp2" in (error.value.fix or "")


@pytest.mark.parametrize(
    ("settings", "message"),
    [
        ({"kind": "ddp", "zero_stage": 1}, 'has no effect with kind = "ddp": set kind = "deepspeed"'),
        ({"zero_stage": 2}, 'has no effect with kind = "auto"'),
        ({"kind": "single", "processes": 2}, 'processes = 2: use kind = "fsdp2"'),
        ({"kind": "deepspeed", "zero_stage": 4}, "less than or equal to 3"),
        ({"kind": "fsdp2", "offload": "optimizer"}, 'set kind = "deepspeed" and a zero_stage'),
        ({"kind": "deepspeed", "offload": "optimizer"}, "zero_stage = 0 divides nothing: set zero_stage to 1, 2 or 3"),
        ({"kind": "deepspeed", "zero_stage": 2, "offload": "optimizer-and-weights"}, "needs zero_stage = 3"),
        ({"kind": "deepspeed", "zero_stage": 3, "compile": True}, 'set zero_stage to 0, 1 or 2, or kind = "fsdp2"'),
        (
            {"kind": "deepspeed", "zero_stage": 3, "activation_checkpointing": "selective"},
            'set activation_checkpointing = "full"',
        ),
    ],
    ids=[
        *("zero without deepspeed", "zero with auto", "single in two", "no such stage", "offload without deepspeed"),
        *("offload of nothing", "weights offloaded undivided", "compiled ZeRO-3", "selective ZeRO-3"),
    ],
)
def test_settings_without_effect_are_refused(settings, message):
    with pytest.raises(ValidationError, match=message):
        EngineSection(**settings)


def test_offload_with_lamb():
    table = {
        "data": {"train": "x"},
        "model": {"preset": "EVA02-CLIP-debug"},
        "optim": {"kind": "lamb", "visual": {"lr": 1e-3}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 8, "global_batch_size": 8},
        "engine": {"kind": "deepspeed", "zero_stage": 1, "offload": "optimizer"},
    }
    with pytest.raises(RecipeError) as error:
        resolve_table(table, "train-clip")
    assert "works with AdamW only" in str(error.value)
    assert 'engine.kind = "fsdp2"' in str(error.value)


@pytest.mark.parametrize("stage", range(4))
@pytest.mark.parametrize("offload", ["none", "optimizer", "optimizer-and-weights"])
def test_deepspeed_knows_every_key_of_its_configuration(monkeypatch, stage, offload):
    """EVA's file had keys of stage 3 outside of their section, where nothing read them
    (docs/reference/eva.md#deepspeed-configuration).
    """
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    from deepspeed.runtime.zero.config import DeepSpeedZeroConfig

    config = zero_config(stage, 1.0, torch.device("cpu"), offload)
    parsed = DeepSpeedZeroConfig(**config["zero_optimization"])
    assert int(parsed.stage) == stage
    assert (parsed.offload_optimizer is not None) == (offload != "none")
    assert not parsed.model_extra
    assert {"gradient_clipping", "zero_optimization", "zero_allow_untested_optimizer"} <= set(config)


def test_missing_deepspeed(monkeypatch):
    monkeypatch.setitem(sys.modules, "deepspeed", None)
    monkeypatch.setenv("DS_ACCELERATOR", "cpu")
    objective = ToyObjective()
    with pytest.raises(DependencyError, match="needs DeepSpeed") as error:
        toy_engine(objective, toy_groups(objective), "deepspeed", 1)
    assert "pip install" in (error.value.fix or "")


def test_moments_of_another_model():
    objective = ToyObjective()
    engine = toy_engine(objective, toy_groups(objective))
    engine.backward(engine.forward(next(iter(ToyLoader())))["loss"])
    engine.step()
    state = engine.optimizer_state()
    with pytest.raises(CheckpointError, match=r"unknown parameters: exp_avg\.gone"):
        engine.load_optimizer_state(state | {"exp_avg.gone": torch.zeros(1)})
    with pytest.raises(CheckpointError, match=r"exp_avg\.model\.logit_scale has shape \(2,\)"):
        engine.load_optimizer_state(state | {"exp_avg.model.logit_scale": torch.zeros(2)})
