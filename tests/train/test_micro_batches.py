"""Gradients from small batches are those of the whole batch, dropout included."""

from __future__ import annotations

import copy

import pytest
import torch
from tiny_clip import TinyPatchTeacher, TinyStudent, make_batch, tiny_clip
from tiny_distill import DISTILLATIONS, teachers_of, tiny_distillation
from torch import nn

from evatool.core.batch import Batch
from evatool.core.param_group import ParamGroup
from evatool.distributed.engines.build import Engine, build_engine
from evatool.distributed.world import World
from evatool.model.clip import build_clip
from evatool.model.keyed_draws import StepDraws
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.objective.mim import MimObjective
from evatool.recipe import schema
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate

Found = tuple[dict[str, torch.Tensor], dict[str, torch.Tensor]]


def engine_of(objective: nn.Module) -> Engine:
    named = [(name, param) for name, param in objective.named_parameters() if param.requires_grad]
    groups = [ParamGroup("all", "other", None, 1e-3, 1.0, 0.0, [p for _, p in named], [name for name, _ in named])]
    optimizer = torch.optim.AdamW(groups[0].params, lr=0.0, fused=True)
    world = World(0, 1, 0, torch.device("cpu"))
    section = schema.EngineSection()
    settings = {"precision": "fp32", "grad_clip_norm": None, "bounds": objective.parameter_bounds}
    return build_engine(section, world, objective, groups, optimizer=optimizer, **settings)


def gradients(
    objective: nn.Module, batch: Batch, micro_batch_size: int, gate: SpikeGate | None = None, by_sample: bool = False
) -> Found:
    objective = copy.deepcopy(objective).train()
    draws = StepDraws(objective) if by_sample else None

    def draw(chunk: Batch) -> None:
        if draws is not None:
            draws.start(chunk.sample, 1, torch.device("cpu"))

    losses = forward_backward(
        engine_of(objective),
        objective,
        batch,
        micro_batch_size=micro_batch_size,
        seed=3,
        gate=gate or SpikeGate(None),
        draw=draw,
    )
    return losses, {name: param.grad for name, param in objective.named_parameters() if param.grad is not None}


def assert_equal(found: Found, expected: Found, rtol: float) -> None:
    assert found[0].keys() == expected[0].keys()
    assert found[1].keys() == expected[1].keys()
    for ours, theirs in zip(found, expected, strict=True):
        for name, value in theirs.items():
            error = (ours[name] - value).norm() / value.norm().clamp(min=1e-30)
            assert error <= rtol, f"{name}: {error:.1e}"


def tiny_objective(kind: str) -> tuple[nn.Module, Batch]:
    batch = make_batch(12, num_captions=9)
    match kind:
        case _ if kind in DISTILLATIONS:
            return tiny_distillation(kind), batch
        case "sigmoid":
            return build_objective(schema.SigmoidObjective(positives="equal-captions"), tiny_clip()).double(), batch
        case "fixed temperature":
            section = schema.InfoNceObjective(temperature=schema.FixedTemperature(value=0.02))
            return build_objective(section, tiny_clip()).double(), batch
        case "mim":
            teacher = TinyPatchTeacher()
            teacher.head.double()
            torch.manual_seed(0)
            batch.mask = torch.rand(12, 4) < torch.linspace(0.2, 0.9, 12)[:, None]  # other counts in each part
            batch.mask[:, 0] = True
            return MimObjective(TinyStudent(), teacher).double(), batch
        case _:
            return build_objective(schema.InfoNceObjective(positives=kind), tiny_clip()).double(), batch


@pytest.mark.parametrize("micro_batch_size", [1, 4, 6])
@pytest.mark.parametrize("kind", ["pair", "equal-captions", "sigmoid", "fixed temperature", "mim", *DISTILLATIONS])
def test_small_batches_give_the_whole_batchs_losses_and_gradients(kind: str, micro_batch_size: int) -> None:
    objective, batch = tiny_objective(kind)
    found = gradients(objective, batch, micro_batch_size)
    expected = gradients(objective, batch, 12)
    for name in ("mask_ratio", "i2t_top1", "t2i_top1"):  # shares, in float32
        assert float(found[0].pop(name, 0)) == pytest.approx(float(expected[0].pop(name, 0)), rel=1e-6)
    assert_equal(found, expected, rtol=1e-12)


