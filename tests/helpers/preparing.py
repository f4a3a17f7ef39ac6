"""Runs the data-prepare stage for tests."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

from evatool.recipe.load import Resolved
from evatool.recipe.schema import DataPrepareRecipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage


def prepare(
    run_dir: Path, data: dict[str, Any], shards: dict[str, Any] | None = None, *, resume: bool = False
) -> Result:
    """Run the stage as the command line does."""
    table = {"data": data, "shards": shards or {}}
    recipe = DataPrepareRecipe.model_validate_json(json.dumps(table, default=str), strict=True)
    options = RunOptions(name="test", run_dir=run_dir, resume=resume)
    return run_stage(Resolved(recipe, "test", {}), options)
