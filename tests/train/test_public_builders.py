"""The smallest training from Python: public builders, a list of batches as loader, and a hook of one's own."""

from __future__ import annotations

import torch

import evatool
from evatool.core.batch import Batch
from evatool.distributed.world import init_world
from evatool.objective.terms.contrastive import InfoNceTerm
from evatool.recipe.schema import AdamWSection, EngineSection, GroupSection
from evatool.train.control import StepResult, TrainerConfig, TrainerControl
from evatool.train.hooks.base import Hook

B, NUM_STEPS = 4, 12


class Losses(Hook):
    """Keeps the loss of every step."""

    def __init__(self) -> None:
        self.found: list[float] = []

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self.found.append(result.metrics["train/loss"])


def two_batches(config: evatool.ModelConfig) -> list[Batch]:
    """Two batches of images of one colour each, with captions that tell them apart."""
    tokenizer = evatool.build_tokenizer(config.context_length)
    batches = []
    for first in (0, B):
        shades = torch.arange(first, first + B, dtype=torch.uint8) * 30
        image = shades.view(B, 1, 1, 1).expand(B, 3, config.image_size, config.image_size).clone()
        tokens = tokenizer([f"a square in shade {number}" for number in range(first, first + B)])
        batches.append(Batch(image, [f"shade{number}" for number in range(first, first + B)], tokens))
    return batches


def test_a_clip_is_trained_by_public_builders_from_a_list_of_batches() -> None:
    torch.manual_seed(0)
    config = evatool.resolve_preset("EVA02-CLIP-debug")
    objective = evatool.ClipObjective(evatool.build_clip(config), [InfoNceTerm()])
    group = GroupSection(lr=1e-3)
    optim = AdamWSection(visual=group, text=group, other=group)
    groups = evatool.build_param_groups(
        objective.named_parameters(), optim, depth_visual=config.depth, depth_text=config.text_depth
    )
    engine = evatool.build_engine(
        EngineSection(),
        init_world(),
        objective,
        groups,
        precision="fp32",
        grad_clip_norm=1.0,
        optimizer=evatool.build_optimizer(optim, groups),
        bounds=objective.parameter_bounds,
    )
    losses = Losses()
    trainer = evatool.Trainer(
        TrainerConfig(NUM_STEPS, global_batch_size=B, log_every=1),
        objective=objective,
        engine=engine,
        loader=two_batches(config),
        groups=groups,
        hooks=[losses],
    )
    state = trainer.fit()
    assert (state.step, state.samples_seen, state.position) == (NUM_STEPS, NUM_STEPS * B, NUM_STEPS * B)
    assert len(losses.found) == NUM_STEPS
    assert sum(losses.found[-2:]) < sum(losses.found[:2]), "both batches were met again, and learnt from"
    assert trainer.metrics["train/loss"] == losses.found[-1]
