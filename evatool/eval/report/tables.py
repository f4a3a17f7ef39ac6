"""Results as CSV and Markdown. No torch."""

from __future__ import annotations

import csv
import io
from dataclasses import asdict, fields
from pathlib import Path

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.shown_text import csv_cell, markdown_text
from evatool.eval.report import wording
from evatool.eval.results import EvalResults, ResultRow


def write_csv(path: Path, results: EvalResults) -> None:
    """One line a model, set and metric, with every key of a row of `results.json`; complete or not there.

    A text that a spreadsheet would take for a formula has an apostrophe before it; `results.json` has it as it is.
    """
    out = io.StringIO()
    writer = csv.DictWriter(out, [f.name for f in fields(ResultRow)], lineterminator="\n")
    writer.writeheader()
    for row in results.results:
        writer.writerow({key: csv_cell(value) for key, value in asdict(row).items()})
    write_bytes_atomically(path, out.getvalue().encode(), make_parents=True)


def write_markdown(path: Path, results: EvalResults) -> None:
    """Tables for a page or a pull request: numbers, published ones beside them, differences; complete or not there."""
    write_bytes_atomically(path, markdown(results).encode(), make_parents=True)


def markdown(results: EvalResults) -> str:
    """The tables as text."""
    lines = [f"# {markdown_text(results.title)}", "", _how(results), ""]
    names = [m.name for m in results.models]
    lines += _table(["set", "metric", *names, "chance", "n"], [_numbers(results, *key) for key in _keys(results)])
    beside = [row for row in results.results if row.published is not None]
    if beside:
        lines += ["", "## Beside published numbers", ""]
        lines += _table(
            ["model", "set", "metric", "here", "published", "difference", "source"],
            [
                [
                    row.model,
                    _title(results, row.set),
                    wording.label(row.metric, results),
                    f"{wording.percent(row.value)} {wording.bounds(row.interval)}",
                    wording.percent(row.published or 0.0),
                    wording.signed_points(row.value - (row.published or 0.0)),
                    row.published_source,
                ]
                for row in beside
            ],
        )
    if results.differences:
        lines += ["", "## Differences, paired over the same samples, in points", ""]
        lines += _table(
            ["after", "before", "set", "metric", "difference", "verdict"],
            [
                [
                    *(d.after, d.before, _title(results, d.set), wording.label(d.metric, results)),
                    *(wording.points(d.interval), wording.verdict(d.interval)),
                ]
                for d in results.differences
            ],
        )
    if results.over_seeds:
        lines += ["", "## Over training seeds", ""]
        lines += _table(
            ["models", "set", "metric", "mean"],
            [
                [
                    *(", ".join(s.models), _title(results, s.set), wording.label(s.metric, results)),
                    f"{wording.percent(s.value)} {wording.bounds(s.interval)}",
                ]
                for s in results.over_seeds
            ],
        )
    for failure in results.failures:
        what = f"{failure.model} {failure.set or ''}: {failure.message.partition(chr(10))[0]}"
        lines += ["", f"Not evaluated: {markdown_text(what)}"]
    return "\n".join(lines) + "\n"


def _how(results: EvalResults) -> str:
    row = results.results[0] if results.results else None
    how = f"precision {row.precision}, resize {row.resize}, decoding {row.decode}; " if row else ""
    return f"{how}brackets are {results.level:.0%} intervals from {results.num_bootstrap:,} resamples."


def _keys(results: EvalResults) -> list[tuple[str, str]]:
    return [(s.name, metric) for s in results.sets for metric in results.metrics_of(s.name)]


def _numbers(results: EvalResults, set_name: str, metric: str) -> list[str]:
    rows = [results.row(m.name, set_name, metric) for m in results.models]
    first = next(row for row in rows if row)
    cells = [f"{wording.percent(row.value)} {wording.bounds(row.interval)}" if row else "–" for row in rows]
    return [
        _title(results, set_name),
        wording.label(metric, results),
        *cells,
        wording.percent(first.chance),
        f"{first.n:,}",
    ]


def _title(results: EvalResults, set_name: str) -> str:
    record = next(s for s in results.sets if s.name == set_name)
    return f"{record.title} ({record.partial})" if record.partial else record.title


def _table(header: list[str], rows: list[list[str]]) -> list[str]:
    lines = ["| " + " | ".join(map(markdown_text, row)) + " |" for row in (header, *rows)]
    return [lines[0], "|" + " --- |" * len(header), *lines[1:]]
