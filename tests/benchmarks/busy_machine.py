"""How threads wait for each other, and what that costs on an idle and on a busy machine (docs/train.md#a-busy-machine).

`python tests/benchmarks/busy_machine.py` prints a table: for each setting and each stage, samples a second with nothing
beside it and with two pure-Python loops beside it. The settings take turns, so that a machine that drifts drifts for
all of them; the median of the repeats counts. Losses of a stage must be the same bits under all settings with the same
number of threads. `--size debug --samples 32 --repeats 1` shows in minutes that the script works.
"""

from __future__ import annotations

import argparse
import contextlib
import hashlib
import json
import os
import statistics
import subprocess
import sys
import tempfile
import time
from collections.abc import Iterator
from dataclasses import dataclass
from pathlib import Path

LOOPS = 2
SETTINGS: dict[str, dict[str, str]] = {
    "libgomp's own": {},
    "PASSIVE": {"OMP_WAIT_POLICY": "PASSIVE"},
    "1,000 rounds": {"GOMP_SPINCOUNT": "1000"},
    "10,000 rounds": {"GOMP_SPINCOUNT": "10000"},
    "100,000 rounds": {"GOMP_SPINCOUNT": "100000"},
    "one thread": {"OMP_NUM_THREADS": "1"},
}
STAGES = ("train-clip", "pretrain-mim", "distill", "eval", "B-16")
# evatool's own choice would stand in for libgomp's.
COMMAND = """
import sys
from evatool.core import own_process
own_process.set_thread_waits = lambda env: None
from evatool.cli.app import main
sys.argv[0] = "evatool"
main()
"""
LARGE = """
import hashlib, json, sys, time, torch
from evatool import build_clip, resolve_preset
torch.manual_seed(0)
config = resolve_preset("EVA02-CLIP-B-16")
model, batch, num_steps = build_clip(config), 4, int(sys.argv[1])
images = torch.randn(batch, 3, config.image_size, config.image_size)
texts = torch.randint(1, 40000, (batch, 77))
texts[:, -1] = 49407
losses, seconds = [], []
for _ in range(num_steps + 1):
    start = time.perf_counter()
    features = model.encode_image(images, normalize=True) @ model.encode_text(texts, normalize=True).T
    loss = torch.nn.functional.cross_entropy(100 * features, torch.arange(batch))
    model.zero_grad()
    loss.backward()
    losses.append(loss.item())
    seconds.append(time.perf_counter() - start)
digest = hashlib.sha256(json.dumps(losses).encode()).hexdigest()[:12]
print(json.dumps([batch * num_steps / sum(seconds[1:]), digest]))
"""


