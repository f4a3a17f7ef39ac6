"""One process a GPU from one command. Real torchrun: marked dist."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
import time
from pathlib import Path

import pytest

from evatool.core.errors import DataError, EvatoolError, UsageError
from evatool.recipe.load import load_recipe
from evatool.runs import launch
from evatool.runs.launch import launch_if_needed, num_processes
from evatool.runs.run_dir import RunDir, RunOptions, open_run_dir
from evatool.runs.status import write_status

TRAIN = "demo/train-clip"


def test_processes_are_the_recipes_or_one_a_gpu(monkeypatch: pytest.MonkeyPatch) -> None:
    import torch

    monkeypatch.setattr(torch.cuda, "device_count", lambda: 4)
    assert num_processes(load_recipe(TRAIN).recipe) == 4
    assert num_processes(load_recipe(TRAIN, ["engine.processes=2"]).recipe) == 2
    monkeypatch.setattr(torch.cuda, "device_count", lambda: 0)
    assert num_processes(load_recipe(TRAIN).recipe) == 1


def test_ranks_and_other_stages_do_not_launch(monkeypatch: pytest.MonkeyPatch) -> None:
    assert num_processes(load_recipe("demo/eval").recipe) == 1
    assert launch_if_needed(load_recipe("demo/eval").recipe, RunOptions(name="x"), []) is None
    monkeypatch.setenv("RANK", "0")
    recipe = load_recipe(TRAIN, ["engine.processes=2"]).recipe
    assert num_processes(recipe) == 1
    assert launch_if_needed(recipe, RunOptions(name="x"), []) is None


def test_a_used_folder_is_refused_before_processes_start(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    recipe = load_recipe(TRAIN, ["engine.processes=2"]).recipe
    open_run_dir(recipe, RunOptions(name="x", run_dir=tmp_path / "run")).close()
    monkeypatch.setattr(launch.subprocess, "Popen", None)
    with pytest.raises(UsageError, match="already used"):
        launch_if_needed(recipe, RunOptions(name="x", run_dir=tmp_path / "run"), [])


SAID = {"error": {"type": "DataError", "message": "no shards", "where": "d", "next": "look"}, "exit_code": 1}


@pytest.mark.parametrize(
    ("state", "code", "message", "is_new", "printed", "expected"),
    [
        ("failed", 1, "no shards", True, json.dumps(SAID), (1, "no shards")),
        ("failed", 78, "rank 1: bad data", True, json.dumps(SAID), (78, "rank 1: bad data")),
        ("preempted", 75, "an older run", False, json.dumps(SAID), (1, "no shards")),
        ("preempted", 75, "an older run", False, "", (1, "a process failed")),
        ("running", None, None, True, "", (1, "a process died without a message")),
        ("preempted", 75, "stopped by SIGTERM", True, "cut of", (75, "stopped by SIGTERM")),
    ],
    ids=["rank-0-says", "rank-1-was-first", "stale", "stale-silent", "killed", "no-json"],
)
def test_the_cause_is_the_new_status_or_rank_0s_words(
    tmp_path: Path, state: str, code: int, message: str, is_new: bool, printed: str, expected: tuple[int, str]
) -> None:
    write_status(tmp_path, state, code, message)
    failure = launch._failure(tmp_path, printed, is_new)
    assert isinstance(failure, EvatoolError)
    assert (failure.exit_code, failure.what) == expected
    assert failure.is_shown == (failure.what == "no shards")
    assert isinstance(failure, DataError) == failure.is_shown
    assert json.loads((tmp_path / "status.json").read_text())["state"] == ("failed" if state == "running" else state)


def test_a_failed_rank_speaks_for_a_killed_rank_0(tmp_path: Path) -> None:
    write_status(tmp_path, "running", None, None)
    RunDir(tmp_path, rank=1).logs.mkdir()
    RunDir(tmp_path, rank=1).fail(78, "rank 1: bad data")
    failure = launch._failure(tmp_path, "", is_status_new=True)
    assert (failure.exit_code, failure.what) == (78, "rank 1: bad data")


@pytest.mark.parametrize(
    ("state", "code", "expected"),
    [
        ("running", None, 76),
        ("failed", 1, 76),
        ("preempted", 75, 76),
        ("failed", 2, 2),
        ("failed", 78, 78),
        ("failed", 79, 79),
        ("failed", 80, 80),
    ],
)
def test_a_killed_rank_is_the_failure_unless_a_rank_had_a_cause_before(
    tmp_path: Path, state: str, code: int | None, expected: int
) -> None:
    write_status(tmp_path, state, code, "rank 0 says")
    failure = launch._failure(tmp_path, "", is_status_new=True, killed="rank 1 on here was killed by SIGKILL")
    found = json.loads((tmp_path / "status.json").read_text())
    assert failure.exit_code == found["exit_code"] == expected
    assert found["message"].startswith("rank 1 on here was killed by SIGKILL" if expected == 76 else "rank 0 says")


# What each rank runs in place of training: `-m evatool` finds this package first.
STAND_IN = """
import json, os, signal, sys, time
from pathlib import Path
rank, behaviour = int(os.environ["RANK"]), sys.argv[sys.argv.index("--run-dir") + 1]
run = Path("run")
print("noise", file=sys.stderr)
if "slow" in behaviour:
    def stop(number, frame):
        (run / f"signals_{rank}").open("a").write(signal.Signals(number).name + " ")
        time.sleep(0.5)
        if rank == 0:
            (run / "status.json").write_text(json.dumps({"state": "interrupted", "exit_code": 130, "message": "saved"}))
        sys.exit(130)
    signal.signal(signal.SIGINT, stop)
    signal.signal(signal.SIGTERM, stop)
    (run / f"ready_{rank}").touch()
    time.sleep(60)
