"""Growth of the memory of loader processes over time.

`python tests/benchmarks/data_memory.py [--minutes M] [--workers N] [--json FILE]`. The training loader runs over tars
of JPEGs with 8,000 captions of 20,000 made-up words; the private memory of its processes is shown. Growth is that from
the median of the second quarter of the run to that of its last quarter.
"""

from __future__ import annotations

import argparse
import os
import random
import statistics
import tempfile
import time
from pathlib import Path
from typing import Any

from data_decode import BATCH, CONTEXT_LENGTH, IMAGE_SIZE, make_jpegs
from side_by_side import finish, machine, versions

SAMPLES, SHARDS, VOCABULARY = 2000, 4, 20_000
MOST_GROWTH = 0.05


def write_tars(folder: Path) -> None:
    """Tars with captions of random words."""
    import webdataset

    rng = random.Random(0)
    jpegs = list(make_jpegs(384, 288, 64))
    words = ["".join(rng.choices("abcdefghijklmnopqrstuvwxyzäöüéñ", k=rng.randrange(2, 10))) for _ in range(VOCABULARY)]
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for i in range(SAMPLES):
                caption = " ".join(rng.choices(words, k=10))
                tar.write({"__key__": f"{i:06d}", "jpg": rng.choice(jpegs), "txt": caption.encode()})


def private_bytes(process: int) -> int:
    """Memory of a process that it shares with no other."""
    lines = Path(f"/proc/{process}/smaps_rollup").read_text().splitlines()
    return sum(1024 * int(line.split()[1]) for line in lines if line.startswith("Private_"))


def children() -> list[int]:
    """Processes that this one has started."""
    tasks = Path("/proc/self/task")
    return [int(p) for task in tasks.iterdir() for p in (task / "children").read_text().split()]


def measure(folder: Path, minutes: float, workers: int) -> dict[str, Any]:
    """MiB of this process and of the mean worker over time, and batches read."""
    from evatool.data.loader import build_train_loader
    from evatool.recipe.schema import TrainDataSection

    loader = build_train_loader(
        TrainDataSection(train=folder / "*.tar", num_workers=workers),
        image_size=IMAGE_SIZE,
        context_length=CONTEXT_LENGTH,
        global_batch_size=BATCH,
        rank=0,
        world_size=1,
        seed=0,
    )
    found: dict[str, list[float]] = {"seconds": [], "main": [], "worker": []}
    start, every = time.monotonic(), max(1.0, minutes)  # sixty times a run
    num_batches = 0
    for _ in loader:
        num_batches += 1
        elapsed = time.monotonic() - start
        if elapsed >= every * (len(found["seconds"]) + 1):
            started = children()
            found["seconds"].append(round(elapsed, 1))
            found["main"].append(own_bytes() / 2**20)
            found["worker"].append(sum(map(private_bytes, started)) / max(1, len(started)) / 2**20)
        if elapsed > 60 * minutes:
            break
    return {"batches": num_batches, **found}


def own_bytes() -> int:
    """Private memory of this process."""
    return private_bytes(os.getpid())


def growth(series: list[float]) -> float:
    """Share by which the last quarter lies above the second."""
    quarter = len(series) // 4
    before, after = series[quarter : 2 * quarter], series[-quarter:]
    return statistics.median(after) / statistics.median(before) - 1 if quarter and min(before) > 0 else 0.0


def main() -> None:
    """Print memory over time and its growth."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30)
    parser.add_argument("--workers", type=int, default=1)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_tars(Path(folder))
        found = measure(Path(folder), options.minutes, options.workers)
    shown = range(0, len(found["seconds"]), max(1, len(found["seconds"]) // 12))
    for i in shown:
        print(f"{found['seconds'][i]:7.0f} s  main {found['main'][i]:7.1f} MiB  worker {found['worker'][i]:7.1f} MiB")
    grown = {side: growth(found[side]) for side in ("main", "worker")}
    print(f"{found['batches']} batches of {BATCH}; growth: main {grown['main']:+.1%}, worker {grown['worker']:+.1%}")
    report = {"machine": machine(), "versions": versions(), **found, "growth": grown}
    failures = [f"{side} grew by {share:.1%}" for side, share in grown.items() if share > MOST_GROWTH]
    if len(found["seconds"]) < 8:
        failures.append("too short to judge")
    finish(report, failures, options.json)


if __name__ == "__main__":
    main()
