"""kill -9 at random moments of every stage, each followed by a resume and compared with an uninterrupted run.

    python tests/benchmarks/random_kills.py --kills 200 --out kills

A kill strikes at any moment from the command's first line to its end, start-up included; of two ranks one dies, or
both. What survives must end by itself; the same command with --resume (data-prepare's and export's too) must then end
as if nothing had happened: the same weights, moments and metrics, results, and bytes of files. One resume in three is
killed as well. Totals are printed at the end; `--out` keeps the runs that differ, and is where the same command goes on
after it was interrupted. Models are shrunk (tests/helpers/short_runs.py), so a kill takes some ten seconds on two
cores. Rows R3, R4, R10 and R24 of docs/faults.md.
"""

from __future__ import annotations

import argparse
import hashlib
import json
import os
import random
import shutil
import signal
import socket
import sys
import time
from collections import Counter
from collections.abc import Callable, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

sys.path.insert(0, str(Path(__file__).resolve().parents[1] / "helpers"))

import short_runs

PATIENCE_SEC = 240.0
"""Longest wait for a run to end, and for the survivors of a kill to notice it."""
SURVIVORS_SEC = 120.0
JOIN_SEC, TERM_SEC = 30.0, 5.0
TRAINING = ("train-clip", "pretrain-mim", "distill")
# Of a run folder, what tells of the run and is not made by it.
_ABOUT = {"status.json", "environment.json", "resolved.toml", "result.json", "logs", "lease.json"}


@dataclass(frozen=True)
class Cell:
    """A stage on a number of ranks."""

    stage: str
    world_size: int

    @property
    def name(self) -> str:
        return f"{self.stage}-{self.world_size}"

    def command(self) -> list[str]:
        """Without the run folder; paths are relative to the work folder."""
        match self.stage:
            case "data-prepare":
                return ["data-prepare", *short_runs.DATA_PREPARE, "--set", "shards.samples_per_shard=16"]
            case "export":
                return ["export", "teacher", "--to", "open_clip"]
            case "eval":
                return [
                    "eval",
                    "teacher",
                    "--suite",
                    "drawings",
                    "--data",
                    "data/eval",
                    "--set",
                    "eval.use_cache=false",
                ]
            case _:
                return [self.stage, f"{self.stage}.toml", "--set", "checkpoint.every_steps=3"]

    def made(self, run_dir: Path) -> Any:
        """What the finished run has made, as values that are equal for equal runs."""
        if self.stage in TRAINING:
            return short_runs.contents_of(run_dir), short_runs.records_of(run_dir)
        files = sorted(
            path
            for path in run_dir.rglob("*")
            if path.is_file() and path.relative_to(run_dir).parts[0] not in _ABOUT and not path.name.startswith(".")
        )
        if self.stage == "eval":  # pages and charts hold times
            results = _timeless(json.loads((run_dir / "results.json").read_text()))
            files = [path for path in files if path.suffix == ".npz"]
            assert files, "predictions are kept"
            return results, {path.name: _answers(path) for path in files}
        own = str(run_dir).encode()  # a model card says how to load it from where it is
        return {
            str(path.relative_to(run_dir)): hashlib.sha256(path.read_bytes().replace(own, b"")).hexdigest()
            for path in files
        }


CELLS = [
    *(Cell(stage, ranks) for stage in (*TRAINING, "eval") for ranks in (1, 2)),
    *(Cell(stage, 1) for stage in ("export", "data-prepare")),
]


def _answers(path: Path) -> dict[str, str]:
    """Digests of a set's kept answers; what is told of them holds the seconds that they took."""
    import numpy as np

    with np.load(path) as stored:
        digests = {name: hashlib.sha256(stored[name].tobytes()).hexdigest() for name in stored.files if name != "meta"}
        return digests | {"meta": json.dumps(_timeless(json.loads(stored["meta"].tobytes())))}


