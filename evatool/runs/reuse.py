"""Whether a run folder may be used: by a new run, or by the run in it that goes on. No torch."""

from __future__ import annotations

import os
import re
import shlex
from collections.abc import Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import EvatoolError, RecipeError, UsageError
from evatool.core.renamed_keys import FREED_RECIPE_KEYS
from evatool.core.secrets import mask_values
from evatool.recipe.load import load_recipe
from evatool.recipe.schema import DistillRecipe, Recipe, TrainClipRecipe
from evatool.recipe.write import flatten, format_value, to_table, to_toml
from evatool.runs.lease import is_lease
from evatool.runs.status import read_status

# Keys that do not change what is computed: a resumed run may differ in them.
RESUMABLE_KEYS = (
    *("run_dir", "source", "train.log_every", "train.micro_batch_size", "data.num_workers"),
    "teacher.store.path",
    *(f"eval.{key}" for key in ("num_threads", "processes", "shard_model", "use_cache", "cache_dir", "fetch")),
)
RESUMABLE_TABLES = ("engine.", "checkpoint.", "evaluate.", "images.", "validation.", "train.guard.", "train.track")
# What a run leaves behind before it has made anything, besides leases and files that were being written.
_BOOKKEEPING = {"resolved.toml", "environment.json", "status.json", "logs", "parameter_groups.tsv", "data_samples.json"}
# `core.atomic_io` and the lease write under the first kind of name, the hooks of metrics and loss curve the others.
_UNWRITTEN = re.compile(r"\..+\.[0-9a-f]{8}\.partial|\.metrics\.jsonl\.tmp|\.loss_curve\.png\.tmp")
# Folders that are not searched for such files: large, and cleared by whoever writes them.
_CLEARED_BY_OTHERS = {"train", "eval", "checkpoints"}


def is_folder_used(path: Path) -> bool:
    """True if the folder holds anything that a new run must not mix with."""
    if not path.exists():
        return False
    if not path.is_dir():
        raise UsageError("the run folder is a file", where=str(path), fix="choose another with --run-dir")
    names = {entry.name for entry in path.iterdir()}
    kept = {name for name in names if not is_lease(name) and not is_unwritten(name)}
    return not (kept <= _BOOKKEEPING and names != {"logs"} and _has_ended(path, names))


def _has_ended(path: Path, names: set[str]) -> bool:
    """True where no start is under way that has only written what describes it, and none was done."""
    state = read_status(path).get("state")
    if state == "running":  # a start that was killed leaves its lease; runs of older versions had none
        return any(is_lease(name) for name in names)
    return state != "done"


def is_unwritten(name: str) -> bool:
    """True for the names that files of a run have while they are written; a kill leaves them behind."""
    return _UNWRITTEN.fullmatch(name) is not None


def remove_unwritten(path: Path) -> None:
    """Remove the files that earlier starts were writing when they were killed. Only the folder's owner may call it."""
    for folder, inner, names in os.walk(path):
        inner[:] = [name for name in inner if name not in _CLEARED_BY_OTHERS and not name.startswith(".")]
        for name in names:
            if is_unwritten(name):
                Path(folder, name).unlink(missing_ok=True)


def check_reuse(recipe: Recipe, path: Path, *, resume: bool, accept_drift: Sequence[str] = ()) -> list[str]:
    """Refuse a used folder.

    Args:
        resume: the run in it is to go on.
        accept_drift: keys, or tables of keys, in which `recipe` may differ from the run's.
    Returns: what whoever goes on is to be told.
    Raises: UsageError without `resume` or where there is no run; RecipeError where the recipe differs from the run's.
    """
    state = read_status(path).get("state")
    if not resume:
        raise UsageError(
            "the run folder is already used" + (f" (its run is {state})" if state else ""),
            where=str(path),
            fix="go on with --resume, or choose another folder with --run-dir",
        )
    if not any((path / name).exists() for name in _BOOKKEEPING if name.endswith((".toml", ".json"))):
        raise UsageError(
            "there is no run to resume: the folder holds other things and no resolved.toml",
            where=str(path),
            fix="choose another folder with --run-dir",
        )
    begun, notes = _recipe_of_run(path, recipe)
    differences = _differences(begun, recipe)
    if differences and state == "done":
        raise _ended(recipe, path, differences)
    problems = []
    for key, line in differences.items():
        if any(key == accepted or key.startswith(f"{accepted}.") for accepted in accept_drift):
            notes.append(f"the recipe differs from the run's, as accepted: {line}")
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
    return notes


def _recipe_of_run(path: Path, given: Recipe) -> tuple[Recipe, list[str]]:
    """The recipe that the run in a folder was started with, and what is to be said of it.

    Where resolved.toml is damaged it is that of the newest checkpoint; where there is none either, the given one.
    """
    saved = sorted(path.glob("checkpoints/step_*/resolved.toml"), key=lambda file: file.parent.name, reverse=True)
    files = [path / "resolved.toml", *saved]
    texts = [_text(file) for file in files]
    whole = [text for text in texts if text is not None] + [to_toml(given).encode()]
    notes: list[str] = []
    for file, text in zip(files, texts, strict=True):
        try:
            if text is None or any(len(text) < len(other) and other.startswith(text) for other in whole):
                raise RecipeError("it is missing or cut short")
            return load_recipe(file).recipe, notes
        except (EvatoolError, ValueError, TypeError, RecursionError) as error:
            reason = str(error).partition("\n")[0]
            notes.append(f"{file} is damaged and not compared with the recipe ({reason})")
    return given, [*notes, "no recipe of this run can be read: it goes on with the one that was given"]


def _text(file: Path) -> bytes | None:
    try:
        return file.read_bytes()
    except OSError:
        return None


def _ended(recipe: Recipe, path: Path, differences: dict[str, str]) -> RecipeError:
    """A run that is done does not go on with another recipe, nor is its result that of another."""
    weights = ""
    if isinstance(recipe, TrainClipRecipe | DistillRecipe):
        init = shlex.quote(f"model.init.path={path}")
        weights = f", and to go on from its weights --set model.init.kind=clip --set {init}"
    is_longer = "train.samples_seen" in differences
    return RecipeError(
        "the run has ended and is not extended" if is_longer else "the recipe differs from that of the finished run",
        problems=list(differences.values()),
        where=str(path),
        expected="the recipe as it was: then its result is shown again",
        fix=f"start a new run with --run-dir NEW-FOLDER{weights}",
    )


def _differences(before: Recipe, now: Recipe) -> dict[str, str]:
    """One line per differing key that a resume may not change unasked."""
    old, new = flatten(to_table(before)), flatten(to_table(now))
    for key, default in FREED_RECIPE_KEYS.items():
        if key not in new and old.get(key) == default:
            del old[key]
    keys = [k for k in dict.fromkeys((*old, *new)) if k not in RESUMABLE_KEYS and not k.startswith(RESUMABLE_TABLES)]

    def show(table: dict[str, Any], key: str) -> str:
        return format_value(mask_values(table[key], key)) if key in table else "absent"

    return {key: f"{key}: was {show(old, key)}, now {show(new, key)}" for key in keys if old.get(key) != new.get(key)}
