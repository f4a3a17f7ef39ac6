"""Numbers to positions: what the report's charts need, as plain values for the templates. No torch.

Bars and differences are HTML boxes placed in percent of their axis, so that they follow the width of the screen while
their text does not; only loss curves are SVG.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Sequence
from dataclasses import dataclass

from evatool.eval.report import wording
from evatool.eval.results import EvalResults, ResultRow, SetRecord

NUM_COLOURS = 6
_CURVE_POINTS = 240  # a curve is drawn at most this finely
_SMOOTHING = 0.05  # share of the curve that one smoothed point averages over


@dataclass(frozen=True)
class Tick:
    """A mark on an axis: place in percent of its length, and what is written there."""

    at: float
    text: str


@dataclass(frozen=True)
class ChartBar:
    """One model's value: lengths in percent of the axis."""

    title: str
    colour: int
    length: float
    low: float
    high: float
    text: str  # the value
    bounds: str
    at_chance: bool  # the interval does not leave chance below it


@dataclass(frozen=True)
class BarPanel:
    """One set's values for every model."""

    title: str
    about: str
    facts: str
    metric: str
    bars: list[ChartBar]
    ticks: list[Tick]
    chance: float  # place of the chance mark


@dataclass(frozen=True)
class Whisker:
    """One paired difference: places in percent of the axis, whose middle is 0."""

    title: str
    at: float
    low: float
    high: float
    text: str
    verdict: str


@dataclass(frozen=True)
class DifferencePanel:
    """The differences of one model from another, on an axis of their own."""

    before: str
    after: str
    before_colour: int
    after_colour: int
    whiskers: list[Whisker]
    ticks: list[Tick]


@dataclass(frozen=True)
class CurvePanel:
    """A loss curve in a box of 100 x 100, y downwards."""

    title: str
    path: str  # SVG path of the smoothed curve
    raw: str  # SVG path of the values themselves
    x_ticks: list[Tick]
    y_ticks: list[Tick]
    reference: float | None  # y of the dashed line
    reference_text: str
    first: str
    last: str


@dataclass(frozen=True)
class Names:
    """How models are called and coloured in a report, by their name in the results."""

    titles: dict[str, str]
    colours: dict[str, int]

    @classmethod
    def of(cls, results: EvalResults, titles: dict[str, str] | None = None) -> Names:
        """Colours in the order of the models; the name itself where no title is given."""
        models = [m.name for m in results.models]
        return cls({m: (titles or {}).get(m, m) for m in models}, {m: i % NUM_COLOURS for i, m in enumerate(models)})


def bar_panels(results: EvalResults, names: Names) -> list[BarPanel]:
    """A panel for each main metric of each measured set, in the suite's order."""
    panels = [
        _bar_panel(results, record, metric, names)
        for record in results.sets
        for metric in wording.main_metrics(results, record.kind)
    ]
    return [panel for panel in panels if panel is not None]


def _bar_panel(results: EvalResults, record: SetRecord, metric: str, names: Names) -> BarPanel | None:
    rows = [row for model in names.titles if (row := results.row(model, record.name, metric))]
    if not rows:
        return None
    top, ticks = share_axis(max(max(row.high, row.chance) for row in rows))
    return BarPanel(
        title=wording.set_title(results, record, metric),
        about=record.about,
        facts=wording.set_facts(record, rows[0].chance),
        metric=wording.label(metric, results),
        bars=[_bar(row, top, names) for row in rows],
        ticks=ticks,
        chance=100 * rows[0].chance / top,
    )


def _bar(row: ResultRow, top: float, names: Names) -> ChartBar:
    return ChartBar(
        title=names.titles[row.model],
        colour=names.colours[row.model],
        length=100 * row.value / top,
        low=100 * row.low / top,
        high=100 * row.high / top,
        text=wording.percent(row.value),
        bounds=wording.bounds(row.interval),
        at_chance=row.low <= row.chance,
    )


def share_axis(largest: float) -> tuple[float, list[Tick]]:
    """An axis from 0 that holds `largest`: its end as a share, and three to six round marks."""
    end = min(1.0, max(largest, 1e-3) * 1.04)
    step = _round_step(end / 6)
    marks = [i * step for i in range(int(end / step + 1e-9) + 1)]
    digits = max(0, -math.floor(math.log10(step * 100) + 1e-9))
    return end, [Tick(100 * mark / end, f"{100 * mark:.{digits}f}") for mark in marks]


