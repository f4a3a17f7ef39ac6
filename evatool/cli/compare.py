"""`evatool compare`: stored results of evaluations set against each other."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evatool.cli.console import Report


def compare(
    runs: Annotated[
        list[Path], typer.Argument(metavar="RUN...", help="Run folders of evatool eval; one, if it has several models.")
    ],
    out: Annotated[
        Path | None,
        typer.Option("--out", metavar="DIR", help="Also write results.json, CSV, Markdown and report.html."),
    ] = None,
    resamples: Annotated[
        int | None, typer.Option("--resamples", metavar="N", min=1, help="Of the intervals. Default: the first run's.")
    ] = None,
) -> Report:
    """Compare evaluated models, sample by sample.

    No model is run: evaluations keep their answers. Each model against the first, paired over the same samples;
    models of one recipe also over their seeds.
    """
    from dataclasses import asdict

    from evatool.eval.compare import compare_runs
    from evatool.eval.report import wording
    from evatool.eval.report.page import write_eval_report
    from evatool.eval.report.tables import write_csv, write_markdown
    from evatool.eval.results import write_results

    results = compare_runs(runs, num_bootstrap=resamples)
    titles = {s.name: s.title for s in results.sets}
    table = [["set", "metric", "model", "against", "points", ""]]
    for d in results.differences:
        verdict = wording.verdict(d.interval)
        table.append(
            [titles[d.set], wording.label(d.metric, results), d.after, d.before, wording.points(d.interval), verdict]
        )
    lines = wording.comparison_sentences(results)
    for s in results.over_seeds:
        value = f"{wording.percent(s.value)} {wording.bounds(s.interval)}"
        lines.append(f"over {s.num_seeds} seeds, {titles[s.set]}, {wording.label(s.metric, results)}: {value}")
    lines += [f"not compared: {f.model}: " + f.message.replace("\n", "; ") for f in results.failures]
    if out is not None:
        write_results(out / "results.json", results)
        write_csv(out / "results.csv", results)
        write_markdown(out / "results.md", results)
        write_eval_report(out / "report.html", results, kicker="evatool compare")
        lines.append(f"report: {out / 'report.html'}")
    data = asdict(results)
    return Report(data=data, table=table, lines=lines)
