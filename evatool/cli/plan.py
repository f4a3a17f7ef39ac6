"""`evatool plan`: what a training recipe will need, from formulas alone."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Annotated

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report, explain


def plan(
    recipe: opt.RecipeName,
    gpus: Annotated[
        int | None, typer.Option(metavar="N", min=1, help="Ranks. Default: the recipe's engine.processes, else 1.")
    ] = None,
    gpu: Annotated[
        str, typer.Option(metavar="NAME", help="h100, h200, a100-40, a100-80, mi300x or cpu (this machine).")
    ] = "h100",
    price: Annotated[
        float | None, typer.Option("--price-per-gpu-hour", metavar="X", min=0, help="Also print the cost.")
    ] = None,
    overrides: opt.Overrides = None,
) -> Report:
    """Say what a training recipe will need, or that it cannot fit.

    Memory, time, network, data and disk from formulas (docs/plan.md); nothing is built. What does not fit exits 1.
    """
    return plan_report(recipe, overrides or [], gpus, gpu, price)


def plan_report(
    source: str, overrides: Sequence[str], num_gpus: int | None, gpu_name: str, price: float | None
) -> Report:
    """The plan of a recipe; `failure` is set where it does not fit.

    Args:
        num_gpus: ranks; the recipe's `engine.processes`, else 1, when None.
        price: money for one GPU-hour; no cost is printed when None.
    """
    from evatool.plan.hardware import hardware
    from evatool.plan.job import job_of_recipe
    from evatool.plan.report import make_plan
    from evatool.recipe.load import load_recipe

    gpu = hardware(gpu_name)
    resolved = load_recipe(source, overrides)
    engine = getattr(resolved.recipe, "engine", None)
    ranks = num_gpus or (engine.processes if engine is not None else None) or 1
    plan = make_plan(job_of_recipe(resolved.recipe, resolved.name, ranks), gpu, price_per_gpu_hour=price)
    failure = explain(plan.refusal) if plan.refusal else None
    return Report(data=plan.data, text=plan.text, table=plan.table, lines=plan.lines, failure=failure)
