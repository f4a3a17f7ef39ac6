"""Every published training recipe at debug width, through the same stages and in the order of its chain."""

from __future__ import annotations

import math
import os
from pathlib import Path

import pytest

from evatool.recipe.load import list_recipes, load_recipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

pytestmark = pytest.mark.e2e

NAMES = [name for name, *_ in list_recipes() if name.startswith("debug/") and name.count("/") == 2]


@pytest.fixture(scope="module")
def runs(tmp_path_factory: pytest.TempPathFactory) -> dict[str, Result]:
    """Results by recipe; a recipe that starts from another's run is run after it."""
    before = Path.cwd()
    os.chdir(tmp_path_factory.mktemp("published"))
    try:
        done: dict[str, Result] = {}
        for name in ["debug/data-prepare", *NAMES]:
            _run(name, done)
        return done
    finally:
        os.chdir(before)


def _run(name: str, done: dict[str, Result]) -> None:
    if name in done:
        return
    resolved = load_recipe(name)
    init = getattr(getattr(resolved.recipe, "model", None), "init", None)
    start = getattr(init, "path", None) or getattr(getattr(init, "image", None), "path", None)
    if start is not None:
        _run(str(start).removeprefix("runs/"), done)
    done[name] = run_stage(resolved, RunOptions(name=resolved.name))


@pytest.mark.parametrize("name", NAMES)
def test_it_runs_to_its_end(name: str, runs: dict[str, Result]) -> None:
    result, recipe = runs[name], load_recipe(name).recipe
    assert result.metrics["steps"] == recipe.train.num_steps
    assert math.isfinite(result.metrics["train/loss"])