def difference_panels(results: EvalResults, names: Names, pairs: Sequence[tuple[str, str]]) -> list[DifferencePanel]:
    """A panel for each pair of models, on one axis for all, so that lengths compare between panels."""
    compared = [(pair, wording.compared_rows(results, *pair)) for pair in pairs]
    reach = max((max(abs(row.low), abs(row.high)) for _, rows in compared for _, row in rows), default=0.0)
    end = max(reach, 1e-3) * 1.06
    step = _round_step(end / 3)
    marks = [i * step for i in range(-int(end / step), int(end / step) + 1)]
    digits = max(0, -math.floor(math.log10(step * 100) + 1e-9))
    ticks = [
        Tick(50 + 50 * m / end, f"{'+' if m > 0 else wording.MINUS if m < 0 else ''}{abs(100 * m):.{digits}f}")
        for m in marks
    ]

    def place(share: float) -> float:
        return 50 + 50 * share / end

    return [
        DifferencePanel(
            before=names.titles[before],
            after=names.titles[after],
            before_colour=names.colours[before],
            after_colour=names.colours[after],
            whiskers=[
                Whisker(
                    title=wording.set_title(results, record, row.metric),
                    at=place(row.value),
                    low=place(row.low),
                    high=place(row.high),
                    text=wording.points(row.interval),
                    verdict=wording.verdict(row.interval),
                )
                for record, row in rows
            ],
            ticks=ticks,
        )
        for (before, after), rows in compared
        if rows
    ]


def curve_panel(
    title: str,
    samples_seen: Sequence[float],
    losses: Sequence[float],
    reference: float | None = None,
    reference_text: str = "",
) -> CurvePanel | None:
    """A loss over samples seen, raw and smoothed; None with fewer than two finite points.

    `reference` is a level worth a dashed line, such as ln(batch), the contrastive loss of a guess.
    """
    points = [(float(x), float(y)) for x, y in zip(samples_seen, losses, strict=True) if math.isfinite(y)]
    if len(points) < 2:
        return None
    points = _thinned(points)
    smooth = _smoothed(points)
    levels = [y for _, y in points] + ([reference] if reference is not None else [])
    bottom, top = min(levels), max(levels)
    margin = (top - bottom or abs(top) or 1.0) * 0.06
    bottom, top = bottom - margin, top + margin
    last_x = points[-1][0] or 1.0

    def y_of(y: float) -> float:
        return 100 * (top - y) / (top - bottom)

    def draw(line: list[tuple[float, float]]) -> str:
        return "M" + "L".join(f"{100 * x / last_x:.2f},{y_of(y):.2f}" for x, y in line)

    step = _round_step((top - bottom) / 6)
    digits = max(0, -math.floor(math.log10(step) + 1e-9))
    marks = [i * step for i in range(math.ceil(bottom / step), math.floor(top / step) + 1)]
    return CurvePanel(
        title=title,
        path=draw(smooth),
        raw=draw(points),
        x_ticks=[Tick(100 * f, _count(f * last_x)) for f in (0.0, 0.5, 1.0)],
        y_ticks=[Tick(y_of(m), f"{m:.{digits}f}".replace("-", wording.MINUS)) for m in marks],
        reference=None if reference is None else y_of(reference),
        reference_text=reference_text,
        first=_level(smooth[0][1]),
        last=_level(smooth[-1][1]),
    )


def _round_step(least: float) -> float:
    """The smallest of 1, 2 and 5 times a power of ten that is at least `least`."""
    power = 10.0 ** math.floor(math.log10(least))
    return next(m * power for m in (1, 2, 5, 10) if m * power >= least * 0.999)


def _thinned(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """At most `_CURVE_POINTS` points: means of equal runs, the first and last kept."""
    if len(points) <= _CURVE_POINTS:
        return points
    edges = [round(i * len(points) / _CURVE_POINTS) for i in range(_CURVE_POINTS + 1)]
    runs = [points[a:b] for a, b in itertools.pairwise(edges)]
    means = [(sum(x for x, _ in run) / len(run), sum(y for _, y in run) / len(run)) for run in runs]
    return [points[0], *means[1:-1], points[-1]]


def _smoothed(points: list[tuple[float, float]]) -> list[tuple[float, float]]:
    """A centred moving average that narrows towards both ends."""
    half = int(len(points) * _SMOOTHING / 2)
    line = []
    for i, (x, _) in enumerate(points):
        reach = min(half, i, len(points) - 1 - i)
        window = points[i - reach : i + reach + 1]
        line.append((x, sum(y for _, y in window) / len(window)))
    return line


def _count(samples: float) -> str:
    """1500 -> "1.5k"."""
    for size, suffix in ((1e9, "B"), (1e6, "M"), (1e3, "k")):
        if samples >= size:
            return f"{samples / size:.3g}{suffix}"
    return f"{samples:.0f}"


def _level(value: float) -> str:
    return f"{value:.3g}".replace("-", wording.MINUS)
