"""A loss from outside the package, with parameters of its own, and the engine around an objective that has it."""

from __future__ import annotations

import pytest
import torch
import torch.nn.functional as F
from tiny_clip import make_batch, rows_of, tiny_clip
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.core.param_group import ParamGroup
from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engines.build import Engine, build_engine
from evatool.distributed.world import World
from evatool.objective.base import Features
from evatool.objective.clip import ClipObjective
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.contrastive import InfoNceTerm
from evatool.optim.build import build_optimizer
from evatool.optim.param_groups import build_param_groups
from evatool.recipe.schema import AdamWSection, EngineSection, GroupSection
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate

B, E = 12, 8
OPTIM = AdamWSection(visual=GroupSection(lr=1e-2), text=GroupSection(lr=1e-2), eps=1e-3)


class LengthTerm(LossTerm):
    """Predicts the length of each caption from its image: a scale, a layer, and a target made from the batch."""

    batch_fields = ("tokens",)

    def __init__(self, weight: float | tuple[tuple[int, float], ...] = 0.5) -> None:
        super().__init__("length_loss", weight)
        self.add_part("length_scale", nn.Parameter(torch.ones(1)), tower="text", lr_scale=0.5)
        self.add_part("length_head", nn.Linear(E, 1))
        self.add_part("length_unit", torch.full((1,), 7.0))

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        return {"length": self.part("length_scale") * self.part("length_head")(features["image"]).squeeze(-1)}

    def targets(self, batch: Batch, found: Features) -> Features:
        assert batch.tokens is not None
        return {"length_target": (batch.tokens > 0).sum(dim=1) / self.part("length_unit")}

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        return F.mse_loss(features["length"], features["length_target"].to(features["length"].dtype)), {}


def build(
    kind: str = "auto", zero_stage: int = 0, weight: float | tuple[tuple[int, float], ...] = 0.5
) -> tuple[ClipObjective, list[ParamGroup], Engine]:
    torch.manual_seed(4)
    objective = ClipObjective(tiny_clip(), terms=[InfoNceTerm(), LengthTerm(weight)])
    groups = build_param_groups(
        objective.named_parameters(), OPTIM, depth_visual=1, depth_text=2, owners=objective.parameter_owners()
    )
    engine = build_engine(
        EngineSection(kind=kind, zero_stage=zero_stage),
        World(rank(), world_size(), rank(), torch.device("cpu")),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=build_optimizer(OPTIM, groups),
        bounds=objective.parameter_bounds,
    )
    return objective, groups, engine


def steps(kind: str, zero_stage: int, num_chunks: int) -> tuple[list[float], dict[str, Tensor]]:
    """Losses of two steps, and the weights after them."""
    objective, groups, engine = build(kind, zero_stage)
    objective.train()
    batch = rows_of(make_batch(B), rank(), world_size())
    losses = []
    for step in range(2):
        engine.set_lrs([group.lr * group.lr_scale for group in groups])
        size = len(batch.keys) // num_chunks
        found = forward_backward(engine, objective, batch, micro_batch_size=size, seed=step, gate=SpikeGate(None))
        losses += [float(all_reduce_mean(found[name])) for name in ("loss", "contrastive_loss", "length_loss")]
        engine.step()
    return losses, {name: tensor.clone() for name, tensor in engine.model_state().items()}


def assert_like(found: tuple[list[float], dict[str, Tensor]], expected: tuple[list[float], dict[str, Tensor]]) -> None:
    assert found[0] == pytest.approx(expected[0], rel=1e-5)
    assert found[1].keys() == expected[1].keys()
    for name, tensor in expected[1].items():
        torch.testing.assert_close(found[1][name], tensor, rtol=1e-4, atol=1e-5, msg=name)
