"""`report.html` of an evaluation: one file without external assets, for screens and phones. No torch."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatool.eval import words
from evatool.eval.figures import Names, bar_panels, difference_panels
from evatool.eval.gallery import Gallery
from evatool.eval.results import EvalResults, ModelRecord, compared_pairs, main_metrics, write_atomically


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


def write_eval_report(path: Path, results: EvalResults, gallery: Gallery | None = None) -> None:
    """The report of one evaluation; complete or not there."""
    names = Names.of(results)
    models = ", ".join(names.titles.values())
    pairs = compared_pairs(list(names.titles))
    differences = difference_panels(results, names, pairs)
    page = render(
        "eval.html.j2",
        title=f"{results.title}: {len(results.sets)} evaluation sets",
        kicker="evatool eval",
        lead=f"{models} on {results.data}.",
        facts=headline_facts(results, names),
        failures=results.failures,
        bars=bar_panels(results, names),
        differences=differences,
        names=names,
        notes=model_notes(results.models),
        gallery=gallery,
        gallery_title=names.titles.get(gallery.model, gallery.model) if gallery else "",
        table=table_rows(results),
        caveats=words.caveats(results, sum(len(p.whiskers) for p in differences)),
        level=f"{results.level:.0%}",
        environment=environment(results),
        footer=f"Written by evatool in {words.duration(results.seconds)}.",
    )
    write_atomically(path, page.encode())


def render(template: str, **values: Any) -> str:
    """A template of this package with every value escaped; a value that the caller forgot is an error."""
    import jinja2

    loader = jinja2.FileSystemLoader(Path(__file__).parent / "templates")
    env = jinja2.Environment(
        loader=loader, autoescape=True, undefined=jinja2.StrictUndefined, trim_blocks=True, lstrip_blocks=True
    )
    return env.get_template(template).render(**values)


def headline_facts(results: EvalResults, names: Names) -> list[Fact]:
    """The headline set's main metric, one fact a model; at most the last four."""
    record = results.headline_set()
    if record is None:
        return []
    metric = main_metrics(record.kind)[0]
    rows = [row for model in names.titles if (row := results.row(model, record.name, metric))]
    return [
        Fact(
            label=names.titles[row.model],
            value=words.percent(row.value),
            note=f"{words.LABELS[metric]} on {record.phrase}, {words.bounds(row.interval)}",
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
                    metric=words.LABELS.get(metric, metric),
                    cells={
                        model: (words.percent(row.value).removesuffix(f"{words.NO_BREAK}%"), words.bounds(row.interval))
                        if row
                        else None
                        for model, row in measured.items()
                    },
                    chance=words.percent(first.chance).removesuffix(f"{words.NO_BREAK}%"),
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


def environment(results: EvalResults) -> list[tuple[str, str]]:
    """What was measured where: models with their fingerprints, machine, seed, versions."""
    items = [(f"model {m.name}", f"{m.weights or m.source} ({m.fingerprint[:12]})") for m in results.models]
    items += [
        ("suite", results.suite),
        ("data", results.data),
        ("machine", results.machine),
        ("seed of the resamples", str(results.seed)),
    ]
    return [(label, value) for label, value in [*items, *results.versions.items()] if value]
