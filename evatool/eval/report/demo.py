"""The page a demo ends with: the whole chain, its data, its losses and what each step gained or lost. No torch."""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.eval.report import wording
from evatool.eval.report.charts import CurvePanel, Names, bar_panels, curve_panel, difference_panels
from evatool.eval.report.gallery import Gallery, ImageSource, data_uri
from evatool.eval.report.page import Fact, model_notes, render, table_rows
from evatool.eval.results import EvalResults, compared_pairs


@dataclass(frozen=True)
class ChainStep:
    """One stage of the chain."""

    title: str
    text: str  # what it did, in a sentence
    seconds: float  # wall time
    metrics: dict[str, str] = field(default_factory=dict)  # label -> value, as they are shown
    command: str = ""


@dataclass(frozen=True)
class ChainLosses:
    """Losses of one stage at the samples seen when each was logged."""

    title: str
    samples_seen: list[float]
    losses: list[float]
    reference: float | None = None  # a level worth a dashed line: ln(batch) for a contrastive loss
    reference_text: str = ""
    model: str = ""  # name in the results of the model that the stage made, for its colour


@dataclass(frozen=True)
class ShownSample:
    """A training picture with its caption."""

    image: ImageSource
    caption: str


@dataclass
class DemoReport:
    """Everything the page shows. Models of the chain are in `results.models`, in the order of the chain."""

    title: str
    lead: str
    results: EvalResults
    steps: list[ChainStep] = field(default_factory=list)
    model_titles: dict[str, str] = field(default_factory=dict)  # name in the results -> name on the page
    samples: list[ShownSample] = field(default_factory=list)
    contact_sheet: ImageSource | None = None  # used where `samples` is empty
    data_text: str = ""  # what the training data are, in a sentence
    losses: list[ChainLosses] = field(default_factory=list)
    mim_images: list[ImageSource] = field(default_factory=list)
    mim_text: str = ""  # what the pictures show
    gallery: Gallery | None = None
    machine: str = ""
    versions: dict[str, str] = field(default_factory=dict)
    notes: list[str] = field(default_factory=list)  # further small print, such as warnings of a stage


def write_demo_report(out: Path, data: DemoReport) -> None:
    """`report.html` at `out`, one file without external assets; complete or not there.

    Raises: DataError if a picture cannot be read.
    """
    results = data.results
    names = Names.of(results, data.model_titles)
    chain = list(names.titles)
    differences = difference_panels(results, names, compared_pairs(chain))
    comparisons = sum(len(panel.whiskers) for panel in differences)
    page = render(
        "demo.html.j2",
        title=data.title,
        kicker="evatool demo",
        lead=data.lead,
        facts=_facts(data, names),
        failures=results.failures,
        headline=wording.headline(results, chain[-1], names.titles[chain[-1]]) if chain else None,
        gains=_gains(results, names),
        caveats=[*wording.caveats(results, comparisons), *data.notes],
        bars=bar_panels(results, names),
        differences=differences,
        names=names,
        notes=model_notes(results.models),
        steps=_timed_steps(data.steps),
        total_time=wording.duration(sum(step.seconds for step in data.steps)),
        samples=[{"image": data_uri(s.image), "caption": s.caption} for s in data.samples],
        sheet=data_uri(data.contact_sheet) if data.contact_sheet and not data.samples else None,
        data_text=data.data_text,
        curves=_curves(data.losses, names),
        mim=[data_uri(image) for image in data.mim_images],
        mim_text=data.mim_text,
        gallery=data.gallery,
        gallery_title=names.titles.get(data.gallery.model, data.gallery.model) if data.gallery else "",
        table=table_rows(results),
        level=f"{results.level:.0%}",
        environment=_environment(data),
        footer="Written by evatool demo.",
    )
    write_bytes_atomically(out, page.encode(), make_parents=True)


def _facts(data: DemoReport, names: Names) -> list[Fact]:
    """The final model on the headline set, its distance from chance, its size, and the time all took."""
    facts = []
    record = data.results.headline_set()
    final = data.results.models[-1] if data.results.models else None
    row = (
        record
        and final
        and data.results.row(final.name, record.name, wording.main_metrics(data.results, record.kind)[0])
    )
    if record and final and row:
        facts += [
            Fact(
                f"{wording.label(row.metric, data.results).capitalize()} on {record.phrase}",
                wording.percent(row.value),
                f"{names.titles[final.name]}, {wording.bounds(row.interval)}",
            ),
            Fact(
                "Against chance",
                f"{row.value / row.chance:.0f}×",
                f"chance is {wording.percent(row.chance)}{'' if row.low > row.chance else ', not told from it'}",
            ),
        ]
    if final:
        facts.append(Fact("Final model", f"{final.num_parameters / 1e6:.2g} M", "parameters"))
    if data.steps:
        total = sum(step.seconds for step in data.steps)
        facts.append(Fact("Whole chain", wording.duration(total), data.machine))
    return facts


def _gains(results: EvalResults, names: Names) -> list[dict[str, Any]]:
    """Sentences on what each model gained or lost against the one before it, and the last against the first."""
    gains = []
    for before, after in compared_pairs(list(names.titles)):
        sentences = wording.step_sentences(results, before, after)
        if sentences:
            gains.append({"before": before, "after": after, "sentences": sentences})
    return gains


def _timed_steps(steps: Sequence[ChainStep]) -> list[dict[str, Any]]:
    longest = max((step.seconds for step in steps), default=0.0) or 1.0
    return [
        {
            "title": step.title,
            "text": step.text,
            "metrics": step.metrics,
            "command": step.command,
            "time": wording.duration(step.seconds),
            "share": 100 * step.seconds / longest,
        }
        for step in steps
    ]


def _curves(losses: Sequence[ChainLosses], names: Names) -> list[dict[str, Any]]:
    curves: list[dict[str, Any]] = []
    for curve in losses:
        reference = curve.reference if curve.reference is None or math.isfinite(curve.reference) else None
        panel: CurvePanel | None = curve_panel(
            curve.title, curve.samples_seen, curve.losses, reference, curve.reference_text
        )
        if panel:
            curves.append({"panel": panel, "colour": names.colours.get(curve.model, 3)})
    return curves


def _environment(data: DemoReport) -> list[tuple[str, str]]:
    models = [(f"weights of {m.name}", m.fingerprint[:12]) for m in data.results.models]
    machine = [("machine", data.machine)] if data.machine else []
    return [*machine, *data.versions.items(), *models, ("seed of the resamples", str(data.results.seed))]
