"""Where a run stands in Weights & Biases and trackio: project, owner, group, and an identity of its own."""

from __future__ import annotations

import importlib.util
import json
import os
import subprocess
import sys
import types
from pathlib import Path
from typing import Any

import pytest
from pydantic import ValidationError

from evatool.recipe.schema.train import TrainSection
from evatool.train.hooks.trackers import IDENTITY, Tracker

VARIABLES = ("PROJECT", "ENTITY", "RUN_GROUP", "RUN_ID", "NAME", "RESUME", "DIR")


class Recorder(types.ModuleType):
    """Stands for wandb or trackio, which are not installed here: keeps what it is started with."""

    def __init__(self, kind: str) -> None:
        super().__init__(kind)
        self.started: list[dict[str, Any]] = []

    def init(self, **settings: Any) -> Recorder:
        self.started.append(settings)
        return self

    def finish(self) -> None:
        pass


@pytest.fixture(params=["wandb", "trackio"])
def tracker(request: pytest.FixtureRequest, monkeypatch: pytest.MonkeyPatch) -> Recorder:
    for name in VARIABLES:
        monkeypatch.delenv(f"WANDB_{name}", raising=False)
    recorder = Recorder(request.param)
    monkeypatch.setitem(sys.modules, request.param, recorder)
    return recorder


def start(tracker: Recorder, folder: Path, settings: dict[str, Any] | None = None, **section: str) -> dict[str, Any]:
    """What the tracker is started with by a run in that folder."""
    folder.mkdir(parents=True, exist_ok=True)
    hook = Tracker(tracker.__name__, folder, "debug/train-clip", settings or {}, **section)
    hook.at_start(types.SimpleNamespace(state=types.SimpleNamespace(step=0)))  # type: ignore[arg-type]
    hook.close()
    return tracker.started[-1]


def id_of(started: dict[str, Any]) -> str:
    """W&B knows a run by its id, trackio by its name."""
    return started.get("id") or started["name"]


def test_runs_of_two_projects_are_two_runs(tracker: Recorder, tmp_path: Path) -> None:
    """The same folder names in two checkouts; a resumed run, also after its folder was moved, is the one it was."""
    first, second = (start(tracker, tmp_path / name / "runs/debug/train-clip") for name in ("a", "b"))
    assert id_of(first) != id_of(second)
    assert id_of(first).startswith("debug-train-clip-")
    (tmp_path / "a").rename(tmp_path / "c")
    assert id_of(start(tracker, tmp_path / "c/runs/debug/train-clip")) == id_of(first)


