"""Processes of a run that are killed, stopped, or wait for others: nothing trains on alone, nothing waits unheard."""

from __future__ import annotations

import json
import os
import platform
import signal
import subprocess
import sys
from pathlib import Path

import pytest
from started_ranks import (
    EVATOOL,
    TORCHRUN,
    bare_ranks,
    environment,
    long_run,
    num_steps,
    parent_of,
    processes_of,
    rank_process,
    started,
    status,
    wait_until,
)

from evatool.core.own_process import is_launched, set_thread_waits
from evatool.runs.status import CAUSES, first_failure

pytestmark = pytest.mark.dist
linux = pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
TWO = "engine.processes=2"
HOST = platform.node()


# ------------------------------------------------------------------------------------------------ what is imported


def trap(folder: Path, *names: str) -> Path:
    """A working folder whose modules leave a file behind when they are imported."""
    folder.mkdir()
    for name in names:
        (folder / f"{name}.py").write_text(f"open({str(folder / 'ran')!r}, 'a').write({name!r} + ' ')\n")
    return folder


def test_nothing_of_the_working_folder_is_imported_by_python_m(tmp_path: Path) -> None:
    """Left out is what Python itself imports to find a module by its name, before any line of ours."""
    folder = trap(tmp_path / "work", "json", "typing", "re", "typer", "logging", "fractions")
    command = [sys.executable, "-m", "evatool", "train-clip", "debug/train-clip", "--dry-run"]
    done = subprocess.run(command, cwd=folder, env=environment(), capture_output=True, text=True)
    assert done.returncode == 0, done.stderr
    assert not (folder / "ran").exists()


def test_a_folder_named_in_pythonpath_is_used_also_where_it_is_the_working_folder(tmp_path: Path) -> None:
    folder = trap(tmp_path / "work", "mine")
    code = "import sys; sys.argv[1:] = ['--version']; import evatool.__main__, mine"
    subprocess.run([sys.executable, "-P", "-c", code], cwd=folder, env=environment(PYTHONPATH=str(folder)), check=True)
    assert (folder / "ran").read_text() == "mine "


@pytest.mark.slow
@linux
def test_nothing_of_the_working_folder_is_imported_by_ranks_and_loader_processes(tmp_path: Path) -> None:
    folder = trap(tmp_path / "work", "fractions", "json", "torch", "random", "queue")
    arguments = long_run(folder, TWO, "data.num_workers=1", "train.samples_seen=16")
    script = tmp_path / "evatool"
    script.write_text("from evatool.cli.app import main\nmain()\n")
    with started([sys.executable, str(script), *arguments], folder) as process:
        assert process.wait(timeout=400) == 0, (folder / "output").read_text()
    assert not (folder / "ran").exists()


# ------------------------------------------------------------------------------------------- how threads wait


@pytest.mark.parametrize(
    ("given", "expected"),
    [
        ({}, {"GOMP_SPINCOUNT": "10000"}),
        ({"GOMP_SPINCOUNT": "7"}, {"GOMP_SPINCOUNT": "7"}),
        ({"OMP_WAIT_POLICY": "ACTIVE"}, {"OMP_WAIT_POLICY": "ACTIVE"}),
    ],
    ids=["nothing", "rounds", "policy"],
)
def test_threads_sleep_soon_unless_the_user_has_said_how_they_wait(
    given: dict[str, str], expected: dict[str, str]
) -> None:
    env = dict(given)
    set_thread_waits(env)
    assert env == expected


def test_it_is_set_before_torch_is_loaded_and_importing_the_package_sets_nothing() -> None:
    code = (
        "import os, sys, evatool, evatool.cli.app as app; assert 'GOMP_SPINCOUNT' not in os.environ; "
        "app.app = lambda: print(os.environ['GOMP_SPINCOUNT'], os.environ['PYTHONSAFEPATH'], 'torch' in sys.modules); "
        "app.main()"
    )
    env = {name: value for name, value in environment().items() if name != "GOMP_SPINCOUNT"}
    done = subprocess.run([sys.executable, "-c", code], env=env, capture_output=True, text=True)
    assert done.stdout == "10000 1 False\n", done.stderr


# ------------------------------------------------------------------------------------------- who ends with whom


@pytest.mark.parametrize(
    ("env", "expected"),
    [
        ({"RANK": "0", "TORCHELASTIC_RUN_ID": "none"}, True),
        ({"RANK": "0", "CROSS_RANK": "0", "LOCAL_SIZE": "2"}, True),
        ({"RANK": "0", "SLURM_PROCID": "0"}, False),
        ({"TORCHELASTIC_RUN_ID": "none"}, False),
    ],
    ids=["torchrun", "deepspeed", "srun", "no rank"],
)
def test_ranks_end_with_a_parent_that_starts_ranks_and_nothing_else(env: dict[str, str], expected: bool) -> None:
    assert is_launched(env) == expected


@pytest.mark.slow
@linux
@pytest.mark.parametrize("killed", ["evatool", "its agent", "torchrun"])
def test_ranks_and_their_loader_processes_end_with_the_launcher(tmp_path: Path, killed: str) -> None:
    settings = ["data.num_workers=1", *([] if killed == "torchrun" else [TWO])]
    command = [*(TORCHRUN if killed == "torchrun" else EVATOOL), *long_run(tmp_path, *settings)]
    with started(command, tmp_path) as process:
        wait_until(lambda: num_steps(tmp_path) >= 2)
        assert len(processes_of(tmp_path)) >= 5, "ranks and loader processes, and what started them"
        target = parent_of(rank_process(tmp_path, 0)) if killed == "its agent" else process.pid
        os.kill(target, signal.SIGKILL)
        wait_until(lambda: set(processes_of(tmp_path)) <= {process.pid}, 10)
        if killed == "its agent":
            assert process.wait(timeout=30) == 76
            assert "torchrun's agent" in status(tmp_path)["message"]
    assert not list((tmp_path / "run").glob("checkpoints/step_*")), "unsaved"


