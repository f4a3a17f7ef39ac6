"""`evatool store-features`: a training recipe as a task of its own."""

from __future__ import annotations

import sys
from collections.abc import Sequence
from pathlib import Path

from evatool.cli.console import Report
from evatool.recipe.load import load_recipe


def store_features_report(
    source: str, overrides: Sequence[str], run_dir: Path | None, dry_run: bool, debug: bool
) -> Report:
    """Fill the stores of a recipe; its log goes to a folder beside the run's own."""
    from evatool.cli.reports import dry_run_report, result_report
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
