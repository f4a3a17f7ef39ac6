"""Row R28 of docs/faults.md: loader processes that die or hang."""

from __future__ import annotations

import json
import multiprocessing.util
import os
import re
import signal
import subprocess
import sys
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import Server, at_most
from small_disk import need_small_disks, run_on_small_disk
from tiny_shards import loader, take, write_prepared

from evatool.core.errors import TransientError
from evatool.data.train.transfer import PackingDataset

QUICK = {"attempts": 3, "timeout_sec": 0.4, "backoff_sec": 0.01}


def far(server: Server, tmp_path: Path, **section: Any) -> dict[str, Any]:
    remote = {**QUICK, "cache_dir": str(tmp_path / "cache"), **section.pop("remote", {})}
    source = {"name": "far", "shards": section.pop("shards", server.url)}
    return {"sources": [source], "window_shards": 2, "remote": remote, "max_bad_fraction": 1.0, **section}


# --------------------------------------------------------------------------------------------------- R28: workers

KILLED = """
import json, os, signal, sys, time, multiprocessing, logging
logging.basicConfig()
from tiny_shards import loader
from evatool.core.errors import EvatoolError
found = loader({"train": sys.argv[1], "num_workers": 2, **json.loads(sys.argv[3])})
seen, start = [], time.monotonic()
try:
    for step, batch in enumerate(found):
        seen.append(batch.keys)
        if step in json.loads(sys.argv[2]):
            for child in multiprocessing.active_children():
                os.kill(child.pid, getattr(signal, sys.argv[4]))
        if step == 11:
            break
except EvatoolError as err:
    print(json.dumps({"code": err.exit_code, "text": str(err), "sec": time.monotonic() - start}))
else:
    print(json.dumps({"keys": seen, "sec": time.monotonic() - start}))
"""


def run_killed(folder: Path, steps: list[int], section: dict[str, Any], how: str) -> tuple[dict[str, Any], str]:
    command = [sys.executable, "-c", KILLED, str(folder), json.dumps(steps)]
    done = subprocess.run([*command, json.dumps(section), how], capture_output=True, text=True, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.e2e
def test_r28_killed_workers_are_started_again_in_the_same_order(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    whole = [b.keys for b in take(loader({"train": folder}), 12)]
    found, log = run_killed(folder, [2, 7], {}, "SIGKILL")
    assert found["keys"] == whole
    assert found["sec"] < 30
    assert log.count("started again") == 2


@pytest.mark.slow
@pytest.mark.e2e
def test_r28_a_worker_that_hangs_ends_the_run_with_76(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    found, _ = run_killed(folder, [2], {"max_wait_sec": 5.0}, "SIGSTOP")
    assert found["code"] == 76
    assert "no batch came for 5 s" in found["text"]
    assert re.search(r"processes \d+, \d+ of this rank", found["text"])
    assert found["sec"] < 40


@pytest.mark.slow
@pytest.mark.e2e
def test_r28_dying_twice_at_one_batch_is_an_error(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    found = loader({"train": folder, "num_workers": 1})
    real = type(found.dataset).__getitem__

    def die(self: Any, position: int) -> Any:
        if position == 48:
            os.kill(os.getpid(), signal.SIGKILL)
        return real(self, position)

    monkeypatch.setattr(type(found.dataset), "__getitem__", die)
    seen: list[int] = []
    with pytest.raises(TransientError, match="a loader process died twice") as caught, at_most(60):
        seen.extend(batch.position for batch in found)
    assert caught.value.exit_code == 76
    assert seen == [16, 32, 48][: len(seen)]  # made ahead of the batch that kills, some may be lost with it


NO_ROOM = """
import json, logging, os, sys, time
logging.basicConfig()
from tiny_shards import loader, take
from evatool.core.errors import EvatoolError
start = time.monotonic()
try:
    found = [(b.keys, b.image.sum().item()) for b in take(loader({"train": sys.argv[1], "num_workers": 2}), 6)]
except EvatoolError as err:
    print(json.dumps({"code": err.exit_code, "text": str(err), "sec": time.monotonic() - start}))
else:
    print(json.dumps({"found": found, "sec": time.monotonic() - start}))
"""


def run_without_room(folder: Path, size: str) -> tuple[dict[str, Any], str]:
    done = run_on_small_disk([sys.executable, "-c", NO_ROOM, folder], Path("/dev/shm"), size, timeout=120)
    assert done.returncode == 0, done.stderr
    return json.loads(done.stdout.splitlines()[-1]), done.stderr


@pytest.mark.slow
@pytest.mark.e2e
def test_r28_a_small_shared_memory_is_worked_round(tmp_path: Path) -> None:
    need_small_disks()
    folder = write_prepared(tmp_path / "set", 64, 8)
    found, log = run_without_room(folder, "64k")
    assert found["found"] == [[b.keys, int(b.image.sum())] for b in take(loader({"train": folder}), 6)]
    assert found["sec"] < 60
    assert log.count("/dev/shm has") == 1
    assert "No space left on device" in log


@pytest.mark.slow
@pytest.mark.e2e
def test_r28_a_shared_memory_without_room_for_semaphores_is_named(tmp_path: Path) -> None:
    need_small_disks()
    found, log = run_without_room(write_prepared(tmp_path / "set", 64, 8), "4k")
    assert found["code"] == 2
    assert "/dev/shm" in found["text"]
    assert "data.num_workers = 0" in found["text"]
    assert "Traceback" not in log


@pytest.mark.slow
@pytest.mark.e2e
def test_r28_a_long_temporary_folder_is_worked_round(tmp_path: Path) -> None:
    """A Unix socket's address holds 107 bytes, and the sockets of loader processes are in TMPDIR."""
    folder = write_prepared(tmp_path / "set", 64, 8)
    long = tmp_path / "long-scratch-folder" / ("x" * 100)
    long.mkdir(parents=True)
    done = subprocess.run(
        [sys.executable, "-c", NO_ROOM, str(folder)],
        capture_output=True,
        text=True,
        timeout=120,
        env=os.environ | {"TMPDIR": str(long)},
    )
    assert done.returncode == 0, done.stderr
    expected = [[b.keys, int(b.image.sum())] for b in take(loader({"train": folder}), 6)]
    assert json.loads(done.stdout.splitlines()[-1])["found"] == expected
    assert "go through pipes" not in done.stderr, "short sockets, and shared memory as ever"
    assert list(long.glob("pymp-*")) == []


def test_a_batch_that_cannot_be_shared_travels_whole(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    dataset = loader({"train": folder}).dataset
    packing = PackingDataset(dataset)
    with monkeypatch.context() as patch:
        patch.setattr(multiprocessing.util, "get_temp_dir", lambda: str(tmp_path / ("x" * 120)))
        packed = packing[0]
    made, expected = packed.open(), dataset[0]
    assert "AF_UNIX path too long" in packed.trouble
    assert made.batch is not None
    assert expected.batch is not None
    assert torch.equal(made.batch.image, expected.batch.image)
    assert made.batch.keys == expected.batch.keys
    made.batch.image.zero_()  # writable, as what comes through shared memory is


def test_an_error_in_a_worker_is_not_taken_for_a_death(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    found = loader({"train": folder, "num_workers": 1})

    def fail(self: Any, position: int) -> Any:
        raise RuntimeError("our own mistake")

    monkeypatch.setattr(type(found.dataset), "__getitem__", fail)
    with pytest.raises(RuntimeError, match="our own mistake"):
        take(found, 1)
