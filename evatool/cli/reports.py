"""Results, resolved recipes and lists as what `console.execute` prints."""

from __future__ import annotations

from pathlib import Path
from typing import Any

from evatool.cli.console import Report
from evatool.cli.derived_values import derived_values
from evatool.core.secrets import mask_values
from evatool.core.shown_text import shown
from evatool.recipe.load import Resolved
from evatool.recipe.write import format_value, to_table, to_toml
from evatool.runs.result import Result


def result_report(result: Result) -> Report:
    """A finished stage: what was made, where, its metrics and the next command."""
    from evatool.runs.result import result_to_json

    table = result.table or ([["metric", "value"], *map(_metric_row, result.metrics.items())] if result.metrics else [])
    lines = [f"{result.stage}: done in {result.run_dir}"]
    lines += [f"  {name}: {path}" for name, path in result.outputs.items()]
    if result.next_command:
        lines.append(f"next: {result.next_command}")
    return Report(data=result_to_json(result), table=table, lines=lines, is_kept=True)


def recipe_report(resolved: Resolved, docs: bool = False) -> Report:
    """The resolved recipe with the origin of each value."""
    return Report(data=_recipe_json(resolved), text=to_toml(resolved.recipe, resolved.origins, docs))


def dry_run_report(resolved: Resolved, run_dir: Path) -> Report:
    """The resolved recipe, the origin of each value, the run folder and what follows from it; still valid TOML."""
    values = derived_values(resolved.recipe)
    comments = [
        f"# run folder: {shown(str(run_dir))}",
        *(f"# {name} = {format_value(value)}" for name, value in values.items()),
    ]
    text = to_toml(resolved.recipe, resolved.origins) + "\n" + "\n".join(comments)
    return Report(data=_recipe_json(resolved) | {"run_dir": str(run_dir), "derived": values}, text=text)


def recipe_list_report(rows: list[tuple[str, str, str]]) -> Report:
    """The shipped recipes."""
    data = [{"name": name, "stage": stage, "source": source} for name, stage, source in rows]
    return Report(data={"recipes": data}, table=[["recipe", "stage", "source of its figures"], *map(list, rows)])


def recipe_diff_report(first: Resolved, second: Resolved) -> Report:
    """The keys that two recipes set differently."""
    from evatool.recipe.diff import recipe_differences

    differences = recipe_differences(first, second)
    table = [["key", first.name, second.name, "from", "from"]]
    for each in differences:
        shown = ["" if value is None else format_value(mask_values(value, each.key)) for value in each.values]
        table.append([each.key, *shown, *(origin or "" for origin in each.origins)])
    data = [{"key": d.key, "values": mask_values(d.values, d.key), "origins": list(d.origins)} for d in differences]
    lines = [] if differences else [f"{first.name} and {second.name} set the same"]
    return Report(
        data={"recipes": [first.name, second.name], "differences": data},
        table=table if differences else [],
        lines=lines,
    )


def _recipe_json(resolved: Resolved) -> dict[str, Any]:
    return {
        "stage": resolved.recipe.stage,
        "name": resolved.name,
        "recipe": to_table(resolved.recipe),
        "origins": resolved.origins,
    }


def _metric_row(metric: tuple[str, Any]) -> list[str]:
    name, value = metric
    return [str(name), f"{value:.4g}" if isinstance(value, float) else str(value)]
