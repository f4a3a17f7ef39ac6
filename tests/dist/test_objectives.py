"""Every objective has the same loss and gradients on 1 and 2 ranks, through the engine, in float64."""

from __future__ import annotations

import pytest
import torch
from tiny_clip import TinyPatchTeacher, TinyStudent, TinyTeacher, make_batch, rows_of, tiny_clip
from torch import nn

from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engine import build_engine
from evatool.distributed.world import World
from evatool.objective.contrastive import ClipObjective
from evatool.objective.distill import DistillObjective
from evatool.objective.mim import MimObjective
from evatool.recipe import schema
from evatool.types import Batch, ParamGroup

pytestmark = pytest.mark.dist

KINDS = ["pair", "equal-captions", "distill", "mim"]


def build(kind: str) -> tuple[nn.Module, Batch]:
    """The objective in float64 and its global batch of 8, with repeated captions across ranks."""
    batch = make_batch(8, num_captions=5)
    torch.manual_seed(0)
    match kind:
        case "mim":
            teacher = TinyPatchTeacher()
            teacher.head.double()
            # Two of four patches each: ranks with unequal counts weigh their patches differently, as in the release.
            batch.mask = torch.tensor([[True, False, False, True], [False, True, True, False]]).repeat(4, 1)
            return MimObjective(TinyStudent(), teacher, schema.MimObjective()).double(), batch
        case "distill":
            section = schema.DistillObjective(positives="equal-captions")
            teacher = TinyTeacher(tiny_clip(seed=1, width=6).double(), context_length=12)
            widths = {"context_length": 12, "student_width": 8, "teacher_width": 6}
            return DistillObjective(tiny_clip(), teacher, section, **widths).double(), batch
        case _:
            return ClipObjective(tiny_clip(), schema.InfoNceObjective(positives=kind)).double(), batch


def losses_and_gradients(kind: str) -> tuple[dict[str, float], dict[str, torch.Tensor]]:
    """Means over ranks of all losses, and the engine's gradients."""
    objective, batch = build(kind)
    named = list(objective.named_parameters())
    groups = [ParamGroup("all", "other", None, 1e-3, 1.0, 0.0, [p for _, p in named], [name for name, _ in named])]
    world = World(rank(), world_size(), rank(), torch.device("cpu"))
    settings = {"precision": "fp32", "grad_clip_norm": None, "betas": (0.9, 0.98), "eps": 1e-6}
    engine = build_engine(schema.EngineSection(), world, objective, groups, **settings)
    losses = engine.forward(rows_of(batch, rank(), world_size()))
    engine.backward(losses["loss"])
    means = {name: float(all_reduce_mean(loss.double())) for name, loss in losses.items()}
    return means, {name: param.grad.clone() for name, param in named}


@pytest.mark.parametrize("kind", KINDS)
def test_two_ranks_are_one_process(run_on_ranks, kind):
    expected_losses, expected = losses_and_gradients(kind)
    for losses, gradients in run_on_ranks(losses_and_gradients, 2, kind):
        assert losses == pytest.approx(expected_losses, rel=1e-6)
        assert losses["loss"] == pytest.approx(expected_losses["loss"], rel=1e-12)
        assert gradients.keys() == expected.keys()
        for name, gradient in gradients.items():
            torch.testing.assert_close(gradient, expected[name], rtol=1e-10, atol=1e-13, msg=name)
