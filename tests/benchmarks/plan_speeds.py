"""Published speeds of CLIP training, and how well one formula fitted to the others foretells each.

python tests/benchmarks/plan_speeds.py
"""

from __future__ import annotations

import statistics
from dataclasses import dataclass

import numpy as np

A100_TFLOPS = 312.0
# Forward GMAC of one picture and one caption: LAION-AI/scaling-laws-openclip, arch_info.csv.
GMACS = {"B/32": 7.40, "B/16": 20.57, "L/14": 87.73, "H/14": 190.97, "g/14": 290.74}


@dataclass(frozen=True)
class Speed:
    """One run on A100: architecture, GPUs, samples of one GPU and step, samples a second of all."""

    arch: str
    gpus: int
    local_batch: int
    samples_per_sec: float

    @property
    def mfu(self) -> float:
        """Share of the peak, at three forward passes a sample."""
        return 3 * 2e9 * GMACS[self.arch] * self.samples_per_sec / (self.gpus * A100_TFLOPS * 1e12)


# LAION-AI/scaling-laws-openclip, trained_models_info.csv: 29 runs, in its order.
RUNS = [
    Speed("B/32", 128, 672, 52724.0),
    Speed("L/14", 768, 112, 60327.9),
    Speed("L/14", 1024, 84, 79116.3),
    Speed("L/14", 1024, 84, 67928.5),
    Speed("B/32", 128, 256, 93294.3),
    Speed("B/32", 128, 256, 108844.6),
    Speed("B/32", 128, 256, 108844.6),
    Speed("B/16", 344, 256, 134239.8),
    Speed("B/32", 344, 256, 218174.3),
    Speed("B/32", 344, 256, 219759.0),
    Speed("B/16", 344, 256, 136370.9),
    Speed("B/16", 176, 512, 54580.6),
    Speed("B/16", 176, 512, 50927.6),
    Speed("B/16", 344, 256, 128758.1),
    Speed("L/14", 396, 224, 40026.6),
    Speed("L/14", 396, 224, 39913.2),
    Speed("B/16", 344, 256, 78356.1),
    Speed("B/16", 176, 512, 64314.4),
    Speed("B/32", 128, 256, 108844.6),
    Speed("L/14", 200, 448, 35524.8),
    Speed("L/14", 396, 224, 38878.7),
    Speed("L/14", 384, 224, 27861.9),
    Speed("B/32", 824, 96, 187872.0),
    Speed("B/16", 176, 192, 59356.0),
    Speed("H/14", 824, 96, 34608.0),
    Speed("g/14", 800, 80, 24800.0),
    Speed("B/32", 344, 256, 99289.4),
    Speed("B/16", 344, 256, 136146.7),
    Speed("L/14", 400, 224, 41970.1),
]


def left_out(run: Speed) -> float:
    """MFU foretold from the runs that differ in architecture, GPUs or batch: log-linear in work, GPUs and batch."""
    same = (run.arch, run.gpus, run.local_batch)
    others = [each for each in RUNS if (each.arch, each.gpus, each.local_batch) != same]
    fit, *_ = np.linalg.lstsq(np.array([_row(each) for each in others]), np.log([each.mfu for each in others]))
    return float(np.exp(np.array(_row(run)) @ fit))


def _row(run: Speed) -> list[float]:
    return [1.0, np.log(GMACS[run.arch]), np.log(run.gpus), np.log(run.local_batch)]


def median_error() -> float:
    """Of the time a run takes."""
    return statistics.median(abs(run.mfu / left_out(run) - 1) for run in RUNS)


def speeds_table() -> str:
    """Markdown: each architecture, and all of them."""
    lines = ["| model | runs | MFU | median error of the time, left out | largest |", "| --- | --- | --- | --- | --- |"]
    for arch in [*GMACS, "all"]:
        runs = [run for run in RUNS if arch in (run.arch, "all")]
        errors = [abs(run.mfu / left_out(run) - 1) for run in runs]
        spread = f"{min(run.mfu for run in runs):.0%} to {max(run.mfu for run in runs):.0%}"
        lines.append(f"| {arch} | {len(runs)} | {spread} | {statistics.median(errors):.0%} | {max(errors):.0%} |")
    return "\n".join(lines)


if __name__ == "__main__":
    print(speeds_table())
