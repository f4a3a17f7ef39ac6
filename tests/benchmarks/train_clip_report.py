"""What `train_clip.py` leaves behind: a table, the exact commands, and both loss traces over each other."""

from __future__ import annotations

import json
import os
import platform
import shutil
import statistics
import subprocess
from collections.abc import Sequence
from dataclasses import dataclass
from importlib import metadata
from pathlib import Path
from typing import Any

PACKAGES = ("torch", "timm", "open_clip_torch", "webdataset", "numpy", "pillow")
Trace = Sequence[tuple[int, float]]


@dataclass
class Run:
    """What one run of a trainer came to."""

    samples_per_sec: float
    losses: list[tuple[int, float]]
    peak_bytes: int
    command: str


def describe(baseline_python: Path) -> dict[str, str]:
    """Machine and versions of both environments, printed and handed back."""
    code = f"from importlib.metadata import version as v; print(*(f'{{n}} {{v(n)}}' for n in {PACKAGES}), sep=', ')"
    found = {
        "machine": f"{_processor()}, {os.cpu_count()} cores",
        "baseline": subprocess.check_output([baseline_python, "-c", code], text=True).strip(),
        "evatool": ", ".join(f"{name} {metadata.version(name)}" for name in PACKAGES),
    }
    for name, value in found.items():
        print(f"{name}: {value}")
    return found


def _processor() -> str:
    if shutil.which("nvidia-smi"):
        return subprocess.check_output(["nvidia-smi", "--query-gpu=name", "--format=csv,noheader"], text=True).strip()
    lines = Path("/proc/cpuinfo").read_text().splitlines() if Path("/proc/cpuinfo").exists() else []
    names = [line.partition(":")[2].strip() for line in lines if line.startswith("model name")]
    return names[0] if names else platform.machine()


def summary(runs: Sequence[Run]) -> dict[str, Any]:
    """Median, spread, most memory of one process, and command of one trainer's runs."""
    speeds = sorted(run.samples_per_sec for run in runs)
    return {
        "samples_per_sec": round(statistics.median(speeds), 1),
        "runs": [round(speed, 1) for speed in speeds],
        "peak_mib": round(max(run.peak_bytes for run in runs) / 2**20),
        "command": runs[0].command,
    }


def write_report(folder: Path, result: dict[str, Any], traces: dict[str, dict[str, Trace]]) -> None:
    """`result.json`, `result.md` and `losses.png`; the table is printed too.

    Args:
        result: `open_clip_train` and `evatool` from `summary`, `ratio`, and what else is to be kept.
        traces: title -> trainer -> (step, loss).
    """
    (folder / "result.json").write_text(json.dumps(result | {"traces": traces}, indent=1))
    rows = ["| trainer | samples/s, runs | median | peak of a process |", "|---|---|---|---|"]
    for name in ("open_clip_train", "evatool"):
        side = result[name]
        runs = ", ".join(map(str, side["runs"]))
        rows.append(f"| {name}, {side['settings']} | {runs} | {side['samples_per_sec']} | {side['peak_mib']} MiB |")
    lines = [*rows, "", f"evatool / open_clip_train: {result['ratio']:.2f}x", ""]
    lines += [f"{name}: {result[name]}" for name in ("machine",)]
    lines += [f"{name}'s packages: {result['packages'][name]}" for name in ("baseline", "evatool")]
    lines += ["", "Baseline's settings searched, samples/s:", ""]
    lines += [f"- {setting}: {speed:.1f}" for setting, speed in result["search"].items()]
    lines += ["", "Commands:", ""]
    lines += [f"    {result[name]['command']}\n" for name in ("open_clip_train", "evatool")]
    (folder / "result.md").write_text("\n".join(lines) + "\n")
    draw_traces(folder / "losses.png", traces)
    print("\n".join(lines[: len(rows) + 2]))
    print(f"written: {folder / 'result.md'}, result.json, losses.png")


def draw_traces(path: Path, traces: dict[str, dict[str, Trace]]) -> None:
    """One panel a comparison, both trainers in it."""
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure

    figure = Figure(figsize=(5.5 * len(traces), 4), dpi=120, facecolor="white", layout="constrained")
    panels = figure.subplots(1, len(traces), squeeze=False)[0]
    for axes, (title, sides) in zip(panels, traces.items(), strict=True):
        for (name, trace), style in zip(sides.items(), ("-", "--"), strict=False):
            axes.plot([step for step, _ in trace], [loss for _, loss in trace], style, linewidth=2, label=name)
        axes.set_title(title, loc="left")
        axes.set_xlabel("step")
        axes.set_ylabel("loss")
        axes.grid(color="0.9")
        axes.spines[["top", "right"]].set_visible(False)
        axes.legend(frameon=False)
    FigureCanvasAgg(figure).print_png(path)
