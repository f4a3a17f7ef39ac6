"""Train with a loss of your own beside CLIP's: `python docs/examples/custom_loss.py SHARDS [STEPS]`.

    evatool data-prepare debug/data-prepare
    python docs/examples/custom_loss.py runs/debug/data-prepare/train 20

The loss asks image features of equal captions to lie close together. It has a parameter of its own, the margin below
which it is content, which learns with the rest. docs/extending.md explains each step.
"""

from __future__ import annotations

import sys
from pathlib import Path

import torch
from torch import Tensor, nn

import evatool
from evatool.core.batch import Batch
from evatool.data.train.loader import build_train_loader
from evatool.distributed.world import init_world
from evatool.objective.base import Features
from evatool.objective.terms.base import LossTerm, TermLoss
from evatool.objective.terms.contrastive import InfoNceTerm
from evatool.recipe.schema import AdamWSection, EngineSection, GroupSection, TrainDataSection
from evatool.train.control import TrainerConfig
from evatool.train.hooks.log import ConsoleLog


class EqualCaptions(LossTerm):
    """Distance of image features whose captions are equal, beyond a learned margin."""

    batch_fields = ("caption_id",)

    def __init__(self, weight: float = 0.1) -> None:
        super().__init__("equal_captions_loss", weight)
        self.add_part("margin", nn.Parameter(torch.tensor([0.2])))

    def encode(self, model: nn.Module, batch: Batch, features: Features) -> Features:
        return {"margin": self.part("margin").squeeze()}

    def loss(self, features: Features, batch: Batch) -> TermLoss:
        assert batch.caption_id is not None
        image: Tensor = features["image"]
        equal = batch.caption_id[:, None] == batch.caption_id[None, :]
        distance = 1 - image @ image.T
        beyond = (distance - features["margin"]).relu()[equal].mean()
        # A margin that costs nothing would grow until the loss is gone.
        return beyond + 0.5 * features["margin"].square(), {"margin": features["margin"].detach().clone()}


def main(shards: str, num_steps: str = "20") -> None:
    torch.manual_seed(0)
    config = evatool.resolve_preset("EVA02-CLIP-debug")
    objective = evatool.ClipObjective(evatool.build_clip(config), [InfoNceTerm("equal-captions"), EqualCaptions()])
    group = GroupSection(lr=1e-3)
    optim = AdamWSection(visual=group, text=group, other=group)
    groups = evatool.build_param_groups(
        objective.named_parameters(),
        optim,
        depth_visual=config.depth,
        depth_text=config.text_depth,
        owners=objective.parameter_owners(),
    )
    world = init_world()
    batch_size = 32
    engine = evatool.build_engine(
        EngineSection(),
        world,
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=evatool.build_optimizer(optim, groups),
        bounds=objective.parameter_bounds,
    )
    loader = build_train_loader(
        TrainDataSection(train=Path(shards), num_workers=0),
        image_size=config.image_size,
        context_length=config.context_length,
        global_batch_size=batch_size,
        rank=world.rank,
        world_size=world.world_size,
        seed=0,
    )
    trainer = evatool.Trainer(
        TrainerConfig(num_steps=int(num_steps), global_batch_size=batch_size, log_every=5),
        objective=objective,
        engine=engine,
        loader=loader,
        groups=groups,
        hooks=[ConsoleLog("custom loss")],
    )
    trainer.fit()
    for name in ("train/contrastive_loss", "train/equal_captions_loss", "train/margin"):
        print(f"{name}: {trainer.metrics[name]:.4f}")


if __name__ == "__main__":
    if len(sys.argv) < 2:
        sys.exit(__doc__)
    main(*sys.argv[1:])
