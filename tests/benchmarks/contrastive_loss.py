"""Time and extra memory of the tiled losses against open_clip's dense `ClipLoss`, forward and backward.

`python tests/benchmarks/contrastive_loss.py [N ...]`, 8192 when no batch is named; on an idle machine, best of 3 (one
alone above 16,384 on a CPU, where it takes minutes). `largest` in the place of N doubles 8192 as long as there is room
for the dense loss, whose memory grows with N squared. Extra memory is the peak above features, model and libraries:
what the loss holds, gradients of the features included.
"""

from __future__ import annotations

import gc
import subprocess
import sys
import time
from collections.abc import Callable
from pathlib import Path

import torch
import torch.nn.functional as F
from open_clip.loss import ClipLoss
from torch import Tensor

from evatool.objective.tiled.infonce import infonce_loss
from evatool.objective.tiled.sigmoid import sigmoid_loss

WIDTH, RUNS = 768, 3
Loss = Callable[[Tensor, Tensor, Tensor], Tensor]
LOSSES: dict[str, Loss] = {
    "open_clip ClipLoss": ClipLoss(),
    "evatool infonce": lambda image, text, scale: infonce_loss(image, text, scale)[0],
    "evatool sigmoid": lambda image, text, scale: sigmoid_loss(image, text, scale, torch.tensor(-10.0).to(image))[0],
}


def resident_bytes(key: str) -> int:
    """`VmRSS` (now) or `VmHWM` (the peak) of this process."""
    line = next(x for x in Path("/proc/self/status").read_text().splitlines() if x.startswith(f"{key}:"))
    return 1024 * int(line.split()[1])


def measure(name: str, size: int) -> tuple[float, float]:
    """Extra bytes and seconds of one loss in this process."""
    device = "cuda" if torch.cuda.is_available() else "cpu"
    features = F.normalize(torch.randn(2, size, WIDTH, device=device), dim=-1)
    scale = torch.tensor(14.0, device=device, requires_grad=True)
    small = F.normalize(torch.randn(2, 64, WIDTH, device=device), dim=-1)
    LOSSES[name](*(x.clone().requires_grad_() for x in small), scale).backward()  # loads the libraries
    image, text = (x.clone().requires_grad_() for x in features)
    seconds, extra = [], 0
    for run in range(RUNS if size <= 16_384 or device == "cuda" else 1):
        image.grad = text.grad = scale.grad = None
        gc.collect()
        if device == "cuda":
            torch.cuda.reset_peak_memory_stats()
            before = torch.cuda.memory_allocated()
        else:
            before = resident_bytes("VmRSS")
        start = time.perf_counter()
        LOSSES[name](image, text, scale).backward()
        if device == "cuda":
            torch.cuda.synchronize()
        seconds.append(time.perf_counter() - start)
        if run == 0:  # later runs find pages that the first has left behind
            extra = (torch.cuda.max_memory_allocated() if device == "cuda" else resident_bytes("VmHWM")) - before
    return extra, min(seconds)


def main() -> None:
    """Print one row a loss and batch."""
    if len(sys.argv) == 4 and sys.argv[1] == "--one":
        print(*measure(sys.argv[2], int(sys.argv[3])))
        return
    for argument in sys.argv[1:] or ["8192"]:
        size = 8192 if argument == "largest" else int(argument)
        needed = compare(size)
        while argument == "largest" and 4 * needed < 0.9 * free_bytes():
            size *= 2
            needed = compare(size)


def compare(size: int) -> float:
    """Print a row for each loss, each measured in a process of its own; the extra bytes of the dense one."""
    baseline = None
    for name in LOSSES:
        command = [sys.executable, __file__, "--one", name, str(size)]
        extra, seconds = map(float, subprocess.check_output(command, text=True).split())
        baseline = baseline or (extra, seconds)
        print(
            f"N = {size:6d}  {name:20s} {extra / 2**20:8.0f} MiB (1/{baseline[0] / extra:.1f})"
            f" {seconds:7.2f} s ({baseline[1] / seconds:.2f}x)",
            flush=True,
        )
    assert baseline is not None
    return baseline[0]


def free_bytes() -> int:
    """Memory that is left where the losses run."""
    if torch.cuda.is_available():
        return torch.cuda.mem_get_info()[0]
    line = next(x for x in Path("/proc/meminfo").read_text().splitlines() if x.startswith("MemAvailable:"))
    return 1024 * int(line.split()[1])


if __name__ == "__main__":
    main()
