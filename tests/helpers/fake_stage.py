"""A stage that does what a test says, and what else the command line's tests share."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from types import ModuleType
from typing import Any

from typer.testing import Result

from evatool.runs.result import Result as StageResult
from evatool.runs.run_dir import RunOptions, open_run_dir

Invoke = Callable[..., Result]


class FakeStage(ModuleType):
    """Stands for the module of a stage: makes its run folder, then does what the test says."""

    def __init__(self) -> None:
        super().__init__("fake_stage")
        self.recipes: list[Any] = []
        self.body: Callable[[Path], None] = lambda path: None

    def run(self, recipe: Any, run: RunOptions) -> StageResult:
        self.recipes.append(recipe)
        run_dir = open_run_dir(recipe, run)
        self.body(run_dir.path)
        return StageResult(
            stage=recipe.stage,
            run_dir=run_dir.path,
            outputs={"weights": run_dir.path / "weights"},
            metrics={"top1": 0.25, "bad": float("nan")},
            next_command="evatool eval ...",
            table=[["set", "top-1"], ["new-artist", "25 %"]],
        )


def only_json(result: Result) -> dict[str, Any]:
    """The one object on stdout."""
    assert result.stdout.count("\n") == 1
    return json.loads(result.stdout)
