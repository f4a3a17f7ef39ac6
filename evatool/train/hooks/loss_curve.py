"""A picture of the loss over the run."""

from __future__ import annotations

import io
import time
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.disk import can_wait
from evatool.distributed.collectives import rank
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook
from evatool.train.hooks.log import read_metrics

INK, FAINT, ACCENT, GRID = "#1f2933", "#9fb3c8", "#0b6e99", "#e4e7eb"


class LossCurve(Hook):
    """Draws `metrics.jsonl` as a PNG while the run goes, and when it stops or ends.

    Args:
        metrics: the file that `MetricsFile` writes, listed before this hook.
        image: the PNG to write.
        title: above the curve.
        reference: a value to mark and its label, for instance (6.24, "ln(batch)").
        every_sec: on the first logging step after so long it is drawn anew; it takes a second.
    """

    def __init__(
        self,
        metrics: Path,
        image: Path,
        title: str,
        reference: tuple[float, str] | None = None,
        every_sec: float = 120.0,
    ) -> None:
        self._metrics, self._image, self._title, self._reference = metrics, image, title, reference
        self._every_sec, self._last = every_sec, time.monotonic()

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        if result.is_logged and time.monotonic() - self._last >= self._every_sec:
            with can_wait("the loss curve"):
                self._draw()
            self._last = time.monotonic()

    def on_stop(self, trainer: TrainerControl) -> None:
        with can_wait("the loss curve"):
            self._draw()

    def at_end(self, trainer: TrainerControl) -> None:
        self._draw()

    def _draw(self) -> None:
        if rank() == 0 and self._metrics.exists():
            draw_loss_curve(read_metrics(self._metrics), self._image, self._title, self._reference)


def draw_loss_curve(
    records: list[dict[str, Any]], image: Path, title: str, reference: tuple[float, str] | None = None
) -> None:
    """Write a PNG of `train/loss` over `samples_seen`, as recorded and smoothed, with the learning rate below it.

    Evaluations while training, where there are any, stand between the two.
    """
    # The object interface of matplotlib: no global state, no display, and no backend is chosen for the host program.
    from matplotlib.backends.backend_agg import FigureCanvasAgg
    from matplotlib.figure import Figure
    from matplotlib.ticker import EngFormatter

    evaluated = sorted({key for r in records for key in r if key.startswith("eval/")})
    heights = [4, 2, 1] if evaluated else [4, 1]
    figure = Figure(figsize=(8, 7 if evaluated else 5), dpi=120, facecolor="white", layout="constrained")
    every = figure.subplots(len(heights), 1, sharex=True, gridspec_kw={"height_ratios": heights})
    top, bottom = every[0], every[-1]
    for key in evaluated:
        points = [(r["samples_seen"], r[key]) for r in records if r.get(key) is not None]
        every[1].plot([p[0] for p in points], [p[1] for p in points], marker=".", label=key.removeprefix("eval/"))
    if evaluated:
        every[1].set_ylabel("zero-shot", color=INK)
        every[1].legend(frameon=False, fontsize=8)
    points = [(r["samples_seen"], r["train/loss"]) for r in records if r.get("train/loss") is not None]
    samples, losses = [p[0] for p in points], [p[1] for p in points]
    top.plot(samples, losses, color=FAINT, linewidth=1, label="as recorded")
    top.plot(samples, smoothed(losses), color=ACCENT, linewidth=2, label="smoothed")
    if reference is not None:
        top.axhline(reference[0], color=INK, linewidth=1, linestyle=":", label=f"{reference[1]} = {reference[0]:.2f}")
    top.set_title(title, loc="left", color=INK, fontsize=13, fontweight="bold")
    top.set_ylabel("train loss", color=INK)
    top.legend(edgecolor="none", loc="upper right")
    for key in sorted({key for r in records for key in r if key.startswith("optim/lr/")}):
        with_key = [r for r in records if key in r]
        bottom.plot([r["samples_seen"] for r in with_key], [r[key] for r in with_key], label=key.rpartition("/")[2])
    bottom.set_ylabel("lr", color=INK)
    bottom.set_xlabel("samples seen", color=INK)
    bottom.set_ylim(bottom=0)
    if bottom.lines:
        bottom.legend(frameon=False, fontsize=8, loc="upper right")
    bottom.xaxis.set_major_formatter(EngFormatter(sep=""))
    for axes in every:
        axes.grid(color=GRID)
        axes.set_axisbelow(True)
        axes.spines[["top", "right"]].set_visible(False)
    png = io.BytesIO()
    FigureCanvasAgg(figure).print_png(png)
    write_bytes_atomically(image, png.getvalue())


def smoothed(values: list[float], share: float = 0.05) -> list[float]:
    """Mean over about `share` of all points around each, over fewer at both ends."""
    reach = int(share * len(values) / 2)
    windows = (values[max(0, i - reach) : i + reach + 1] for i in range(len(values)))
    return [sum(window) / len(window) for window in windows]
