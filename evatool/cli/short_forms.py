"""Commands without a recipe file: the same recipe, built from an argument and a few options.

An argument is a recipe if it is a `.toml` file or a shipped recipe's name, else what the stage works on.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

from evatool.core.errors import UsageError
from evatool.recipe.load import (
    Resolved,
    is_recipe,
    load_recipe,
    resolve_table,
    shipped_path,
    suggest_recipe,
)

# our choice: values for a first run of a small model; docs and help state them, `--set` changes them
DEFAULT_SAMPLES_SEEN = 1_000_000
DEFAULT_GLOBAL_BATCH_SIZE = 256
WARMUP_FRACTION = 0.1
CLIP_LR = 5e-4  # open_clip's default
CLIP_GRAD_CLIP_NORM = 1.0
MIM_LR = 1.5e-3  # EVA-02-B (docs/reference/eva.md#mim-recipes)
MIM_GRAD_CLIP_NORM = 3.0  # EVA-02 (docs/reference/eva.md#mim-optimisation)

Given = Mapping[str, Any]
"""Short-form options by name as typed (`--data`); None where absent."""


def resolve_argument(stage: str, argument: str, given: Given, overrides: Sequence[str]) -> Resolved:
    """The recipe that an argument and its options stand for.

    Raises: UsageError for an argument that is both a recipe's name and a path, for short-form options beside a
    recipe, and for missing ones without; RecipeError for what is wrong with the recipe.
    """
    if is_recipe(argument):
        _refuse_ambiguity(stage, argument)
        _refuse_options(stage, argument, given)
        return load_recipe(argument, overrides, stage)
    table = _BUILDERS[stage](argument, _Options(stage, argument, given))
    return resolve_table(table, stage, overrides=overrides, name=f"{stage}-{_base_name(argument)}")


class _Options:
    """The short-form options, each with its own complaint when it is missing."""

    def __init__(self, stage: str, argument: str, given: Given) -> None:
        self._stage, self._argument, self._given = stage, argument, given

    def get(self, name: str) -> Any:
        return self._given[name]

    def require(self, *names: str) -> None:
        """Refuse the command unless all of `names` are given; says so once for all."""
        missing = [name for name in names if self._given[name] is None]
        if missing:
            needed = " and ".join(missing)
            raise UsageError(
                f"{self._argument!r} is not a recipe, and without one `evatool {self._stage}` needs {needed}",
                expected="a .toml file, the name of a shipped recipe"
                + suggest_recipe(self._argument)
                + ", or the options",
                fix=f"see `evatool {self._stage} --help`, or `evatool recipe list`",
            )


def _refuse_ambiguity(stage: str, argument: str) -> None:
    shipped = shipped_path(argument)
    if shipped is not None and Path(argument).exists():
        here = Path(argument).resolve()
        raise UsageError(
            f"{argument!r} is both a shipped recipe ({shipped}) and a path here ({here})",
            fix=f"write `evatool {stage} ./{argument}` for the path, or the recipe's own path for the recipe",
        )


def _refuse_options(stage: str, argument: str, given: Given) -> None:
    """Options of the short form would be silently lost beside a recipe."""
    names = [name for name, value in given.items() if value is not None]
    if names:
        raise UsageError(
            f"{' and '.join(names)} cannot stand beside a recipe ({argument})",
            expected="a recipe's values are changed with --set KEY=VALUE",
            fix=f"`evatool recipe show {argument}` shows its keys",
        )


# ---------------------------------------------------------------------------------------------------- one a stage


def _data_prepare(images: str, options: _Options) -> dict[str, Any]:
    options.require("--captions")
    return {"data": {"kind": "folder", "images": images, "captions": str(options.get("--captions"))}}


def _train_clip(preset: str, options: _Options) -> dict[str, Any]:
    options.require("--data")
    return _clip_training(preset, options)


def _distill(preset: str, options: _Options) -> dict[str, Any]:
    options.require("--teacher", "--data")
    return _clip_training(preset, options) | {"teacher": {"model": options.get("--teacher")}}


def _pretrain_mim(preset: str, options: _Options) -> dict[str, Any]:
    options.require("--teacher", "--data")
    return _training(preset, options) | {
        "teacher": {"model": options.get("--teacher")},
        "optim": {"grad_clip_norm": MIM_GRAD_CLIP_NORM, "visual": {"lr": MIM_LR}},
    }


def _export(checkpoint: str, options: _Options) -> dict[str, Any]:
    chosen = {"format": options.get("--to"), "model": options.get("--model-config")}
    chosen["push_to_hub"] = options.get("--push-to-hub")
    chosen["quantize"] = options.get("--quantize")
    return {"export": {"checkpoint": checkpoint} | {key: value for key, value in chosen.items() if value}}


def _eval(model: str, options: _Options) -> dict[str, Any]:
    options.require("--data")
    suite = options.get("--suite")
    section = {"models": {_base_name(model): model}, "data": _inside(options.get("--data"), "eval")}
    return {"eval": section | ({"suite": suite} if suite else {})}


def _clip_training(preset: str, options: _Options) -> dict[str, Any]:
    optim = {"grad_clip_norm": CLIP_GRAD_CLIP_NORM, "visual": {"lr": CLIP_LR}, "text": {"lr": CLIP_LR}}
    return _training(preset, options) | {"optim": optim}


def _training(preset: str, options: _Options) -> dict[str, Any]:
    samples_seen = options.get("--samples-seen") or DEFAULT_SAMPLES_SEEN
    return {
        "data": {"train": _inside(options.get("--data"), "train")},
        "model": {"preset": preset},
        "schedule": {"warmup_samples": round(WARMUP_FRACTION * samples_seen)},
        "train": {
            "samples_seen": samples_seen,
            "global_batch_size": min(DEFAULT_GLOBAL_BATCH_SIZE, samples_seen),
        },
    }


_BUILDERS: dict[str, Callable[[str, _Options], dict[str, Any]]] = {
    "data-prepare": _data_prepare,
    "pretrain-mim": _pretrain_mim,
    "train-clip": _train_clip,
    "distill": _distill,
    "export": _export,
    "eval": _eval,
}


def _inside(folder: Path, part: str) -> str:
    """A data-prepare run folder stands for the part of it that the stage reads."""
    return str(folder / part if (folder / part).is_dir() else folder)


def _base_name(argument: str) -> str:
    """The last part of a path or name, safe as the name of a folder."""
    name = Path(argument).name or Path(argument).resolve().name
    return re.sub(r"[^A-Za-z0-9._-]+", "-", name).strip("-.") or "model"