def test_the_recipe_wins_over_the_environment_and_that_over_defaults(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    is_wandb = tracker.__name__ == "wandb"
    assert start(tracker, tmp_path)["project"] == "evatool"
    for name in VARIABLES:
        monkeypatch.setenv(f"WANDB_{name}", f"env-{name}")
    found = start(tracker, tmp_path)
    if is_wandb:  # what is None, W&B reads from the environment itself
        left = ("project", "entity", "group", "name", "resume", "dir")
        assert {key: found[key] for key in left} == dict.fromkeys(left)
        assert found["id"] == "env-RUN_ID"
    else:
        assert found["project"] == "evatool"
    section = {"project": "p", "group": "g", "run_id": "i"} | ({"entity": "e"} if is_wandb else {})
    found = start(tracker, tmp_path, **section)
    assert (found["project"], found["group"], id_of(found)) == ("p", "g", "i")
    assert found.get("entity") == section.get("entity")


def test_an_identity_of_the_environment_is_kept(
    tracker: Recorder, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    if tracker.__name__ == "trackio":
        pytest.skip("trackio has no such variable")
    monkeypatch.setenv("WANDB_RUN_ID", "given")
    start(tracker, tmp_path)
    monkeypatch.delenv("WANDB_RUN_ID")
    assert start(tracker, tmp_path)["id"] == "given"


def test_an_older_run_keeps_its_identity(tracker: Recorder, tmp_path: Path) -> None:
    """Older versions took the last three parts of the folder's path and kept no note of it."""
    folder = tmp_path / "runs/debug/train-clip"
    saved = folder / "checkpoints/step_00000008/resolved.toml"
    saved.parent.mkdir(parents=True)
    saved.write_text(f'stage = "train-clip"\n\n[train]\ntrackers = ["tensorboard", "{tracker.__name__}"]\n')
    assert id_of(start(tracker, folder)) == "runs-debug-train-clip"
    moved = folder.rename(tmp_path / "moved")
    assert id_of(start(tracker, moved)) == "runs-debug-train-clip"


def test_an_older_run_that_was_moved_is_known_by_its_own_files(tracker: Recorder, tmp_path: Path) -> None:
    for name in ("offline-run-20260101_101500-runs-debug-first", "run-20260102_101500-runs-debug-train-clip"):
        (tmp_path / "wandb" / name).mkdir(parents=True)
    expected = "runs-debug-train-clip"
    assert (id_of(start(tracker, tmp_path)) == expected) == (tracker.__name__ == "wandb")


@pytest.mark.parametrize("damaged", ["", "[]", '{"wandb": 3, "trackio": null}', "{"])
def test_a_damaged_note_is_no_obstacle(tracker: Recorder, tmp_path: Path, damaged: str) -> None:
    (tmp_path / IDENTITY).write_text(damaged)
    assert id_of(start(tracker, tmp_path)) == json.loads((tmp_path / IDENTITY).read_text())[tracker.__name__]


def test_no_credential_is_sent(tracker: Recorder, tmp_path: Path) -> None:
    sent = start(tracker, tmp_path, {"data.train": "https://u:pw1@h/0.tar?sig=pw2", "data.token": "pw3", "n": 3})
    assert sent["config"] == {"data.train": "https://***@h/0.tar?sig=***", "data.token": "***", "n": "3"}


def section(**keys: Any) -> TrainSection:
    table = {"samples_seen": 8, "global_batch_size": 8, **keys}
    return TrainSection.model_validate_json(json.dumps(table), strict=True)


def test_settings_of_no_tracker_are_refused() -> None:
    assert section(trackers=["wandb"], tracking={"entity": "e", "run_id": "a-1"}).tracking.entity == "e"
    for trackers, tracking in (
        ([], {"project": "p"}),
        (["tensorboard"], {"group": "g"}),
        (["trackio"], {"entity": "e"}),
        (["wandb"], {"run_id": "a/b"}),
    ):
        with pytest.raises(ValidationError):
            section(trackers=trackers, tracking=tracking)


REAL = """
import sys, types
from pathlib import Path
from evatool.train.hooks.trackers import Tracker
hook = Tracker("wandb", Path(sys.argv[1]), "debug/train-clip", {})
hook.at_start(types.SimpleNamespace(state=types.SimpleNamespace(step=0)))
run = hook._run
print(run.project, run.id)
hook.close()
"""


@pytest.mark.slow
@pytest.mark.skipif(importlib.util.find_spec("wandb") is None, reason="needs wandb (pip install 'evatool[track]')")
def test_wandb_itself_keeps_projects_apart(tmp_path: Path) -> None:
    """Offline; W&B's own folders have the ids."""
    seen = []
    for name, more in (("a", {}), ("b", {"WANDB_PROJECT": "mine"})):
        folder = tmp_path / name / "runs/debug/train-clip"
        folder.mkdir(parents=True, exist_ok=True)
        environment = os.environ | {"WANDB_MODE": "offline", "WANDB_SILENT": "true"} | more
        ran = subprocess.run([sys.executable, "-c", REAL, str(folder)], env=environment, capture_output=True, text=True)
        assert ran.returncode == 0, ran.stderr
        seen.append(ran.stdout.split())
        assert list(folder.glob(f"wandb/offline-run-*-{seen[-1][1]}"))
    assert [project for project, _ in seen] == ["evatool", "mine"]
    assert seen[0][1] != seen[1][1]
