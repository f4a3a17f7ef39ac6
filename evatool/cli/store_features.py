"""`evatool store-features`: the teacher features of a training recipe, made ahead of its run."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path
from typing import Annotated

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report


def store_features(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE", help="A recipe for pretrain-mim or distill with a teacher.store.")
    ],
    overrides: opt.Overrides = None,
    run_dir: Annotated[
        Path | None,
        typer.Option("--run-dir", metavar="DIR", help="Folder of its log. Default: the run's with -store-features."),
    ] = None,
    dry_run: opt.DryRun = False,
    debug: opt.Debug = False,
) -> Report:
    """Store what a recipe's teachers say, ahead of time.

    The training run then reads their features and does not load them. Interrupt it and run it again: what is stored
    is not made again.
    """
    return store_features_report(source, overrides or [], run_dir, dry_run, debug)


def store_features_report(
    source: str, overrides: Sequence[str], run_dir: Path | None, dry_run: bool, debug: bool
) -> Report:
    """Fill the stores of a recipe; its log goes to a folder beside the run's own."""
    from evatool.cli.reports import dry_run_report, result_report
    from evatool.recipe.load import load_recipe
    from evatool.runs.launch import launch_if_needed
    from evatool.runs.run_dir import RunOptions, run_path
    from evatool.stages import run_stage

    resolved = load_recipe(source, overrides)
    options = RunOptions(f"{resolved.name}-store-features", run_dir, True, debug, command=("evatool", *sys.argv[1:]))
    own = getattr(resolved.recipe, "run_dir", None)
    if run_dir is None and own is not None:
        options.run_dir = own.with_name(f"{own.name}-store-features")
    if dry_run:
        return dry_run_report(resolved, run_path(resolved.recipe, options))
    result = launch_if_needed(resolved.recipe, options, sys.argv[1:])
    return result_report(result or run_stage(resolved, options, task="store-features"))
