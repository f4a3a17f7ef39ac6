"""Every published training recipe at debug width, through the same stages and in the order of its chain."""

from __future__ import annotations

import math
from pathlib import Path

import pytest

from evatool.recipe.load import list_recipes, load_recipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

pytestmark = pytest.mark.e2e

NAMES = [name for name, *_ in list_recipes() if name.startswith("debug/") and name.count("/") == 2]
# One of each stage stands for the others in `make test`: all of them take minutes of a core.
ALWAYS = (
    "debug/eva-02-l/pretrain-mim",
    "debug/eva02-clip-l-14/train-clip",
    "debug/eva02-clip-l-14/distill",
)


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    return tmp_path_factory.mktemp("published")


@pytest.fixture(scope="module")
def done() -> dict[str, Result]:
    """Results so far, by recipe."""
    return {}


def _run(name: str, done: dict[str, Result]) -> None:
    """Run a recipe, after the one whose run it starts from."""
    if name in done:
        return
    resolved = load_recipe(name)
    init = getattr(getattr(resolved.recipe, "model", None), "init", None)
    start = getattr(init, "path", None) or getattr(getattr(init, "image", None), "path", None)
    if start is not None:
        _run(str(start).removeprefix("runs/"), done)
    done[name] = run_stage(resolved, RunOptions(name=resolved.name))


@pytest.mark.parametrize(
    "name", [name if name in ALWAYS else pytest.param(name, marks=pytest.mark.slow) for name in NAMES]
)
def test_it_runs_to_its_end(name: str, folder: Path, done: dict[str, Result], monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.chdir(folder)
    _run("debug/data-prepare", done)
    _run(name, done)
    result, recipe = done[name], load_recipe(name).recipe
    assert result.metrics["steps"] == recipe.train.num_steps
    assert math.isfinite(result.metrics["train/loss"])
