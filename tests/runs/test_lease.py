"""One owner a folder, among real processes: killed, frozen, racing, elsewhere (R25 of docs/faults.md)."""

from __future__ import annotations

import json
import logging
import os
import signal
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from pathlib import Path

import pytest

from evatool.core.errors import ExitCode, RunFolderTakenError
from evatool.runs import lease as lease_module
from evatool.runs.lease import LEASE, STILL_SEC, TOKEN_VARIABLE, check_free, read_token, take_lease

HOLD = """
import sys, time
from pathlib import Path
from evatool.core.errors import RunFolderTakenError
from evatool.runs import lease
lease.BEAT_SEC = 0.05
held = lease.take_lease(Path(sys.argv[1]))
print("holds", flush=True)
for _ in range(1200):
    time.sleep(0.05)
    try:
        held.check()
    except RunFolderTakenError as error:
        print(error.what, flush=True)
        break
"""

Start = Callable[[], "subprocess.Popen[str]"]


@pytest.fixture
def hold(tmp_path: Path) -> Iterator[Start]:
    """Starts a process that owns `tmp_path`, and asks twenty times a second whether it still does."""
    started: list[subprocess.Popen[str]] = []

    def start() -> subprocess.Popen[str]:
        command = [sys.executable, "-c", HOLD, str(tmp_path)]
        started.append(subprocess.Popen(command, stdout=subprocess.PIPE, text=True))
        assert started[-1].stdout is not None
        assert started[-1].stdout.readline() == "holds\n"
        return started[-1]

    yield start
    for process in started:
        process.kill()
        process.communicate()


@pytest.fixture
def elsewhere(monkeypatch: pytest.MonkeyPatch) -> None:
    """This process as one of another machine, which is in no hurry."""
    monkeypatch.setattr(lease_module, "_own_place", lambda: ("another boot", "pid:[1]"))
    monkeypatch.setattr(lease_module, "STILL_SEC", 0.3)


def change(folder: Path, *, name: str = LEASE, **values: object) -> None:
    path = folder / name
    path.write_text(json.dumps(json.loads(path.read_text()) | values))


def give_to_parent(folder: Path, name: str = LEASE) -> None:
    """Let a lease name the process that started the tests, which lives."""
    parent = os.getppid()
    change(folder, name=name, pid=parent, start_time=lease_module._start_time(parent))


def test_a_second_start_is_refused_and_told_by_whom(tmp_path: Path, hold: Start) -> None:
    process = hold()
    for refused in (take_lease, check_free):
        with pytest.raises(RunFolderTakenError, match=f"in use by process {process.pid} on ") as caught:
            refused(tmp_path)
        assert caught.value.exit_code == ExitCode.USAGE
        assert "--run-dir" in str(caught.value.fix)
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


