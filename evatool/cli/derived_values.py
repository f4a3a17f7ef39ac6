"""Values that follow from a recipe without building anything: steps, warm-up, samples a rank, token grid. No torch."""

from __future__ import annotations

import os
from typing import Any

from evatool.core.batch_shares import samples_per_rank
from evatool.recipe.schema import PretrainMimRecipe, Recipe, TrainingRecipe


def derived_values(recipe: Recipe) -> dict[str, Any]:
    """Values by name, as `--dry-run` prints them; empty for stages that do not train.

    Raises: RecipeError for an unknown preset, or a batch that does not divide over the ranks.
    """
    return _training_values(recipe) if isinstance(recipe, TrainingRecipe) else {}


def _training_values(recipe: Any) -> dict[str, Any]:
    # What these import is torch-free; where it lives says how the stage itself computes the same figure.
    from evatool.model.presets import resolve_preset
    from evatool.optim.schedules import warmup_steps_of
    from evatool.plan.store import store_sizes

    train = recipe.train
    world_size = _world_size(recipe)
    warmup = warmup_steps_of(recipe.schedule, num_steps=train.num_steps, global_batch_size=train.global_batch_size)
    config = resolve_preset(recipe.model.preset).with_image_size(recipe.model.image_size)
    rows, columns = config.grid
    values = {
        "steps": train.num_steps,
        "warmup_steps": warmup,
        "samples_not_used": train.samples_seen - train.num_steps * train.global_batch_size,
        "world_size": world_size,
        "samples_per_rank_and_step": samples_per_rank(train.global_batch_size, world_size),
        "image_size": config.image_size,
        "token_grid": [rows, columns],
    }
    if isinstance(recipe, PretrainMimRecipe):
        values["masked_patches_at_most"] = round(recipe.objective.mask_ratio * rows * columns)
    return values | store_sizes(recipe)


def _world_size(recipe: TrainingRecipe) -> int:
    """Ranks of torchrun, else of the recipe, else 1: counting GPUs would need torch."""
    if "RANK" in os.environ:
        return int(os.environ.get("WORLD_SIZE", "1"))
    return recipe.engine.processes or 1
