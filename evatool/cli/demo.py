"""`evatool demo`: the whole chain on the pictures that ship with evatool."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report


def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the whole chain.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of every training stage.")] = 0,
    debug_size: Annotated[
        bool, typer.Option("--debug-size", help="A minute instead of ten; the models are toys.")
    ] = False,
    debug: opt.Debug = False,
) -> Report:
    """Run the whole chain on real pictures in about ten minutes.

    Ends with a report. Stages that are finished are not repeated: interrupt it and run it again.
    """
    from evatool.cli.reports import result_report
    from evatool.stages.demo import DemoOptions, run

    return result_report(run(DemoOptions(out=out, seed=seed, debug_size=debug_size, debug=debug)))
