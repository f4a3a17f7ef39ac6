"""Which training run a model came from: models of one recipe and other seeds are repetitions of one another."""

from __future__ import annotations

import hashlib
import json
import re
from pathlib import Path
from typing import Any

from evatool.core.errors import EvatoolError
from evatool.core.renamed_keys import first_recipe_key, without_added_keys
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import TrainingRecipe
from evatool.recipe.write import flatten, to_table

_NOT_COMPARED = ("run_dir", "source", "train.seed", "train.log_every", "data.num_workers")
# A repetition may read its own copy of these.
_PLACES = re.compile(r"data\.train|model\.init\.path|(teacher|teachers\.\w+)\.(model|store\.path)")


def recipe_of(weights: str) -> dict[str, Any]:
    """`recipe` (a digest without seed and places) and `train_seed` of the run that made these weights, if it is known.

    Args:
        weights: file or folder; its run's `resolved.toml` lies there or up to two folders above.
    """
    path = Path(weights)
    for folder in (path, *list(path.parents)[:3]):
        file = folder / "resolved.toml"
        if not file.is_file():
            continue
        try:
            recipe = load_recipe(file).recipe
        except EvatoolError:  # of another version: a model is evaluated all the same
            return {}
        if not isinstance(recipe, TrainingRecipe):
            return {}
        flat = {k: v for k, v in flatten(to_table(recipe)).items() if k not in _NOT_COMPARED}
        flat = {first_recipe_key(k): v for k, v in without_added_keys(flat).items() if not _PLACES.fullmatch(k)}
        digest = hashlib.sha256(json.dumps(flat, sort_keys=True, default=str).encode()).hexdigest()
        return {"recipe": digest, "train_seed": recipe.train.seed}
    return {}