def test_the_teacher_runs_once_and_the_features_once_more() -> None:
    objective, batch = tiny_objective("distill")
    calls = {"student": 0, "teacher": 0}
    objective.model.visual.register_forward_hook(lambda *_: calls.update(student=calls["student"] + 1))
    teachers_of(objective)[0].clip.model.visual.register_forward_hook(
        lambda *_: calls.update(teacher=calls["teacher"] + 1)
    )
    copied = copy.deepcopy
    try:
        copy.deepcopy = lambda x: x  # the hooks count on this very objective
        gradients(objective, batch, 3)
    finally:
        copy.deepcopy = copied
    assert calls == {"student": 7, "teacher": 4}, "4 small batches: the last one's features are kept with their graph"


# ------------------------------------------------------------------------------------------- a real tower, dropout on


def eva_objective(dtype: torch.dtype) -> nn.Module:
    config = resolve_preset("EVA02-CLIP-debug")
    torch.manual_seed(0)
    model = build_clip(config, patch_dropout=0.5, drop_path_rate=0.3)
    return build_objective(schema.InfoNceObjective(), model).to(dtype)


def eva_batch(size: int) -> Batch:
    batch = make_batch(size, context_length=16, image_size=32)
    assert batch.tokens is not None
    return batch


def one_graph(objective: nn.Module, batch: Batch, num_chunks: int) -> Found:
    """The same dropout as in small batches, but one graph from all pixels to the loss, kept whole."""
    objective = copy.deepcopy(objective).train()
    size = len(batch.keys) // num_chunks
    parts = []
    for number in range(num_chunks):
        torch.manual_seed((3 + 0x9E3779B97F4A7C15 * (number + 1)) & (2**63 - 1))
        parts.append(objective.encode(batch.rows(slice(number * size, (number + 1) * size))))
    joined = {n: parts[0][n] if parts[0][n].dim() == 0 else torch.cat([p[n] for p in parts]) for n in parts[0]}
    losses = objective.losses(joined, batch)
    losses["loss"].backward()
    grads = {name: param.grad for name, param in objective.named_parameters() if param.grad is not None}
    return {name: loss.detach() for name, loss in losses.items()}, grads


@pytest.mark.parametrize(("dtype", "rtol"), [(torch.float64, 1e-12), (torch.float32, 1e-6)], ids=["fp64", "fp32"])
def test_512_in_8_with_patch_dropout_and_drop_path(dtype: torch.dtype, rtol: float) -> None:
    """Measured worst case: 3e-15 in float64."""
    objective, batch = eva_objective(dtype), eva_batch(512)
    found, expected = gradients(objective, batch, 64), one_graph(objective, batch, 8)
    for logged in (found[0], expected[0]):
        logged.pop("i2t_top1"), logged.pop("t2i_top1")
    assert_equal(found, expected, rtol)
    # So that the equality says something: other random numbers give other gradients.
    name = "model.visual.trunk.blocks.1.mlp.fc2.weight"
    other = one_graph(objective, batch, 4)[1][name]
    assert (other - expected[1][name]).norm() > 1e-3 * other.norm()


def test_a_closed_gate_spoils_every_gradient_in_each_way() -> None:
    class Closed(SpikeGate):
        def __call__(self, loss):
            return torch.full_like(loss, torch.nan)

    for kind, micro in (("pair", 12), ("pair", 4), ("mim", 12), ("mim", 4)):
        objective, batch = tiny_objective(kind)
        _, grads = gradients(objective, batch, micro, gate=Closed())
        assert any(bool(grad.isnan().any()) for grad in grads.values()), (kind, micro)
