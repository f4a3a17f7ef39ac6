"""How long training waits for a checkpoint: written on the spot, and in the background as `train-clip` does.

`python tests/benchmarks/checkpoint_saves.py [MB]`, 91 (the demo's CLIP with its moments) when absent; on an idle
machine. The first copy in the background is slower than those after, which find their memory.
"""

from __future__ import annotations

import statistics
import sys
import tempfile
import time
from functools import partial
from pathlib import Path
from typing import Any

import torch

from evatool.checkpoint.save import save_run
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.train.hooks.checkpoint import BackgroundWriter

RUNS, TENSORS = 9, 60


def main() -> None:
    """Print the medians, one line each."""
    size = int(sys.argv[1]) if len(sys.argv) > 1 else 91
    weights = {f"model.w{i}": torch.randn(size * 1_000_000 // 12 // TENSORS) for i in range(TENSORS)}
    moments = {f"{m}.{k}": torch.randn_like(v) for m in ("exp_avg", "exp_avg_sq") for k, v in weights.items()}
    rest: dict[str, Any] = {"groups": [], "train_state": {}}
    on_the_spot, blocked, whole = [], [], []
    with tempfile.TemporaryDirectory(dir=Path.cwd()) as folder:
        save = partial(save_run, Path(folder), model_config={}, resolved_toml="", keep=2)
        writer = BackgroundWriter(save)
        for run in range(RUNS):
            states = {"objective_state": ShardedState.whole(weights), "optimizer_state": ShardedState.whole(moments)}
            start = time.perf_counter()
            save(2 * run, **states, **rest)
            on_the_spot.append(time.perf_counter() - start)
            start = time.perf_counter()
            writer.start(step=2 * run + 1, **states, **rest)
            blocked.append(time.perf_counter() - start)
            writer.wait()
            whole.append(time.perf_counter() - start)
    print(f"{size} MB, median of {RUNS}")
    print(f"written on the spot: {statistics.median(on_the_spot):.3f} s")
    print(f"in the background:   {statistics.median(blocked):.3f} s of waiting (the first {blocked[0]:.3f} s), on the")
    print(f"                     disk after {statistics.median(whole):.3f} s")


if __name__ == "__main__":
    main()