@dataclass
class Bench:
    """Where the data and the models are, and how much is run."""

    folder: Path
    size: str
    samples: int

    def path(self, name: str) -> str:
        return json.dumps(str(self.folder / name))

    def prepare(self) -> None:
        """The drawings, and a model to learn from and to evaluate; both stay in the folder."""
        if not (self.folder / "data" / "result.json").exists():
            self.run("data-prepare", f"{self.size}/data-prepare", self.folder / "data", [], {})
        if not (self.folder / "model" / "result.json").exists():
            sets = [f"data.train={self.path('data/train')}", "train.samples_seen=256", "train.global_batch_size=64"]
            sets.append("schedule.warmup_samples=64")
            self.run("train-clip", f"{self.size}/train-clip", self.folder / "model", sets, {})

    def run(self, stage: str, recipe: str, run_dir: Path, sets: list[str], setting: dict[str, str]) -> float:
        """Seconds of a recipe's whole command."""
        return self.command([stage, recipe], run_dir, sets, setting)

    @staticmethod
    def command(command: list[str], run_dir: Path, sets: list[str], setting: dict[str, str]) -> float:
        """Seconds of a whole command."""
        arguments = [*command, "--run-dir", str(run_dir)]
        for each in sets:
            arguments += ["--set", each]
        start = time.perf_counter()
        done = subprocess.run(
            [sys.executable, "-c", COMMAND, *arguments], env=_environment(setting), capture_output=True, text=True
        )
        assert done.returncode == 0, done.stderr[-3000:]
        return time.perf_counter() - start

    def measure(self, stage: str, setting: dict[str, str]) -> tuple[float, str]:
        """Samples a second of a stage, and a digest of its losses (of its results, for eval)."""
        if stage == "B-16":
            steps = str(max(1, self.samples // 64))
            command = [sys.executable, "-c", LARGE, steps]
            done = subprocess.run(command, env=_environment(setting), capture_output=True, text=True)
            assert done.returncode == 0, done.stderr[-3000:]
            speed, digest = json.loads(done.stdout)
            return speed, digest
        with tempfile.TemporaryDirectory(dir=self.folder) as scratch:
            run_dir = Path(scratch) / "run"
            if stage == "eval":
                return self._measure_eval(run_dir, setting)
            teacher = [] if stage == "train-clip" else [f"teacher.model={self.path('model')}"]
            batch = min(256, self.samples // 4)
            sets = [f"data.train={self.path('data/train')}", f"train.samples_seen={self.samples // batch * batch}"]
            sets += [f"train.global_batch_size={batch}", f"schedule.warmup_samples={batch}", "train.log_every=1"]
            self.run(stage, f"{self.size}/{stage}", run_dir, [*sets, *teacher], setting)
            rows = [json.loads(line) for line in (run_dir / "metrics.jsonl").read_text().splitlines()]
            # The first steps warm up; the rest as one stretch of time.
            speeds = [row["throughput/samples_per_sec"] for row in rows[1 + len(rows) // 10 :]]
            return statistics.harmonic_mean(speeds), _digest([row["train/loss"] for row in rows])

    def _measure_eval(self, run_dir: Path, setting: dict[str, str]) -> tuple[float, str]:
        """Evaluations an hour, start included: each has as many images."""
        # Not the recipe, which names three models.
        command = ["eval", str(self.folder / "model"), "--suite", "drawings", "--data", str(self.folder / "data/eval")]
        seconds = self.command(command, run_dir, ["eval.use_cache=false"], setting)
        results = json.loads((run_dir / "results.json").read_text())
        return 3600 / seconds, _digest(results.get("results", results))


def _digest(found: object) -> str:
    return hashlib.sha256(json.dumps(found, sort_keys=True).encode()).hexdigest()[:12]


def _environment(setting: dict[str, str]) -> dict[str, str]:
    ours = {name for each in SETTINGS.values() for name in each}
    return {name: value for name, value in os.environ.items() if name not in ours} | setting


@contextlib.contextmanager
def loops(count: int) -> Iterator[None]:
    """So many other processes that each want a core."""
    running = [subprocess.Popen([sys.executable, "-S", "-c", "while True: pass"]) for _ in range(count)]
    try:
        yield
    finally:
        for process in running:
            process.kill()
            process.wait()


def table(bench: Bench, stages: list[str], names: list[str], repeats: int) -> Iterator[str]:
    """One row a stage and setting, as each stage is done."""
    yield "| stage | threads wait | idle, samples/s | busy | busy / idle | losses |"
    yield "| --- | --- | --- | --- | --- | --- |"
    for stage in stages:
        speeds: dict[tuple[str, int], list[float]] = {}
        digests: dict[str, set[str]] = {}
        for _ in range(repeats):
            for count in (0, LOOPS):
                for name in names:
                    with loops(count):
                        speed, digest = bench.measure(stage, SETTINGS[name])
                    speeds.setdefault((name, count), []).append(speed)
                    digests.setdefault(name, set()).add(digest)
        same_threads = set().union(*(found for name, found in digests.items() if name != "one thread"))
        assert stage == "eval" or len(same_threads) <= 1, f"{stage}: losses differ: {digests}"
        unit = " (an hour)" if stage == "eval" else ""
        for name in names:
            idle, busy = (statistics.median(speeds[name, count]) for count in (0, LOOPS))
            found = ", ".join(sorted(digests[name]))
            yield f"| {stage}{unit} | {name} | {idle:.4g} | {busy:.4g} | {busy / idle:.2f} | {found} |"


def main() -> None:
    """Print the table of the chosen stages and settings."""
    parser = argparse.ArgumentParser(description=__doc__, formatter_class=argparse.RawDescriptionHelpFormatter)
    parser.add_argument("--folder", type=Path, help="keeps data and model between calls; a temporary one when absent")
    parser.add_argument("--size", choices=["demo", "debug"], default="demo")
    parser.add_argument("--samples", type=int, default=8192, help="of a training run; B-16 takes one step for each 64")
    parser.add_argument("--repeats", type=int, default=3)
    parser.add_argument("--stages", nargs="+", choices=STAGES, default=list(STAGES))
    parser.add_argument("--settings", nargs="+", choices=list(SETTINGS), default=list(SETTINGS))
    given = parser.parse_args()
    with contextlib.ExitStack() as stack:
        folder = given.folder or Path(stack.enter_context(tempfile.TemporaryDirectory()))
        folder.mkdir(parents=True, exist_ok=True)
        bench = Bench(folder.resolve(), given.size, given.samples)
        bench.prepare()
        for line in table(bench, given.stages, given.settings, given.repeats):
            print(line, flush=True)


if __name__ == "__main__":
    main()
