"""The charts of docs/evidence.md."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

from effects import Estimate

INK, FAINT, GRID = "#1f2933", "#9fb3c8", "#e4e7eb"
COLORS = ("#0b6e99", "#c2571a")


def draw_effects(effects: Mapping[str, Estimate], path: Path, *, title: str = "Effect on the score, points") -> Path:
    """Each effect with its interval, one a line; those whose interval leaves out 0 are dark."""
    plt = _pyplot()
    names = list(effects)[::-1]
    drawing, axes = plt.subplots(figsize=(8, 0.6 + 0.38 * len(names)), dpi=120, layout="constrained")
    axes.axvline(0, color=INK, linewidth=1)
    for place, name in enumerate(names):
        effect = effects[name]
        color = FAINT if effect.verdict == "no difference" else COLORS[0]
        if effect.low is not None:
            axes.plot([effect.low, effect.high], [place, place], color=color, linewidth=2.5, solid_capstyle="round")
        axes.plot(effect.value, place, "o", color=color)
    axes.set_yticks(range(len(names)), names)
    axes.set_ylim(-0.7, len(names) - 0.3)
    axes.set_xlabel(title, color=INK)
    _plain(axes)
    _save(drawing, path)
    return path


def draw_lines(lines: Mapping[str, Mapping[int, Estimate]], path: Path, *, x: str, y: str) -> Path:
    """A line a name over a logarithmic axis, with intervals."""
    plt = _pyplot()
    drawing, axes = plt.subplots(figsize=(6.4, 3.6), dpi=120, layout="constrained")
    for number, (name, points) in enumerate(lines.items()):
        places = [place * (1 + 0.04 * number) for place in points]  # side by side, so that intervals can be told apart
        found = list(points.values())
        axes.plot(places, [point.value for point in found], "o-", color=COLORS[number], label=name)
        for place, point in zip(places, found, strict=True):
            if point.low is not None:
                axes.plot([place, place], [point.low, point.high], color=COLORS[number], alpha=0.5, linewidth=2.5)
    axes.set_xscale("log", base=2)
    ticks = sorted({place for points in lines.values() for place in points})
    axes.set_xticks(ticks, [f"{tick:,}" for tick in ticks])
    axes.set_ylim(bottom=0)
    axes.set_xlabel(x, color=INK)
    axes.set_ylabel(y, color=INK)
    axes.legend(frameon=False)
    _plain(axes)
    _save(drawing, path)
    return path


def _pyplot() -> Any:
    import matplotlib

    matplotlib.use("agg")
    from matplotlib import pyplot

    return pyplot


def _plain(axes: Any) -> None:
    axes.grid(color=GRID)
    axes.set_axisbelow(True)
    for side in ("top", "right", "left"):
        axes.spines[side].set_visible(False)


def _save(drawing: Any, path: Path) -> None:
    from matplotlib import pyplot

    # Without the date and version that matplotlib writes, equal values make an equal file.
    drawing.savefig(path, metadata={"Software": None})
    pyplot.close(drawing)
