"""What a sample of a run costs, and so how many samples a share of the budget pays for."""

from __future__ import annotations

from itertools import pairwise

from design import BUDGET_SAMPLES, BY_NAME, WARMUP_SHARE, Run

from evatool.model.config import ModelConfig, mim_config
from evatool.model.presets import resolve_preset
from evatool.plan.towers import image_flops, mim_flops, num_patches, text_flops
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import ClipModelSection, PretrainMimRecipe, Recipe, TrainClipRecipe

BASELINE = "evidence/clip"


def flops_per_sample(recipe: Recipe, teacher: ModelConfig | None) -> float:
    """Floating-point operations of a training sample: three forward passes of what learns, one of the teacher."""
    if isinstance(recipe, PretrainMimRecipe):
        assert teacher is not None, "a MIM stage has a teacher"
        config = mim_config(_shape(recipe.model.preset, recipe.model.image_size), teacher.embed_dim or 0)
        masked = round(recipe.objective.mask_ratio * num_patches(config))
        return 3 * mim_flops(config, masked) + image_flops(teacher, all_tokens=True)
    assert isinstance(recipe, TrainClipRecipe), f"no cost is known of a {recipe.stage} run"
    config = _shape(recipe.model.preset, recipe.model.image_size)
    return 3 * (_image_flops(config, recipe.model, recipe.train.samples_seen) + text_flops(config))


def budget() -> float:
    """What every arm may cost: `BUDGET_SAMPLES` of the baseline."""
    return BUDGET_SAMPLES * flops_per_sample(load_recipe(BASELINE).recipe, None)


def teacher_of(run: Run) -> ModelConfig | None:
    """The shape of the model that teaches the run."""
    if run.teacher is None:
        return None
    source = BY_NAME[run.teacher]
    recipe = load_recipe(source.recipe, overrides=source.sets).recipe
    assert isinstance(recipe, TrainClipRecipe), f"{source.name} is no CLIP model"
    return _shape(recipe.model.preset, recipe.model.image_size)


def paid_before(run: Run) -> float:
    """Operations of the MIM run that the run starts from; 0 where there is none."""
    if run.after is None:
        return 0.0
    before = BY_NAME[run.after]
    teacher = teacher_of(before)
    samples = samples_of(before, paid_before(before), teacher)
    recipe = load_recipe(before.recipe, overrides=settings_of(before, samples, seed=0)).recipe
    return samples * flops_per_sample(recipe, teacher)


def settings_of(run: Run, samples: int, seed: int) -> list[str]:
    """The settings over the run's recipe that give it this length and seed."""
    own = [setting.format(samples=_Length(samples)) for setting in run.sets]
    warmup = round(WARMUP_SHARE * samples)
    return [f"train.samples_seen={samples}", f"schedule.warmup_samples={warmup}", f"train.seed={seed}", *own]


def samples_of(run: Run, paid_before: float, teacher: ModelConfig | None) -> int:
    """Samples, in whole batches, that the run's share of the budget pays for.

    Args:
        paid_before: operations of the MIM run it starts from.
    """
    left = run.share * budget() - paid_before
    samples = BUDGET_SAMPLES
    # Where patch dropout ends at a share of the run, a sample's cost hardly depends on its length: twice is enough.
    for _ in range(2):
        recipe = load_recipe(run.recipe, overrides=settings_of(run, samples, seed=0)).recipe
        assert not hasattr(recipe, "eval"), f"{run.recipe} trains nothing"
        batch = recipe.train.global_batch_size  # type: ignore[union-attr]
        samples = int(left / flops_per_sample(recipe, teacher)) // batch * batch
    return samples


class _Length(int):
    """A number of samples that `{samples:0.8}` in a setting takes a share of."""

    def __format__(self, share: str) -> str:
        return str(round(int(self) * float(share))) if share else str(int(self))


def _shape(preset: str, image_size: int | None) -> ModelConfig:
    return resolve_preset(preset).with_image_size(image_size)


def _image_flops(config: ModelConfig, model: ClipModelSection, samples: int) -> float:
    """Forward pass for one picture, averaged over the phases of patch dropout."""
    starts = [0, *(min(start, samples) for start, _ in model.patch_dropout_schedule), samples]
    rates = [model.patch_dropout, *(rate for _, rate in model.patch_dropout_schedule)]
    phases = zip(pairwise(starts), rates, strict=True)
    return sum((end - start) * image_flops(config, rate) for (start, end), rate in phases) / samples
