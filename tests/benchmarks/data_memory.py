"""Memory of the loader over time: does a long run grow?

    PYTHONPATH=tests/helpers python tests/benchmarks/data_memory.py --minutes 30 [--workers 2]

Reads a set of 200 shards whose pictures are not kept decoded, in windows, with 40,000 captions and a bad sample in
every shard, and prints the resident memory (`VmRSS`) of the training process and of each loader process. Exits with 1
where any process ends above its level after a fifth of the time by more than 5 % and 8 MiB.
"""

from __future__ import annotations

import argparse
import multiprocessing
import re
import sys
import tempfile
import time
from pathlib import Path

from sample_pictures import image
from tiny_shards import plain_samples, write_tar

from evatool.data.train.loader import build_train_loader
from evatool.recipe.schema import TrainDataSection

NUM_SHARDS, PER_SHARD = 200, 200


def write_set(folder: Path) -> None:
    encoded = [image("JPEG", seed=seed) for seed in range(8)]
    for shard in range(NUM_SHARDS):
        samples = plain_samples(range(shard * PER_SHARD, (shard + 1) * PER_SHARD))
        for i, members in enumerate(samples.values()):
            members["png"] = encoded[i % 8] if i else b""
        write_tar(folder / f"{shard:05d}.tar", samples)


def resident_mib(pid: int) -> float:
    found = re.search(r"VmRSS:\s+(\d+) kB", Path(f"/proc/{pid}/status").read_text())
    return int(found[1]) / 1024 if found else 0.0


def main() -> None:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--minutes", type=float, default=30.0)
    parser.add_argument("--workers", type=int, default=2)
    options = parser.parse_args()
    with tempfile.TemporaryDirectory() as folder:
        write_set(Path(folder))
        section = TrainDataSection(
            train=Path(folder) / "*.tar", num_workers=options.workers, window_shards=16, max_bad_fraction=0.02
        )
        loader = build_train_loader(
            section, image_size=64, context_length=77, global_batch_size=256, rank=0, world_size=1, seed=0
        )
        sys.exit(0 if watch(loader, options.minutes * 60) else 1)


def watch(loader, seconds: float) -> bool:  # type: ignore[no-untyped-def]
    start, marks, series = time.monotonic(), 0, []
    for batch in loader:
        elapsed = time.monotonic() - start
        if elapsed >= marks * seconds / 20:
            marks += 1
            pids = [None, *sorted(child.pid for child in multiprocessing.active_children())]
            series.append([resident_mib(pid or multiprocessing.current_process().pid) for pid in pids])
            shown = "  ".join(f"{mib:7.1f}" for mib in series[-1])
            print(f"{elapsed:7.0f} s {batch.position:10d} samples  RSS MiB: {shown}", flush=True)
        if elapsed >= seconds:
            break
    early, late = series[len(series) // 5], series[-1]
    grown = [b - a for a, b in zip(early, late, strict=True)]
    print("grown since a fifth of the time, MiB:", " ".join(f"{g:+.1f}" for g in grown))
    return all(g <= max(0.05 * a, 8.0) for g, a in zip(grown, early, strict=True))


if __name__ == "__main__":
    main()
