"""A contrastive toy: two linear towers with dropout, and a loader whose batches follow from (seed, position)."""

from __future__ import annotations

import math
import threading
from collections.abc import Iterator, Sequence
from dataclasses import fields
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.core.batch import Batch, LossDict
from evatool.core.loader import Loader
from evatool.core.param_group import ParamGroup, ParamOwner
from evatool.core.step import StepContext
from evatool.distributed.collectives import all_gather_with_grad, rank, world_size
from evatool.distributed.engines.build import Engine, build_engine
from evatool.distributed.world import World
from evatool.objective.base import START, Objective
from evatool.optim.build import build_optimizer
from evatool.optim.param_groups import build_param_groups
from evatool.optim.schedules import warmup_cosine
from evatool.recipe.schema import AdamWSection, EngineSection, GroupSection, LambSection, OptimSection
from evatool.train.control import StepResult, TrainerConfig, TrainerControl
from evatool.train.hooks.base import Hook
from evatool.train.hooks.checkpoint import Checkpoints
from evatool.train.hooks.log import MetricsFile
from evatool.train.state import TrainState, resume_from
from evatool.train.trainer import Trainer

B, S, L, E, VOCAB = 8, 4, 5, 8, 32
NUM_STEPS = 12


class ToyVisual(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.patch_embed = nn.Linear(3 * S * S, E)
        self.blocks = nn.ModuleList([nn.Linear(E, E) for _ in range(2)])
        self.norm = nn.LayerNorm(E)
        self.dropout = nn.Dropout(dropout)
        self.register_buffer("scale", torch.full((1,), 2.0))

    def forward(self, image: Tensor) -> Tensor:
        x = self.patch_embed(image.flatten(1).to(self.norm.weight.dtype) / 255)
        for block in self.blocks:
            x = x + self.dropout(torch.tanh(block(x)))
        return self.norm(x) * self.scale


class ToyText(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.token_embedding = nn.Embedding(VOCAB, E)
        self.text_projection = nn.Parameter(torch.randn(E, E) * E**-0.5)

    def forward(self, tokens: Tensor) -> Tensor:
        return self.token_embedding(tokens).mean(1) @ self.text_projection


class ToyClip(nn.Module):
    def __init__(self, dropout: float) -> None:
        super().__init__()
        self.visual, self.text = ToyVisual(dropout), ToyText()
        self.logit_scale = nn.Parameter(torch.full((1,), math.log(1 / 0.07)))


class ToyObjective(Objective):
    """The two towers, and a projection of its own if asked for."""

    parameter_bounds = {"model.logit_scale": (0.0, math.log(100))}  # noqa: RUF012

    def __init__(self, dropout: float = 0.1, has_projection: bool = False) -> None:
        super().__init__()
        self.model = ToyClip(dropout)
        self.projection = nn.Linear(E, E) if has_projection else None

    def parameter_owners(self) -> dict[str, ParamOwner]:
        return {name: ParamOwner() for name, _ in self.named_parameters() if name.startswith("projection.")}

    def forward(self, batch: Batch, step: StepContext = START) -> LossDict:
        assert batch.tokens is not None
        image, text = F.normalize(self.model.visual(batch.image), dim=-1), self.model.text(batch.tokens)
        text = F.normalize(text if self.projection is None else self.projection(text), dim=-1)
        scale = self.model.logit_scale.exp()
        labels = torch.arange(len(image)) + rank() * len(image)
        to_text = F.cross_entropy(scale * image @ all_gather_with_grad(text).T, labels)
        to_image = F.cross_entropy(scale * text @ all_gather_with_grad(image).T, labels)
        return {"loss": (to_text + to_image) / 2, "logit_scale": scale.detach()}


class ToyLoader(Loader):
    """This rank's rows of batches of `B` samples over all ranks."""

    def __init__(
        self, seed: int = 0, position: int = 0, batch_size: int = B, rank: int = 0, world_size: int = 1
    ) -> None:
        self.position, self._seed, self._batch_size = position, seed, batch_size
        self._rows = slice(rank * batch_size // world_size, (rank + 1) * batch_size // world_size)

    def __iter__(self) -> Iterator[Batch]:
        while True:
            generator = torch.Generator().manual_seed(self._seed * 1_000_003 + self.position)
            image = torch.randint(0, 256, (self._batch_size, 3, S, S), generator=generator, dtype=torch.uint8)
            tokens = torch.randint(1, VOCAB, (self._batch_size, L), generator=generator)
            keys = [f"sample{self.position + i}" for i in range(self._batch_size)]
            self.position += self._batch_size
            yield Batch(image[self._rows], keys[self._rows], tokens[self._rows], position=self.position)


def toy_engine(
    objective: Objective,
    groups: list[ParamGroup],
    kind: str = "auto",
    zero_stage: int = 0,
    clip: float | None = 1.0,
    precision: str = "fp32",
    optim: OptimSection | None = None,
) -> Engine:
    world = World(rank(), world_size(), rank(), torch.device("cpu"))
    return build_engine(
        EngineSection(kind=kind, zero_stage=zero_stage),
        world,
        objective,
        groups,
        precision=precision,
        grad_clip_norm=clip,
        optimizer=build_optimizer(optim or toy_optim(), groups),
        bounds=objective.parameter_bounds,
    )


def toy_optim(layer_decay: float = 0.8, has_other: bool = True, kind: str = "adamw") -> OptimSection:
    return {"adamw": AdamWSection, "lamb": LambSection}[kind](
        visual=GroupSection(lr=1e-2, weight_decay=0.1, layer_decay=layer_decay),
        text=GroupSection(lr=5e-3, weight_decay=0.1),
        other=GroupSection(lr=1e-2) if has_other else None,
        grad_clip_norm=1.0,
    )


def toy_groups(objective: Objective, section: OptimSection | None = None) -> list[ParamGroup]:
    owners = objective.parameter_owners()
    named = objective.named_parameters()
    return build_param_groups(named, section or toy_optim(), depth_visual=2, depth_text=0, owners=owners)


class LetSavesEnd(Hook):
    """Steps as slow as saves, for tests that tell which save is made after which step."""

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        let_saves_end()


def let_saves_end() -> None:
    """Wait until no checkpoint is being written in this process."""
    for thread in threading.enumerate():
        if thread.name == "checkpoint writer":
            thread.join()


def make_trainer(
    run_dir: Path,
    *,
    hooks: Sequence[Hook] = (),
    every_steps: int | None = 5,
    resume: bool = False,
    seed: int = 7,
    keep_every_steps: int | None = None,
    kind: str = "auto",
    zero_stage: int = 0,
    **settings: Any,
) -> Trainer:
    """`NUM_STEPS` toy steps in `run_dir`, from the start or the newest checkpoint; `hooks` come before saving."""
    torch.manual_seed(seed)
    objective = ToyObjective(has_projection=True)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups, kind, zero_stage)
    state = TrainState(seed=seed)
    if resume:
        latest = latest_checkpoint(run_dir)
        assert latest is not None
        state = resume_from(load_checkpoint(latest), engine, groups)
    save = partial(save_run, run_dir / "checkpoints", model_config={"task": "clip"}, resolved_toml="a = 1\n", keep=2)
    save = partial(save, keep_every_steps=keep_every_steps)

    def restore() -> Checkpoint | None:
        latest = latest_checkpoint(run_dir)
        return None if latest is None else load_checkpoint(latest)

    plain = {"num_steps": NUM_STEPS, "global_batch_size": B, "log_every": 1}
    plain |= {key: settings.pop(key) for key in [f.name for f in fields(TrainerConfig)] if key in settings}
    return Trainer(
        TrainerConfig(**plain),
        objective=objective,
        engine=engine,
        loader=ToyLoader(seed, state.position, rank=rank(), world_size=world_size()),
        groups=groups,
        schedule=partial(warmup_cosine, num_steps=NUM_STEPS, warmup_steps=3),
        hooks=[MetricsFile(run_dir / "metrics.jsonl"), *hooks, Checkpoints(save, every_steps)],
        state=state,
        **{"restore": restore, **settings},
    )
