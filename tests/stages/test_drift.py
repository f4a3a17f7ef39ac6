"""A run that is resumed with another recipe, or other versions (rows R26 and R31 of docs/faults.md)."""

from __future__ import annotations

import json
import logging

import pytest

from evatool.core.errors import RecipeError
from evatool.recipe.load import resolve_table
from evatool.runs.run_dir import RunOptions, open_run_dir


def recipe(lr: float = 1e-3, seed: int = 0):
    table = {
        "data": {"train": "shards"},
        "model": {"preset": "EVA02-CLIP-debug"},
        "objective": {"kind": "infonce"},
        "optim": {"visual": {"lr": lr}, "text": {"lr": 1e-3}},
        "train": {"samples_seen": 24, "global_batch_size": 8, "seed": seed},
    }
    return resolve_table(table, "train-clip").recipe


@pytest.fixture
def used(tmp_path):
    """The folder of a run that has made something."""
    open_run_dir(recipe(), RunOptions("run", tmp_path)).close()
    (tmp_path / "checkpoints").mkdir()
    return tmp_path


def reopen(folder, changed, *accepted: str) -> None:
    open_run_dir(changed, RunOptions("run", folder, resume=True, accept_drift=accepted)).close()


def test_a_changed_key_is_refused_with_both_values_and_the_way_to_accept_it(used):
    with pytest.raises(RecipeError) as refused:
        reopen(used, recipe(lr=2e-3, seed=1), "train.seed")
    assert [problem.split(":")[0] for problem in refused.value.problems] == ["optim.visual.lr"]
    assert "was 0.001, now 0.002" in refused.value.problems[0]
    assert "--accept-drift KEY" in (refused.value.fix or "")


@pytest.mark.parametrize("accepted", ["optim.visual.lr", "optim.visual", "optim"])
def test_an_accepted_key_is_named_and_becomes_the_runs(used, accepted, caplog):
    with caplog.at_level(logging.WARNING, logger="evatool"):
        reopen(used, recipe(lr=2e-3), accepted)
    assert "as accepted: optim.visual.lr: was 0.001, now 0.002" in caplog.text
    reopen(used, recipe(lr=2e-3))  # the new value is the run's from here on


def test_part_of_a_key_accepts_nothing(used):
    with pytest.raises(RecipeError):
        reopen(used, recipe(lr=2e-3), "optim.vis")


def test_other_versions_than_at_the_start_are_named(used, caplog):
    path = used / "environment.json"
    before = json.loads(path.read_text())
    before["packages"]["torch"] = "1.13.0"
    path.write_text(json.dumps(before))
    with caplog.at_level(logging.WARNING, logger="evatool"):
        reopen(used, recipe())
    assert "this run was started with other versions: torch 1.13.0, now " in caplog.text
