"""The bundled drawings, prepared once for all tests of this folder."""

from __future__ import annotations

from pathlib import Path
from typing import Any

import pytest

from evatool.recipe.schema import DataPrepareRecipe
from evatool.stages import data_prepare
from evatool.stages.run_dir import RunOptions


def prepare(run_dir: Path, data: dict[str, Any], shards: dict[str, Any] | None = None) -> DataPrepareRecipe:
    """Run the stage; the recipe as it would come out of a file."""
    import json

    table = {"data": data, "shards": shards or {}}
    recipe = DataPrepareRecipe.model_validate_json(json.dumps(table, default=str), strict=True)
    options = RunOptions(name="test", run_dir=run_dir)
    result = data_prepare.run(recipe, options)
    assert options.opened is not None
    options.opened.finish(result)
    return recipe


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the whole set with the default split."""
    folder = tmp_path_factory.mktemp("drawings") / "run"
    prepare(folder, {"kind": "drawings"})
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 30 concepts, 5 of them never seen, in shards of 40."""
    folder = tmp_path_factory.mktemp("small") / "run"
    prepare(folder, {"kind": "drawings", "max_concepts": 30, "num_unseen": 5}, {"samples_per_shard": 40})
    return folder
