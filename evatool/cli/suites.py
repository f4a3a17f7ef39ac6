"""`evatool suites`: which evaluation sets a suite has, where each is looked for, and how to get it."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Any

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report
from evatool.cli.factory import command

suites_app = typer.Typer(
    help="List suites of evaluation sets, and what is present of them.",
    epilog=opt.examples("evatool suites list", "evatool suites show eva27 --data /data/eval"),
    no_args_is_help=True,
)


@command(suites_app, "list", "evatool suites list", "evatool suites list --json")
def suites_list() -> Report:
    """List the suites that ship with evatool."""
    from evatool.eval.suite import list_suites, load_suite

    suites = [load_suite(name) for name in list_suites()]
    titles = [[*(a.title for a in s.averages), *(g.title for g in s.gaps)] for s in suites]
    rows = [[s.name, str(len(s.sets)), ", ".join(t), s.about] for s, t in zip(suites, titles, strict=True)]
    data = [{"name": s.name, "sets": [e.name for e in s.sets], "about": s.about} for s in suites]
    return Report(data={"suites": data}, table=[["suite", "sets", "over all", "about"], *rows])


@command(
    suites_app,
    "show",
    "evatool suites show drawings --data runs/demo/data-prepare",
    "evatool suites show eva27 --data /data/eval --json",
)
def suites_show(
    suite: Annotated[str, typer.Argument(metavar="SUITE", help="A suite's name, or the path of a suite file.")],
    data: Annotated[
        Path, typer.Option(metavar="DIR", help="Evaluation sets (DIR or DIR/eval), one folder a set.")
    ] = Path(),
) -> Report:
    """Show a suite's sets: variant, expected samples, where it looks, what is present, how to get the others."""
    return _show(suite, data)


def _show(name: str, data: Path) -> Report:
    from evatool.eval.suite import fetch_command, find_set, load_suite

    suite = load_suite(name)
    rows: list[list[str]] = []
    described: list[dict[str, Any]] = []
    lines: list[str] = []
    for entry in suite.sets:
        folder = find_set(data, entry)
        is_present = folder.is_dir()
        command = fetch_command(entry, folder) or suite.prepare
        count = f"{entry.num_samples:,}" if entry.num_samples else ""
        rows.append([entry.name, entry.metric, count, entry.variant, "yes" if is_present else "no", str(folder)])
        described.append(
            {
                "name": entry.name,
                "title": entry.title,
                "kind": entry.kind,
                "metric": entry.metric,
                "variant": entry.variant,
                "num_samples": entry.num_samples,
                "num_classes": entry.num_classes,
                "source": entry.source,
                "looks_in": [str(folder.parent / option) for option in entry.folders],
                "present": is_present,
                "command": command,
            }
        )
        if not is_present:
            lines.append(f"{entry.name}: {command}")
    lines = list(dict.fromkeys(lines)) if lines else ["all sets are present"]
    header = ["set", "metric", "samples", "variant", "present", "folder"]
    return Report(data={"suite": suite.name, "sets": described}, table=[header, *rows], lines=lines)
