"""Real commands as processes: their ranks, what becomes of them, and waits that end.

The run is a short one of `debug/train-clip` that would go on for minutes, on shards that `write_prepared` makes.
"""

from __future__ import annotations

import json
import os
import signal
import socket
import subprocess
import sys
import time
from collections.abc import Callable, Iterator
from contextlib import contextmanager
from pathlib import Path
from typing import Any

from tiny_shards import write_prepared

ROOT = Path(__file__).resolve().parents[2]
LAUNCHER = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
EVATOOL = (sys.executable, "-P", "-m", "evatool")
TORCHRUN = (sys.executable, "-m", "torch.distributed.run", "--standalone", "--nproc-per-node", "2", "-m", "evatool")


def long_run(folder: Path, *settings: str) -> list[str]:
    """Arguments of a run in `folder/run` that is never done within a test."""
    shards = folder / "shards"
    if not shards.exists():
        write_prepared(shards, 32, 32)
    settings = (
        *(f"data.train={shards}", "data.num_workers=0", "train.samples_seen=1600000", "train.global_batch_size=4"),
        *("schedule.warmup_samples=8", "train.log_every=1", *settings),
    )
    sets = [part for setting in settings for part in ("--set", setting)]
    return ["train-clip", "debug/train-clip", "--run-dir", str(folder / "run"), *sets]


def environment(**more: str) -> dict[str, str]:
    """This process's, without a launcher's words, and with this working tree to import from."""
    kept = {name: value for name, value in os.environ.items() if name not in LAUNCHER}
    path = os.pathsep.join(filter(None, [str(ROOT), kept.get("PYTHONPATH")]))
    return kept | {"PYTHONPATH": path, "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", **more}


@contextmanager
def started(command: list[str], folder: Path, log: str = "output", **more: str) -> Iterator[subprocess.Popen[bytes]]:
    """A process whose words go to `folder/log`; it and what belongs to the run are gone afterwards."""
    with (folder / log).open("wb") as output:
        process = subprocess.Popen(command, env=environment(**more), cwd=folder, stdout=output, stderr=output)
    try:
        yield process
    finally:
        process.kill()
        process.wait()
        for pid in processes_of(folder):
            os.kill(pid, signal.SIGKILL)


@contextmanager
def bare_ranks(numbers: list[int], world_size: int, arguments: list[str], folder: Path) -> Iterator[list[Any]]:
    """Ranks that no launcher watches, as under `srun`, each with its own log `rank0` and so on; those in `numbers`."""
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = str(free.getsockname()[1])
    job = {"WORLD_SIZE": str(world_size), "MASTER_ADDR": "127.0.0.1", "MASTER_PORT": port}
    processes = []
    try:
        for rank in numbers:
            me = job | {"RANK": str(rank), "LOCAL_RANK": str(rank)}
            with (folder / f"rank{rank}").open("wb") as output:
                processes.append(
                    subprocess.Popen(
                        [*EVATOOL, *arguments], env=environment(**me), cwd=folder, stdout=output, stderr=output
                    )
                )
        yield processes
    finally:
        for process in processes:
            process.kill()
            process.wait()


def wait_until(is_so: Callable[[], object], seconds: float = 180.0) -> float:
    """Wait, at most so long; returns the seconds it took."""
    start = time.monotonic()
    while not is_so():
        assert time.monotonic() - start < seconds, f"not within {seconds:g} s"
        time.sleep(0.1)
    return time.monotonic() - start


def num_steps(folder: Path) -> int:
    """Steps that the run in `folder/run` has logged."""
    metrics = folder / "run" / "metrics.jsonl"
    return len(metrics.read_bytes().splitlines()) if metrics.exists() else 0


def status(folder: Path) -> dict[str, Any]:
    """`status.json` of the run in `folder/run`."""
    return json.loads((folder / "run" / "status.json").read_text())


def processes_of(folder: Path) -> list[int]:
    """Running processes with the run in `folder/run` on their command lines."""
    found = []
    for path in Path("/proc").glob("[0-9]*"):
        try:
            words = (path / "cmdline").read_bytes().split(b"\0")
            if str(folder / "run").encode() in words and (path / "stat").read_text().rpartition(") ")[2][0] != "Z":
                found.append(int(path.name))
        except OSError:
            continue
    return found


def rank_process(folder: Path, rank: int) -> int:
    """The process id of one rank of the run in `folder/run`."""
    for pid in processes_of(folder):
        variables = (Path("/proc") / str(pid) / "environ").read_bytes().split(b"\0")
        if f"RANK={rank}".encode() in variables:
            return pid
    raise AssertionError(f"rank {rank} does not run")


def parent_of(pid: int) -> int:
    """The process id of a process's parent."""
    return int((Path("/proc") / str(pid) / "stat").read_text().rpartition(")")[2].split()[1])
