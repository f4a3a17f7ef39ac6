"""What a run costs, and so how many samples its share of the budget pays for."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

from design import BUDGET_SAMPLES, BY_NAME, EFFICIENTNET, WARMUP_SHARE, Run

from evatool.model.config import ModelConfig, mim_config
from evatool.model.presets import resolve_preset
from evatool.plan.towers import image_flops, mim_flops, num_patches, text_flops
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import (
    ClipModelSection,
    ClipTrainingRecipe,
    DistillRecipe,
    JointMim,
    MimObjective,
    PretrainMimRecipe,
    TrainClipRecipe,
    TrainingRecipe,
)

BASELINE = "evidence/clip"
TRAIN_PICTURES = 3_137  # docs/data.md
EFFICIENTNET_FLOPS = 39_717_376
"""Of a picture of 64 pixels, up to the layer that is learned: `torch.utils.flop_counter` on timm's model."""
EFFICIENTNET_WIDTH = 112


@dataclass(frozen=True)
class Cost:
    """Floating-point operations: of each sample, and once for all of them (features that are stored)."""

    a_sample: float
    once: float = 0.0


def budget() -> float:
    """What every arm may cost: `BUDGET_SAMPLES` of the baseline."""
    return BUDGET_SAMPLES * _learned(_training_recipe(BASELINE, []), 0)


def cost(run: Run, samples: int) -> Cost:
    """Three forward passes of what learns, and one of the teacher: for each sample, or for each stored view."""
    recipe = _training_recipe(run.recipe, settings_of(run, samples, seed=0))
    width, taught = _taught(run, recipe)
    learned = _learned(recipe, width)
    return Cost(learned, run.views * TRAIN_PICTURES * taught) if run.views else Cost(learned + taught)


def samples_of(run: Run) -> int:
    """Samples, in whole batches, that the run's share of the budget pays for."""
    left = run.share * budget() - paid_before(run)
    samples = BUDGET_SAMPLES
    # Where patch dropout ends at a share of the run, a sample's cost hardly depends on its length: twice is enough.
    for _ in range(2):
        found = cost(run, samples)
        batch = _training_recipe(run.recipe, run.sets).train.global_batch_size
        samples = int((left - found.once) / found.a_sample) // batch * batch
    return samples


def flops(run: Run) -> float:
    """Of the whole run, without the MIM stage before it."""
    samples = samples_of(run)
    found = cost(run, samples)
    return found.once + samples * found.a_sample


def paid_before(run: Run) -> float:
    """Operations of the MIM run that the run starts from; 0 where there is none."""
    return flops(BY_NAME[run.after]) if run.after is not None else 0.0


def settings_of(run: Run, samples: int, seed: int) -> list[str]:
    """The settings over the run's recipe that give it this length and seed."""
    own = [setting.format(samples=_Length(samples)) for setting in run.sets]
    warmup = round(WARMUP_SHARE * samples)
    views = [f"teacher.store.views={run.views}", f"teacher.store.seed={seed}"] if run.views else []
    return [
        f"train.samples_seen={samples}",
        f"schedule.warmup_samples={warmup}",
        f"train.seed={seed}",
        *views,
        *own,
    ]


class _Length(int):
    """A number of samples that `{samples:0.8}` in a setting takes a share of."""

    def __format__(self, share: str) -> str:
        return str(round(int(self) * float(share))) if share else str(int(self))


# -------------------------------------------------------------------------------------------------- of one sample


def _taught(run: Run, recipe: TrainingRecipe) -> tuple[int, float]:
    """Width of the teacher's features, and operations of its forward pass over a sample."""
    if run.teacher is None:
        return 0, 0.0
    if run.teacher == EFFICIENTNET:
        return EFFICIENTNET_WIDTH, EFFICIENTNET_FLOPS
    source = BY_NAME[run.teacher]
    config = _clip_shape(_training_recipe(source.recipe, source.sets))
    if isinstance(recipe, DistillRecipe):
        return config.embed_dim or 0, image_flops(config) + text_flops(config)
    return config.embed_dim or 0, image_flops(config, all_tokens=True)


def _learned(recipe: TrainingRecipe, width: int) -> float:
    """Three forward passes of what learns; `width` is of the teacher's features."""
    if isinstance(recipe, PretrainMimRecipe):
        return 3 * _mim(resolve_preset(recipe.model.preset), recipe.objective, width)
    config = _clip_shape(recipe)
    assert isinstance(recipe, ClipTrainingRecipe)
    forward = _image(config, recipe.model, recipe.train.samples_seen) + text_flops(config)
    if isinstance(recipe, TrainClipRecipe) and recipe.objective.mim is not None:
        forward += _mim(config, recipe.objective.mim, width)
    return 3 * forward


def _mim(config: ModelConfig, section: MimObjective | JointMim, width: int) -> float:
    """Forward pass over a masked picture."""
    return mim_flops(mim_config(config, width), round(section.mask_ratio * num_patches(config)))


def _image(config: ModelConfig, model: ClipModelSection, samples: int) -> float:
    """Forward pass over a picture, averaged over the phases of patch dropout."""
    starts = [0, *(min(start, samples) for start, _ in model.patch_dropout_schedule), samples]
    rates = [model.patch_dropout, *(rate for _, rate in model.patch_dropout_schedule)]
    phases = zip(pairwise(starts), rates, strict=True)
    return sum((end - start) * image_flops(config, rate) for (start, end), rate in phases) / samples


def _clip_shape(recipe: TrainingRecipe) -> ModelConfig:
    assert isinstance(recipe, ClipTrainingRecipe), "a CLIP is trained by train-clip or distill"
    return resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)


def _training_recipe(name: str, sets: list[str] | tuple[str, ...]) -> TrainingRecipe:
    sets = [setting.format(samples=_Length(BUDGET_SAMPLES)) for setting in sets]
    recipe = load_recipe(name, overrides=sets).recipe
    assert isinstance(recipe, TrainingRecipe), f"{name} trains nothing"
    return recipe
