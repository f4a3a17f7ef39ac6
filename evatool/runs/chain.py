"""The command that comes after a finished stage. No torch."""

from __future__ import annotations

import shlex
from pathlib import Path

from evatool.recipe.load import load_recipe, shipped_path
from evatool.recipe.schema import (
    DataPrepareRecipe,
    DistillRecipe,
    PretrainMimRecipe,
    Recipe,
    TrainClipRecipe,
    TrainingRecipe,
)

# The shipped chains (recipes/demo, recipes/debug): last part of a recipe's name -> stage and name of the next.
_NEXT = {
    "train-clip": ("pretrain-mim", "pretrain-mim"),
    "pretrain-mim": ("train-clip", "train-clip-mim"),
    "train-clip-mim": ("distill", "distill"),
    "distill": ("export", "export"),
}
_START = "demo/train-clip"


def next_command(recipe: Recipe, name: str, run_dir: Path) -> str | None:
    """What comes after the finished run of a recipe in `run_dir`; None where that does not follow from these."""
    match recipe:
        case DataPrepareRecipe():
            return use_data(name, run_dir)
        case PretrainMimRecipe():
            return next_in_chain(recipe, name, run_dir) or use_image_tower(recipe, recipe.model.preset, run_dir)
        case TrainClipRecipe() | DistillRecipe():
            return next_in_chain(recipe, name, run_dir) or use_clip(recipe, run_dir)
        case _:
            return None


def next_in_chain(recipe: TrainingRecipe, name: str, run_dir: Path) -> str | None:
    """The next command of the shipped chain that recipe `name` belongs to, if that command would find this run.

    It does where the run is in its default folder and on the chain's own data; else None.
    """
    folder, _, last = name.rpartition("/")
    stage, following = _NEXT.get(last, (None, ""))
    sibling = f"{folder}/{following}"
    if stage is None or shipped_path(sibling) is None or run_dir != Path("runs") / name:
        return None
    then = load_recipe(sibling).recipe
    if isinstance(then, TrainingRecipe) and then.data.train != recipe.data.train:
        return None
    return f"evatool {stage} {sibling}"


def use_data(name: str, run_dir: Path) -> str:
    """What to do with prepared data: the next stage of the chain that recipe `name` belongs to, else a first CLIP."""
    following = name.rpartition("/")[0] + "/train-clip"
    if run_dir == Path("runs") / name and shipped_path(following) is not None:
        return f"evatool train-clip {following}"
    return f"evatool train-clip {_START} --set {_quoted_setting('data.train', run_dir / 'train')}"


def use_clip(recipe: TrainingRecipe, run_dir: Path) -> str:
    """What to do with a trained CLIP: evaluate it where evaluation sets lie beside the data, else export it."""
    sets = None if recipe.data.train is None else recipe.data.train.parent / "eval"
    if sets is not None and sets.is_dir():
        return f"evatool eval {_quoted(run_dir)} --suite drawings --data {_quoted(sets)}"
    return f"evatool export {_quoted(run_dir)} --to open_clip --out {_quoted(run_dir / 'open_clip')}"


def use_image_tower(recipe: TrainingRecipe, preset: str, run_dir: Path) -> str:
    """What to do with a MIM encoder: start a CLIP from it."""
    settings = {
        "model.preset": preset,
        "model.init.kind": "image-tower",
        "model.init.path": str(run_dir),
        **({} if recipe.data.train is None else {"data.train": str(recipe.data.train)}),
    }
    sets = " ".join(f"--set {_quoted_setting(key, value)}" for key, value in settings.items())
    return f"evatool train-clip {_START} {sets} --run-dir {_quoted(run_dir.with_name(run_dir.name + '-clip'))}"


def _quoted(path: Path) -> str:
    return shlex.quote(str(path))


def _quoted_setting(key: str, value: object) -> str:
    return shlex.quote(f"{key}={value}")