def test_what_a_killed_process_held_is_taken_over_at_once(
    tmp_path: Path, hold: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = hold()
    process.kill()
    while b") Z " not in Path(f"/proc/{process.pid}/stat").read_bytes():
        time.sleep(0.01)
    check_free(tmp_path)  # a process that nobody has waited for is gone as well
    process.wait()
    started = time.monotonic()
    with caplog.at_level(logging.INFO, logger="evatool"):
        lease = take_lease(tmp_path)
    assert time.monotonic() - started < 1
    assert f"taken over from process {process.pid} on " in caplog.text
    lease.check()
    lease.release()
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_got_the_number_of_a_dead_one_does_not_hold_its_folder(tmp_path: Path, hold: Start) -> None:
    process = hold()
    process.kill()
    process.wait()
    change(tmp_path, pid=os.getppid())
    take_lease(tmp_path).release()


def test_a_reboot_or_another_container_is_waited_for(
    tmp_path: Path, elsewhere: None, hold: Start, caplog: pytest.LogCaptureFixture
) -> None:
    process = hold()
    process.kill()
    process.wait()
    check_free(tmp_path)  # not for a launcher to wait for
    started = time.monotonic()
    take_lease(tmp_path).release()
    assert 0.3 <= time.monotonic() - started < 3
    assert caplog.text.count("waiting up to 0.3 s to see whether it lives") == 1
    assert f"process {process.pid} on " in caplog.text


def test_a_counter_that_moves_elsewhere_refuses(tmp_path: Path, elsewhere: None, hold: Start) -> None:
    process = hold()
    with pytest.raises(RunFolderTakenError, match=f"in use by process {process.pid} on "):
        take_lease(tmp_path)
    assert process.poll() is None


def test_a_frozen_owner_that_was_taken_over_stops_when_it_thaws(tmp_path: Path, elsewhere: None, hold: Start) -> None:
    process = hold()
    process.send_signal(signal.SIGSTOP)
    lease = take_lease(tmp_path)
    text = (tmp_path / LEASE).read_bytes()
    process.send_signal(signal.SIGCONT)
    out, _ = process.communicate(timeout=20)
    assert out == f"the run folder was taken over by process {os.getpid()} on {lease_module.platform.node()}\n"
    assert (tmp_path / LEASE).read_bytes() == text  # neither its counter nor its end has touched the other's lease
    lease.check()
    lease.release()


def test_a_start_that_is_slow_to_take_over_leaves_the_faster_one_its_lease(
    tmp_path: Path, hold: Start, monkeypatch: pytest.MonkeyPatch
) -> None:
    """Between its look at the dead owner and its hand on the file, another start has made itself the owner."""
    process = hold()
    process.kill()
    process.wait()
    rename = os.rename

    def too_late(source: Path, target: Path) -> None:
        change(tmp_path, token="faster")
        give_to_parent(tmp_path)
        rename(source, target)

    monkeypatch.setattr(os, "rename", too_late)
    with pytest.raises(RunFolderTakenError, match=f"in use by process {os.getppid()} on "):
        take_lease(tmp_path)
    assert read_token(tmp_path) == "faster"
    assert [path.name for path in tmp_path.iterdir()] == [LEASE]


def test_the_counter_moves_in_the_owners_own_file_only(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(lease_module, "BEAT_SEC", 0.02)
    lease = take_lease(tmp_path)
    deadline = time.monotonic() + 10
    while json.loads((tmp_path / LEASE).read_text())["counter"] < "000000000003":
        assert time.monotonic() < deadline
        time.sleep(0.01)
    change(tmp_path, token="another", counter="x")
    time.sleep(0.1)
    assert json.loads((tmp_path / LEASE).read_text())["counter"] == "x"
    with pytest.raises(RunFolderTakenError, match="taken over"):
        lease.check()
    lease.release()
    assert read_token(tmp_path) == "another"


@pytest.mark.parametrize("damage", [None, b"", b"\xff\x00{", b"[]", b'{"token": 1}'], ids=repr)
def test_a_lease_that_is_lost_is_put_back_by_its_owner(tmp_path: Path, damage: bytes | None) -> None:
    lease = take_lease(tmp_path)
    (tmp_path / LEASE).unlink() if damage is None else (tmp_path / LEASE).write_bytes(damage)
    lease.check()
    assert read_token(tmp_path) == lease.token
    lease.release()
    assert list(tmp_path.iterdir()) == []


@pytest.mark.parametrize("damage", [b"", b"[" * 10_000], ids=["empty", "deep"])
def test_a_lease_that_cannot_be_read_is_waited_for(tmp_path: Path, elsewhere: None, damage: bytes) -> None:
    (tmp_path / LEASE).write_bytes(damage)
    started = time.monotonic()
    take_lease(tmp_path).release()
    assert time.monotonic() - started >= 0.3


def test_a_storage_without_links_has_leases_too(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def no_links(*_: object) -> None:
        raise PermissionError(1, "Operation not permitted")

    monkeypatch.setattr(os, "link", no_links)
    lease = take_lease(tmp_path)
    give_to_parent(tmp_path)
    with pytest.raises(RunFolderTakenError):
        take_lease(tmp_path)
    lease.release()
    assert list(tmp_path.iterdir()) == []


def test_a_process_that_opens_its_folder_again_gives_up_what_it_had_open(tmp_path: Path) -> None:
    first = take_lease(tmp_path)
    second = take_lease(tmp_path)
    with pytest.raises(RunFolderTakenError, match="taken over"):
        first.check()
    first.release()
    second.check()
    second.release()
    assert list(tmp_path.iterdir()) == []


def test_tasks_of_one_job_share_a_folder(tmp_path: Path) -> None:
    one, two = (take_lease(tmp_path, shared_by="job", task=task) for task in ("1-of-2", "2-of-2"))
    for task in ("1-of-2", "2-of-2"):
        give_to_parent(tmp_path, f"{LEASE}.{task}")
    for others in ({}, {"shared_by": "another job", "task": "3"}, {"shared_by": "job", "task": "1-of-2"}):
        with pytest.raises(RunFolderTakenError):
            take_lease(tmp_path, **others)
    one.release()
    two.check()
    two.release()
    alone = take_lease(tmp_path)
    give_to_parent(tmp_path)
    with pytest.raises(RunFolderTakenError):
        take_lease(tmp_path, shared_by="job", task="1-of-2")
    alone.release()


def test_a_launchers_token_is_taken(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setenv(TOKEN_VARIABLE, "given")
    lease = take_lease(tmp_path)
    assert lease.token == read_token(tmp_path) == "given"
    lease.release()
    assert read_token(tmp_path) is None


RACE = """
import os, sys
from pathlib import Path
from evatool.core.errors import RunFolderTakenError
from evatool.runs import lease
folder, rounds, racers = Path(sys.argv[1]), int(sys.argv[2]), int(sys.argv[3])
for number in range(rounds):
    dead = os.fork()
    if dead == 0:
        lease.take_lease(folder)
        os._exit(0)
    os.waitpid(dead, 0)
    gate, go = os.pipe()
    answers, answer = os.pipe()
    done, end = os.pipe()
    for _ in range(racers):
        if os.fork() == 0:
            os.close(go), os.close(end)
            os.read(gate, 1)  # until all have been made
            try:
                held = lease.take_lease(folder)
                os.write(answer, b"1")
                os.read(done, 1)  # alive until all have answered
                held.check()
                held.release()
            except RunFolderTakenError:
                os.write(answer, b"0")
            except BaseException:
                os.write(answer, b"?")
            os._exit(0)
    os.close(go)
    found = b""
    while len(found) < racers:
        found += os.read(answers, racers)
    os.close(end)
    for _ in range(racers):
        os.wait()
    left = sorted(path.name for path in folder.iterdir())
    assert sorted(found) == sorted(b"0" * (racers - 1) + b"1"), (number, found)
    assert left == [], (number, left)
"""


@pytest.mark.parametrize("rounds", [3, pytest.param(200, marks=pytest.mark.slow)])
def test_of_many_that_take_over_at_once_one_wins(tmp_path: Path, rounds: int) -> None:
    """Every round a process dies as owner and six take over: one holds the folder, five are refused, none waits."""
    command = [sys.executable, "-c", RACE, str(tmp_path), str(rounds), "6"]
    result = subprocess.run(command, capture_output=True, text=True)
    assert result.returncode == 0, result.stderr


def test_the_wait_is_as_long_as_the_pages_say() -> None:
    assert STILL_SEC == 60