def _timeless(value: Any) -> Any:
    """A table of results without what differs between two equal runs: times and paths of the run."""
    if isinstance(value, dict):
        dropped = ("sec", "time", "date", "created", "started", "run_dir", "speed")
        return {k: _timeless(v) for k, v in value.items() if not any(word in k for word in dropped)}
    return [_timeless(each) for each in value] if isinstance(value, list) else value


# ----------------------------------------------------------------------------------------------------------- runs


class Run:
    """A command under way on its ranks, forked from this process, which has imported torch for all of them."""

    def __init__(self, cell: Cell, arguments: Sequence[str], folder: Path) -> None:
        with socket.socket() as free:
            free.bind(("127.0.0.1", 0))
            port = free.getsockname()[1]
        self.started = time.monotonic()
        self.codes: dict[int, int] = {}
        self.pids = [self._start(cell, rank, port, arguments, folder) for rank in range(cell.world_size)]

    @staticmethod
    def _start(cell: Cell, rank: int, port: int, arguments: Sequence[str], folder: Path) -> int:
        pid = os.fork()
        if pid:
            return pid
        try:
            os.chdir(folder)
            said = os.open(f"{arguments[-1]}.{rank}.txt", os.O_WRONLY | os.O_CREAT | os.O_APPEND)
            os.dup2(said, 1)
            os.dup2(said, 2)
            if cell.world_size > 1:
                job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": cell.world_size, "MASTER_PORT": port}
                os.environ |= {key: str(value) for key, value in job.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(short_runs._run_shrunk(arguments, _one_thread))
        finally:
            os._exit(1)

    def wait(self, seconds: float, *, kills: bool = True) -> bool:
        """True once all ranks have ended; False where some have not after so long, which are killed then."""
        end = time.monotonic() + seconds
        while len(self.codes) < len(self.pids):
            self._collect()
            if time.monotonic() > end:
                if kills:
                    self.kill(self.pids)
                return False
            time.sleep(0.02)
        return True

    def end_after_kill(self, folder: Path, name: str) -> bool:
        """True once the survivors of a kill have ended.

        One that waits for a rank that was killed before it joined waits for ten minutes, and says so, since no launcher
        tells it: then this is the launcher, whose SIGTERM must end it at once.
        """
        if self.wait(JOIN_SEC, kills=False):
            return True
        said = "".join(path.read_text().rstrip()[-200:] for path in folder.glob(f"{name}.*.txt"))
        if "to join the job" not in said:
            return self.wait(SURVIVORS_SEC)
        for pid in self.pids:
            if pid not in self.codes:
                os.kill(pid, signal.SIGTERM)
        return self.wait(TERM_SEC)

    def _collect(self) -> None:
        for pid in self.pids:
            if pid not in self.codes:
                found, status = os.waitpid(pid, os.WNOHANG)
                if found:
                    self.codes[pid] = os.waitstatus_to_exitcode(status)

    def kill(self, pids: Sequence[int]) -> bool:
        """kill -9; False where all of them had ended already."""
        self._collect()
        alive = [pid for pid in pids if pid not in self.codes]
        for pid in alive:
            os.kill(pid, signal.SIGKILL)
        return bool(alive)

    @property
    def is_done(self) -> bool:
        return all(code == 0 for code in self.codes.values())


def _one_thread() -> None:
    import torch

    torch.set_num_threads(1)


def _whole(cell: Cell, folder: Path, name: str, more: Sequence[str] = ()) -> float:
    """A run from start to end; returns its seconds."""
    run = Run(cell, [*cell.command(), *more, "--run-dir", name], folder)
    ended = run.wait(PATIENCE_SEC)
    said = (folder / f"{name}.0.txt").read_text()[-2000:]
    assert ended, f"{cell.name} did not end:\n{said}"
    assert run.is_done, f"{cell.name} ended with {run.codes}:\n{said}"
    return time.monotonic() - run.started


# ---------------------------------------------------------------------------------------------------------- kills


def one_kill(cell: Cell, folder: Path, name: str, seconds: float, pick: random.Random) -> str:
    """Kill a run, resume it to its end, compare; returns "equal", "stuck", "failed" or "different".

    Args:
        seconds: that the uninterrupted run takes.
    """
    shutil.rmtree(folder / name, ignore_errors=True)
    arguments = [*cell.command(), "--run-dir", name]
    again = [*cell.command(), "--resume", "--run-dir", name]
    run = Run(cell, arguments, folder)
    for _ in range(2):
        time.sleep(pick.uniform(0, seconds))
        run.kill(pick.choice([run.pids, pick.sample(run.pids, 1)]))
        if not run.end_after_kill(folder, name):
            return "stuck"
        run = Run(cell, again, folder)
        if pick.random() < 2 / 3:
            break
    if not run.wait(PATIENCE_SEC):
        return "stuck"
    if not run.is_done:
        return "failed"
    return "equal" if cell.made(folder / name) == cell.made(folder / f"whole-{cell.name}") else "different"


def random_kills(
    kills: int, folder: Path, seed: int = 0, cells: Sequence[Cell] = CELLS, say: Callable[[str], None] = print
) -> Counter[str]:
    """The outcomes of `kills` kills, dealt over the cells in turn; those that stand in `folder` are not repeated."""
    folder.mkdir(parents=True, exist_ok=True)
    record = folder / "kills.jsonl"
    known = [json.loads(line) for line in record.read_text().splitlines()] if record.exists() else []
    seconds = _baselines(cells, folder)
    for number in range(len(known), kills):
        cell, name = cells[number % len(cells)], f"kill{number:04d}"
        outcome = one_kill(cell, folder, name, seconds[cell.name], random.Random(f"{seed}:{number}"))
        known.append({"number": number, "cell": cell.name, "outcome": outcome})
        with record.open("a") as file:
            file.write(json.dumps(known[-1]) + "\n")
        say(f"{number + 1}/{kills}  {cell.name}  {outcome}")
        if outcome == "equal":
            shutil.rmtree(folder / name)
            for log in folder.glob(f"{name}.*.txt"):
                log.unlink()
    return Counter(line["outcome"] for line in known[:kills])


def _baselines(cells: Sequence[Cell], folder: Path) -> dict[str, float]:
    """The uninterrupted runs, and the data and the model that they need; seconds by cell."""
    file = folder / "seconds.json"
    seconds: dict[str, float] = json.loads(file.read_text()) if file.exists() else {}
    for stage in TRAINING:
        short_runs.write_recipe(stage, folder)
    steps = [("data", Cell("data-prepare", 1)), ("teacher", None), *((f"whole-{cell.name}", cell) for cell in cells)]
    for name, cell in steps:
        key = cell.name if cell is not None and name.startswith("whole-") else name
        if key in seconds:
            continue
        shutil.rmtree(folder / name, ignore_errors=True)
        seconds[key] = _whole(cell or Cell("train-clip", 1), folder, name)
        file.write_text(json.dumps(seconds))
    return seconds


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--kills", type=int, default=200)
    parser.add_argument("--out", type=Path, default=Path("random-kills"))
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--cells", nargs="*", help=f"of {' '.join(cell.name for cell in CELLS)}")
    given = parser.parse_args()
    preload()
    cells = [cell for cell in CELLS if not given.cells or cell.name in given.cells]
    found = random_kills(given.kills, given.out.resolve(), given.seed, cells, lambda line: print(line, flush=True))
    bad = {name: count for name, count in found.items() if name != "equal"}
    print(
        f"{sum(found.values())} kills: {found['stuck']} stuck, {found['different']} different, {found['failed']} failed"
    )
    sys.exit(1 if bad else 0)


def preload() -> None:
    """Import once what all runs need; no backward pass may run here, since its threads do not survive a fork."""
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu", "XDG_CACHE_HOME": "", "GOMP_SPINCOUNT": "10000"}
    import matplotlib.figure
    import open_clip
    import torch

    import evatool.cli.app
    import evatool.stages.eval
    import evatool.stages.train_clip

    assert all((matplotlib.figure, open_clip, torch, evatool.cli.app, evatool.stages))
    torch.set_num_threads(1)


if __name__ == "__main__":
    main()