# --------------------------------------------------------------------------------------------------- the start


@pytest.mark.slow
@pytest.mark.parametrize(("rank", "whom"), [(0, "rank 1 to join the job"), (1, "rank 0 at 127.0.0.1:")])
def test_a_rank_whose_others_do_not_come_says_so_and_ends_when_told(tmp_path: Path, rank: int, whom: str) -> None:
    arguments, said = long_run(tmp_path), tmp_path / f"rank{rank}"
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        with bare_ranks([rank], 2, arguments, tmp_path) as (process,):
            wait_until(lambda: said.read_text().count(f"rank {rank} waits for {whom}") >= 2)
            process.send_signal(number)
            assert process.wait(timeout=5) == code
    assert not (tmp_path / "run").exists()


WAITING = """
import os, sys, time
from evatool.core import stop_signals
from evatool.cli.console import Report, execute
def wait():
    import torch.distributed as dist
    store = dist.TCPStore("127.0.0.1", 0, 1, is_master=True, wait_for_workers=False)
    print("waits", file=sys.stderr, flush=True)
    store.get("never")  # in C++
stop_signals.end_at_once()
execute(wait, json_output=False, debug=False)
"""


@pytest.mark.slow
@pytest.mark.parametrize(("number", "code"), [(signal.SIGINT, 130), (signal.SIGTERM, 75)])
def test_a_rank_that_waits_within_torch_ends_when_told(tmp_path: Path, number: int, code: int) -> None:
    job = {"RANK": "0", "WORLD_SIZE": "2", "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": "1"}
    with started([sys.executable, "-c", WAITING], tmp_path, **job) as process:
        wait_until(lambda: "waits" in (tmp_path / "output").read_text())
        process.send_signal(number)
        assert process.wait(timeout=5) == code


@pytest.mark.slow
def test_a_launcher_that_is_told_before_its_ranks_are_up_made_nothing(tmp_path: Path) -> None:
    arguments = long_run(tmp_path, TWO)
    for number, code in ((signal.SIGINT, 130), (signal.SIGTERM, 75)):
        with started([*EVATOOL, *arguments], tmp_path) as process:
            wait_until(lambda: "starting 2 processes" in (tmp_path / "output").read_text())
            process.send_signal(number)
            assert process.wait(timeout=30) == code, (tmp_path / "output").read_text()
        assert not (tmp_path / "run").exists()


# --------------------------------------------------------------------------------------- killed and stopped ranks


@pytest.mark.slow
@linux
@pytest.mark.parametrize("rank", [0, 1])
@pytest.mark.parametrize("launcher", ["evatool", "torchrun", "none"])
def test_a_killed_rank_is_named_with_host_signal_and_step(tmp_path: Path, launcher: str, rank: int) -> None:
    arguments = long_run(tmp_path, *([TWO] if launcher == "evatool" else []))
    if launcher == "none":
        with bare_ranks([0, 1], 2, arguments, tmp_path) as processes:
            wait_until(lambda: num_steps(tmp_path) >= 3)
            processes[rank].kill()
            assert processes[1 - rank].wait(timeout=60) == 76, (tmp_path / f"rank{1 - rank}").read_text()
    else:
        with started([*(EVATOOL if launcher == "evatool" else TORCHRUN), *arguments], tmp_path) as process:
            wait_until(lambda: num_steps(tmp_path) >= 3)
            os.kill(rank_process(tmp_path, rank), signal.SIGKILL)
            code = process.wait(timeout=60)
            assert code == (76 if launcher == "evatool" else 1), (tmp_path / "output").read_text()
    found = status(tmp_path)
    assert (found["state"], found["exit_code"]) == ("failed", 76)
    assert f"rank {rank} on {HOST} was killed by SIGKILL after step " in found["message"]
    assert found["step"] >= 3


@pytest.mark.slow
@linux
@pytest.mark.parametrize("rank", [0, 1])
def test_a_stopped_rank_is_the_one_that_is_named(tmp_path: Path, rank: int) -> None:
    arguments = long_run(tmp_path, "engine.hang_timeout_sec=20")
    with bare_ranks([0, 1], 2, arguments, tmp_path) as processes:
        wait_until(lambda: num_steps(tmp_path) >= 2)
        processes[rank].send_signal(signal.SIGSTOP)
        assert processes[1 - rank].wait(timeout=90) == 76
    found = status(tmp_path)
    assert (found["state"], found["exit_code"]) == ("failed", 76)
    assert found["message"].startswith(f"rank {rank} on {HOST} is stopped")


def note(folder: Path, rank: int, exit_code: int, at: float, **more: str) -> None:
    path = folder / "logs" / f"rank_{rank:05d}.failed.json"
    path.parent.mkdir(exist_ok=True)
    path.write_text(json.dumps({"exit_code": exit_code, "message": f"rank {rank}", "rank": rank, **more}))
    os.utime(path, (at, at))


@pytest.mark.parametrize("cause", [int(code) for code in CAUSES])
def test_a_cause_goes_before_a_killed_rank_and_that_before_what_followed(tmp_path: Path, cause: int) -> None:
    note(tmp_path, 1, 1, at=1)
    note(tmp_path, 2, 76, at=2, signal="SIGKILL")
    note(tmp_path, 3, 76, at=3, signal="SIGKILL")
    first = first_failure(tmp_path)
    assert first is not None
    assert first["rank"] == 2
    note(tmp_path, 4, cause, at=4)
    first = first_failure(tmp_path)
    assert first is not None
    assert (first["rank"], first["exit_code"]) == (4, cause)
