"""A model is built on the meta device and gets its weights from a checkpoint, without a whole copy on any rank."""

from __future__ import annotations

from pathlib import Path

import pytest
import torch
from live_bytes import LiveBytes
from torch import Tensor, nn
from toy_run import toy_optim

from evatool.checkpoint.load import load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.distributed.collectives import rank, world_size
from evatool.distributed.engines.build import Engine, build_engine
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.distributed.world import World
from evatool.optim.build import build_optimizer
from evatool.recipe.schema import EngineSection
from evatool.core.batch import Batch, LossDict
from evatool.core.param_group import ParamGroup

pytestmark = pytest.mark.dist

CPU = torch.device("cpu")
WIDTH, DEPTH = 63, 12  # uneven over 4 ranks
CELLS = [("fsdp2", 0), ("deepspeed", 3)]
PEAK = {("fsdp2", 0): 0.9, ("deepspeed", 3): 1.4}
"""Most bytes on a rank as a share of all weights. A quarter each: weights, two moments; under ZeRO a master copy and
gradients too. A whole copy of the weights would add three quarters."""


class Deep(nn.Module):
    """Equal blocks: no tensor is more than a small part of the whole."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([nn.Linear(WIDTH, WIDTH) for _ in range(DEPTH)])
        self.register_buffer("shift", torch.full((WIDTH,), 0.5))

    def forward(self, batch: Batch) -> LossDict:
        x = batch.image
        for block in self.blocks:
            x = x + torch.tanh(block(x)) + self.shift
        return {"loss": x.square().mean()}


def build(module: nn.Module, kind: str, zero_stage: int) -> Engine:
    names = [name for name, _ in module.named_parameters()]
    groups = [ParamGroup("all", "visual", None, 1.0, 1.0, 0.0, list(module.parameters()), names)]
    return build_engine(
        EngineSection(kind=kind, zero_stage=zero_stage),
        World(rank(), world_size(), rank(), CPU),
        module,
        groups,
        precision="fp32",
        grad_clip_norm=None,
        optimizer=build_optimizer(toy_optim(), groups),
        bounds={},
    )


def build_and_load(path: Path, kind: str, zero_stage: int) -> tuple[int, int, float, dict[str, Tensor]]:
    """Most bytes at a time while building and loading; parameter bytes; a first loss; the weights."""
    with torch.device("meta"):
        module = Deep()
    module.shift = torch.full((WIDTH,), 0.5)
    total = sum(4 * param.numel() for param in module.parameters())
    with LiveBytes() as live:
        engine = build(module, kind, zero_stage)
        built = live.peak
        engine.load_model_state(load_checkpoint(path).objective_state)
    loss = float(engine.forward(Batch(torch.ones(2, WIDTH), ["", ""]))["loss"].detach())
    return max(built, live.peak), total, loss, {name: t.clone() for name, t in engine.model_state().items()}


def build_cells(path: Path) -> list[tuple[int, int, float, dict[str, Tensor]]]:
    return [build_and_load(path, *cell) for cell in CELLS]


def test_no_rank_holds_all_weights(run_on_ranks, tmp_path):
    torch.manual_seed(0)
    whole = Deep()
    loss = float(whole(Batch(torch.ones(2, WIDTH), ["", ""]))["loss"].detach())
    saved = save_run(tmp_path, 1, objective_state=ShardedState.whole(whole.state_dict()), optimizer_state=ShardedState(), groups=[], train_state={}, model_config={}, resolved_toml="", keep=1)  # fmt: skip  # noqa: E501
    for answer in run_on_ranks(build_cells, 4, saved):
        for cell, (peak, total, found_loss, found) in zip(CELLS, answer, strict=True):
            assert found_loss == pytest.approx(loss, rel=1e-6), cell
            assert all(torch.equal(found[name], tensor) for name, tensor in whole.state_dict().items()), cell
            assert peak <= PEAK[cell] * total, (cell, peak / total)
