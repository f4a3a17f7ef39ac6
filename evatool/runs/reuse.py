"""Whether a run folder may be used: by a new run, or by the run in it that goes on. No torch."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import RecipeError, UsageError
from evatool.core.secrets import mask_values
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import Recipe
from evatool.recipe.write import flatten, format_value, to_table
from evatool.runs.status import read_status

log = logging.getLogger(__name__)

# Keys that do not change what is computed: a resumed run may differ in them.
RESUMABLE_KEYS = (
    *("run_dir", "source", "train.log_every", "train.micro_batch_size", "data.num_workers"),
    "teacher.store.path",
    *(f"eval.{key}" for key in ("num_threads", "processes", "shard_model", "use_cache", "cache_dir", "fetch")),
)
RESUMABLE_TABLES = ("engine.", "checkpoint.", "evaluate.", "images.", "validation.", "train.guard.", "train.trackers")
# What a run leaves behind before it has made anything.
_BOOKKEEPING = {"resolved.toml", "environment.json", "status.json", "logs", "parameter_groups.tsv"}


def is_used(path: Path) -> bool:
    """True if the folder holds anything that a new run must not mix with."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise UsageError("the run folder is a file", where=str(path), fix="choose another with --run-dir")
    names = {entry.name for entry in path.iterdir()}
    made_nothing = names <= _BOOKKEEPING and read_status(path).get("state") in ("failed", "interrupted", "preempted")
    return bool(names) and not made_nothing


def check_reuse(recipe: Recipe, path: Path, *, resume: bool, accept_drift: Sequence[str] = ()) -> None:
    """Refuse a used folder.

    Args:
        resume: the run in it is to go on.
        accept_drift: keys, or tables of keys, in which `recipe` may differ from the run's.
    Raises: UsageError without `resume` or where there is no run; RecipeError where the recipe differs from the run's.
    """
    if not resume:
        state = read_status(path).get("state")
        raise UsageError(
            "the run folder is already used" + (f" (its run is {state})" if state else ""),
            where=str(path),
            fix="go on with --resume, or choose another folder with --run-dir",
        )
    if not (path / "resolved.toml").is_file():
        raise UsageError(
            "there is no run to resume: the folder holds other things and no resolved.toml",
            where=str(path),
            fix="choose another folder with --run-dir",
        )
    differences = _differences(load_recipe(path / "resolved.toml").recipe, recipe)
    problems = []
    for key, line in differences.items():
        if any(key == accepted or key.startswith(f"{accepted}.") for accepted in accept_drift):
            log.warning("the recipe differs from the run's, as accepted: %s", line)
        else:
            problems.append(line)
    if problems:
        raise RecipeError(
            "the recipe differs from the run's that is to be resumed",
            problems=problems,
            where=str(path / "resolved.toml"),
            fix="resume with the recipe as it was, start a new run with --run-dir, or accept a key's new value with "
            "--accept-drift KEY",
        )


def _differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """One line per differing key that a resume may not change unasked."""
    old, new = flatten(to_table(before)), flatten(to_table(now))
    keys = [k for k in dict.fromkeys((*old, *new)) if k not in RESUMABLE_KEYS and not k.startswith(RESUMABLE_TABLES)]

    def show(table: dict[str, Any], key: str) -> str:
        return format_value(mask_values(table[key], key)) if key in table else "absent"

    return {key: f"{key}: was {show(old, key)}, now {show(new, key)}" for key in keys if old.get(key) != new.get(key)}
