"""`report.html` of an evaluation: one file without external assets, for screens and phones. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.shown_text import shown_page
from evatool.eval.report import wording
from evatool.eval.report.charts import Names, bar_panels, difference_panels
from evatool.eval.report.gallery import Gallery
from evatool.eval.results import EvalResults, ModelRecord
from evatool.eval.tasks.base import Examples


@dataclass(frozen=True)
class Fact:
    """A number at the head of a report."""

    label: str
    value: str
    note: str = ""


@dataclass(frozen=True)
class TableRow:
    """One metric of one set for every model: (value, bounds) by model, None where it was not measured."""

    set: str
    metric: str
    cells: dict[str, tuple[str, str] | None]
    chance: str
    n: str


def write_eval_report(
    path: Path,
    results: EvalResults,
    *,
    galleries: Sequence[Gallery] = (),
    examples: Mapping[str, Examples] | None = None,
    kicker: str = "evatool eval",
) -> None:
    """The report of one evaluation, or of one comparison; complete or not there.

    Args:
        galleries: retrieval examples of the last model, one a set.
        examples: what the last model does with classes and images of each set, by set.
    """
    examples = examples or {}
    names = Names.of(results)
    models = ", ".join(names.titles.values())
    differences = difference_panels(results, names, pairs_of(results))
    counted = [s for s in results.sets if not s.is_average]
    last = results.models[-1].name if results.models else ""
    page = render(
        "eval.html.j2",
        title=f"{results.title}: {len(counted)} evaluation set{'' if len(counted) == 1 else 's'}",
        kicker=kicker,
        lead=f"{models} on {results.data}. {how_measured(results)}",
        facts=headline_facts(results, names),
        failures=results.failures,
        bars=bar_panels(results, names),
        differences=differences,
        sentences=wording.comparison_sentences(results),
        seeds=seed_rows(results),
        published=published_rows(results),
        names=names,
        notes=model_notes(results.models),
        galleries=galleries,
        last=last,
        classes=[found.classes for found in examples.values() if found.classes is not None],
        missed={name: found.missed for name, found in examples.items() if found.missed},
        titles={s.name: s.title for s in results.sets},
        table=table_rows(results),
        caveats=wording.caveats(results, sum(len(p.whiskers) for p in differences)),
        level=f"{results.level:.0%}",
        environment=measured_with(results),
        footer=f"Written by evatool in {wording.duration(results.seconds)}.",
    )
    write_bytes_atomically(path, page.encode(), make_parents=True)


def pairs_of(results: EvalResults) -> list[tuple[str, str]]:
    """Pairs of models that were compared, in the order they were."""
    return list(dict.fromkeys((d.before, d.after) for d in results.differences))


def how_measured(results: EvalResults) -> str:
    """Precision, resizing and decoding, which change the numbers."""
    found = sorted({(row.precision, row.resize, row.decode) for row in results.results})
    resize = {
        "shortest": "pictures resized by their shorter side and cropped",
        "squash": "pictures squashed to a square",
    }
    return "; ".join(f"{p}, {resize.get(r, r)}, {d} decoding" for p, r, d in found) + "."


def seed_rows(results: EvalResults) -> list[list[str]]:
    """Set, metric, models and mean with bounds, of what was trained with several seeds."""
    titles = {s.name: s.title for s in results.sets}
    return [
        [
            titles[s.set],
            wording.label(s.metric, results),
            ", ".join(s.models),
            f"{wording.percent(s.value)} {wording.bounds(s.interval)}",
        ]
        for s in results.over_seeds
    ]


def published_rows(results: EvalResults) -> list[list[str]]:
    """Set, metric, model, own value, published value, difference in points, source."""
    titles = {s.name: s.title for s in results.sets}
    return [
        [
            titles[row.set],
            wording.label(row.metric, results),
            row.model,
            f"{wording.percent(row.value)} {wording.bounds(row.interval)}",
            wording.percent(row.published),
            wording.signed_points(row.value - row.published),
            row.published_source,
        ]
        for row in results.results
        if row.published is not None
    ]


def render(template: str, **values: Any) -> str:
    """A template of this package with every value escaped and without control characters; a value that the caller
    forgot is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(
        loader=loader,
        autoescape=True,
        finalize=_visible,
        undefined=jinja2.StrictUndefined,
        trim_blocks=True,
        lstrip_blocks=True,
    )
    return env.get_template(template).render(**values)


def _visible(value: Any) -> Any:
    # What is Markup comes from a macro of the templates, whose values have been here already.
    return shown_page(value) if type(value) is str else value


def headline_facts(results: EvalResults, names: Names) -> list[Fact]:
    """The headline set's main metric, one fact a model; at most the last four."""
    record = results.headline_set()
    if record is None:
        return []
    metric = wording.main_metrics(results, record.kind)[0]
    rows = [row for model in names.titles if (row := results.row(model, record.name, metric))]
    return [
        Fact(
            label=names.titles[row.model],
            value=wording.percent(row.value),
            note=f"{wording.label(metric, results)} on {record.phrase}, {wording.bounds(row.interval)}",
        )
        for row in rows[-4:]
    ]


def table_rows(results: EvalResults) -> list[TableRow]:
    """Every metric of every set."""
    rows = []
    for record in results.sets:
        for metric in results.metrics_of(record.name):
            measured = {m.name: results.row(m.name, record.name, metric) for m in results.models}
            first = next(row for row in measured.values() if row)
            rows.append(
                TableRow(
                    set=record.title,
                    metric=wording.label(metric, results),
                    cells={
                        model: (
                            wording.percent(row.value).removesuffix(f"{wording.NO_BREAK}%"),
                            wording.bounds(row.interval),
                        )
                        if row
                        else None
                        for model, row in measured.items()
                    },
                    chance=wording.percent(first.chance).removesuffix(f"{wording.NO_BREAK}%"),
                    n=f"{first.n:,}",
                )
            )
    return rows


def text_table(results: EvalResults) -> list[list[str]]:
    """The numbers for a terminal, header first; values and bounds in percent."""
    header = ["set", "metric", *(m.name for m in results.models), "chance", "n"]
    body = [
        [row.set, row.metric, *(" ".join(cell) if cell else "–" for cell in row.cells.values()), row.chance, row.n]
        for row in table_rows(results)
    ]
    return [header, *body]


def model_notes(models: Sequence[ModelRecord]) -> dict[str, str]:
    """Size of each model in words: "0.9 M parameters, 64 px"."""
    return {m.name: f"{m.num_parameters / 1e6:.3g} M parameters, {m.image_size} px" for m in models}


def measured_with(results: EvalResults) -> list[tuple[str, str]]:
    """Labels and values on what was measured and where: models with their fingerprints, machine, seed, versions."""
    items = [(f"model {m.name}", f"{m.weights or m.source} ({m.fingerprint[:12]})") for m in results.models]
    items += [
        ("suite", results.suite),
        ("data", results.data),
        ("machine", results.machine),
        ("seed of the resamples", str(results.seed)),
    ]
    return [(label, value) for label, value in [*items, *results.versions.items()] if value]