if "killed" in behaviour and rank == 1:
    os.kill(os.getpid(), signal.SIGKILL)
if rank == 0 and "good" in behaviour:
    result = {"stage": "train-clip", "run_dir": "run", "outputs": {}, "next_command": None, "table": []}
    (run / "result.json").write_text(json.dumps(result | {"metrics": {"world": int(os.environ["WORLD_SIZE"])}}))
time.sleep(60 if "killed" in behaviour else 0)
"""

PARENT = """
import sys, logging
from pathlib import Path
from evatool.recipe.load import load_recipe
from evatool.runs.launch import launch_if_needed
from evatool.runs.run_dir import RunOptions
recipe = load_recipe("demo/train-clip", ["engine.processes=2"]).recipe
options = RunOptions(name="x", run_dir=Path("run"))
try:
    result = launch_if_needed(recipe, options, ["train-clip", "--run-dir", sys.argv[1]])
    print(result.metrics)
except Exception as error:
    print(int(error.exit_code), error.what)
"""


@pytest.fixture
def start(tmp_path: Path) -> object:
    """Starts the launching process with a stand-in for `python -m evatool` in its ranks."""
    stand_in = tmp_path / "stand_in.py"
    stand_in.write_text(STAND_IN)
    # The ranks run `-m evatool`: this shim hands them to the stand-in, and leaves every other process alone.
    (tmp_path / "sitecustomize.py").write_text(
        "import os, runpy, sys\n"
        "if 'RANK' in os.environ and '-m' in sys.orig_argv and 'evatool' in sys.orig_argv:\n"
        f"    sys.argv = sys.orig_argv; runpy.run_path({str(stand_in)!r}); os._exit(0)\n"
    )
    environment = os.environ | {"PYTHONPATH": f"{tmp_path}{os.pathsep}{os.environ.get('PYTHONPATH', '')}"}

    def launch_process(behaviour: str) -> subprocess.Popen[str]:
        (tmp_path / "run").mkdir()
        command = [sys.executable, "-c", PARENT, behaviour]
        pipes = {"stdout": subprocess.PIPE, "stderr": subprocess.PIPE}
        return subprocess.Popen(command, cwd=tmp_path, env=environment, text=True, **pipes)  # type: ignore[call-overload]

    return launch_process


def wait_for(*paths: Path) -> None:
    deadline = time.monotonic() + 60
    while not all(path.exists() for path in paths):
        assert time.monotonic() < deadline, "the ranks did not start"
        time.sleep(0.1)


@pytest.mark.dist
def test_two_ranks_run_and_hand_back_one_result(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, err = start("good").communicate(timeout=120)
    assert out == "{'world': 2}\n"
    assert err.count("noise") == 2


@pytest.mark.slow
@pytest.mark.dist
def test_ctrl_c_reaches_every_rank_once_and_they_may_save(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    process = start("slow")
    wait_for(tmp_path / "run" / "ready_0", tmp_path / "run" / "ready_1")
    process.send_signal(signal.SIGINT)
    out, err = process.communicate(timeout=120)
    assert out == "130 saved\n", err
    assert [(tmp_path / "run" / f"signals_{rank}").read_text() for rank in (0, 1)] == ["SIGINT ", "SIGINT "]


@pytest.mark.slow
@pytest.mark.dist
def test_a_killed_rank_is_named(start, tmp_path: Path) -> None:  # type: ignore[no-untyped-def]
    out, err = start("killed").communicate(timeout=120)
    assert out == f"76 rank 1 on {platform.node()} was killed by SIGKILL before the first step\n"
    assert "Traceback" not in err
