"""`evatool plan`: from a recipe to what it will need, as what `console.execute` prints."""

from __future__ import annotations

from collections.abc import Sequence

from evatool.cli.console import Report, explain
from evatool.plan.hardware import hardware
from evatool.plan.job import job_of_recipe
from evatool.plan.report import make_plan
from evatool.recipe.load import load_recipe


def plan_report(
    source: str, overrides: Sequence[str], num_gpus: int | None, gpu_name: str, price: float | None
) -> Report:
    """The plan of a recipe; `failure` is set where it does not fit.

    Args:
        num_gpus: ranks; the recipe's `engine.processes`, else 1, when None.
    """
    gpu = hardware(gpu_name)
    resolved = load_recipe(source, overrides)
    engine = getattr(resolved.recipe, "engine", None)
    ranks = num_gpus or (engine.processes if engine is not None else None) or 1
    plan = make_plan(job_of_recipe(resolved.recipe, resolved.name, ranks), gpu, price_per_gpu_hour=price)
    failure = explain(plan.refusal) if plan.refusal else None
    return Report(data=plan.data, text=plan.text, table=plan.table, lines=plan.lines, failure=failure)
