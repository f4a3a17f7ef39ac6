"""Twenty steps of a toy EVA-02 CLIP, with contrastive loss, patch dropout, stochastic depth and layer decay, are the same
everywhere: every engine and ZeRO stage, 1, 2 and 4 ranks, AdamW and LAMB. Dropout is that of a run."""

from __future__ import annotations

from typing import Any

import pytest
import torch
from toy_run import toy_optim

from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engines.build import build_engine
from evatool.distributed.world import World
from evatool.model.clip import build_clip
from evatool.model.keyed_draws import StepDraws
from evatool.model.presets import resolve_preset
from evatool.objective.build import build_objective
from evatool.optim.build import build_optimizer
from evatool.optim.param_groups import build_param_groups
from evatool.recipe.schema import EngineSection, InfoNceObjective
from evatool.core.batch import Batch

pytestmark = pytest.mark.dist

B, NUM_STEPS = 8, 20
SINGLE = {"kind": "single"}
DDP, FSDP2 = {"kind": "ddp"}, {"kind": "fsdp2"}
ZERO = [{"kind": "deepspeed", "zero_stage": stage} for stage in range(4)]
ALL = [DDP, FSDP2, *ZERO]
COVERING = {("fp32", "adamw"): [FSDP2, ZERO[2]], ("fp32", "lamb"): [FSDP2, ZERO[3]], ("bf16", "adamw"): [FSDP2]}
EVERYTHING = {(precision, optim): ALL for precision in ("fp32", "bf16", "fp16") for optim in ("adamw", "lamb")}
LOSS_TOLERANCE = {"fp32": 1e-5, "bf16": 2e-2, "fp16": 5e-3}
"""Relative, of each step's loss."""
WEIGHT_TOLERANCE = {"adamw": 1e-4, "lamb": 1e-5}
"""Relative L2 of all parameters together after the last step, in fp32."""

Curve = tuple[list[float], torch.Tensor]


def curve(engine_settings: dict[str, Any], precision: str, optim_kind: str) -> Curve:
    """Mean loss of every step, and all parameters after the last, flat."""
    torch.manual_seed(0)
    config = resolve_preset("EVA02-CLIP-debug")
    objective = build_objective(InfoNceObjective(), build_clip(config, patch_dropout=0.5, drop_path_rate=0.2))
    draws = StepDraws(objective)
    # eps: so that rounding of tiny gradients does not decide the sign of whole updates
    optim = toy_optim(kind=optim_kind).model_copy(update={"eps": 1e-3})
    groups = build_param_groups(
        objective.named_parameters(), optim, depth_visual=config.depth, depth_text=config.text_depth
    )
    assert len({group.lr_scale for group in groups}) > 2, "layer decay is on"
    engine = build_engine(
        EngineSection(**engine_settings),
        World(rank(), world_size(), rank(), torch.device("cpu")),
        objective,
        groups,
        precision=precision,
        grad_clip_norm=1.0,
        optimizer=build_optimizer(optim, groups),
        bounds=objective.parameter_bounds,
    )
    # A float16 scale at which no rank's share of the gradient overflows, whatever their number; others ignore it.
    scale = {"loss_scale": torch.tensor([256.0]), "loss_scale_good_steps": torch.zeros(1, dtype=torch.int32)}
    engine.load_optimizer_state({"num_updates": torch.zeros(1, dtype=torch.int64)} | scale)
    objective.train()
    losses = []
    generator = torch.Generator().manual_seed(1)
    rows = slice(rank() * B // world_size(), (rank() + 1) * B // world_size())
    for step in range(NUM_STEPS):
        image = torch.randint(0, 256, (B, 3, config.image_size, config.image_size), generator=generator).byte()
        tokens = torch.randint(1, 49406, (B, config.context_length), generator=generator)
        tokens[:, -1] = 49407
        torch.manual_seed(step + 1000 * rank())  # what is not drawn by sample would differ
        engine.set_lrs([1e-3 * group.lr_scale for group in groups])
        draws.start((step * B + torch.arange(B))[rows], 5, torch.device("cpu"))
        loss = engine.forward(Batch(image[rows], [""] * B, tokens[rows]))["loss"]
        engine.backward(loss)
        engine.step()
        losses.append(all_reduce_mean(loss).item())
    state = engine.model_state()
    return losses, torch.cat([state[name].flatten() for name in sorted(state)])


def curves(cells: dict[tuple[str, str], list[dict[str, Any]]]) -> dict[tuple[str, str], list[Curve]]:
    return {how: [curve(settings, *how) for settings in listed] for how, listed in cells.items()}


@pytest.mark.parametrize(
    ("num_ranks", "cells"),
    [
        pytest.param(2, COVERING, id="covering"),
        pytest.param(1, EVERYTHING, id="all on 1 rank", marks=pytest.mark.slow),
        pytest.param(2, EVERYTHING, id="all on 2 ranks", marks=pytest.mark.slow),
        pytest.param(4, EVERYTHING, id="all on 4 ranks", marks=pytest.mark.slow),
    ],
)
def test_the_curve_is_the_single_engines(run_on_ranks, num_ranks, cells):
    expected = {how: curve(SINGLE, *how) for how in cells}
    for answer in run_on_ranks(curves, num_ranks, cells, timeout_sec=1200):
        for how, found in answer.items():
            precision, optim_kind = how
            reference, weights = expected[how]
            assert reference[-1] < reference[0] - 0.1, "it learns"
            for cell, (losses, found_weights) in zip(cells[how], found, strict=True):
                worst = max(abs(a / b - 1) for a, b in zip(losses, reference, strict=True))
                assert worst <= LOSS_TOLERANCE[precision], (how, cell, worst)
                error = float((found_weights - weights).norm() / weights.norm())
                if precision == "fp32":
                    assert error <= WEIGHT_TOLERANCE[optim_kind], (how, cell, error)
