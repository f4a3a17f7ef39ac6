"""`evatool recipe`: list, show, check and compare recipes, and say what every key means."""

from __future__ import annotations

from typing import Annotated

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report
from evatool.cli.factory import command
from evatool.core.errors import RecipeError

recipe_app = typer.Typer(
    help="List, show, check and compare recipes.",
    epilog=opt.examples("evatool recipe list", "evatool recipe show demo/train-clip"),
    no_args_is_help=True,
)


@command(recipe_app, "list", "evatool recipe list", "evatool recipe list --json")
def recipe_list() -> Report:
    """List the recipes that ship with evatool."""
    from evatool.cli.reports import recipe_list_report
    from evatool.recipe.load import list_recipes

    return recipe_list_report(list_recipes())


@command(
    recipe_app,
    "show",
    "evatool recipe show demo/train-clip",
    "evatool recipe show demo/train-clip --set train.seed=1 --docs",
)
def recipe_show(
    recipe: opt.RecipeName,
    overrides: opt.Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Say above each key what it means.")] = False,
) -> Report:
    """Print the resolved recipe with the origin of each value."""
    from evatool.cli.reports import recipe_report
    from evatool.recipe.load import load_recipe

    return recipe_report(load_recipe(recipe, overrides or []), docs)


@command(recipe_app, "check", "evatool recipe check mine.toml", "evatool recipe check recipes/demo/*.toml")
def recipe_check(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help=".toml files or shipped recipes' names.")],
) -> Report:
    """Check recipes and report all their problems at once."""
    return _check(recipes)


@command(
    recipe_app,
    "diff",
    "evatool recipe diff eva02-clip-l-14/train-clip eva02-clip-l-14/train-clip-faithful",
    "evatool recipe diff demo/train-clip runs/mine/resolved.toml",
)
def recipe_diff(first: opt.RecipeName, second: opt.RecipeName) -> Report:
    """Print the keys that two recipes set differently, and where each value comes from."""
    from evatool.cli.reports import recipe_diff_report
    from evatool.recipe.load import load_recipe

    return recipe_diff_report(load_recipe(first), load_recipe(second))


@command(recipe_app, "reference", "evatool recipe reference > docs/recipes.md")
def recipe_reference() -> Report:
    """Print what every key of every stage means, as Markdown."""
    from evatool.recipe.reference import reference_page

    page = reference_page()
    return Report(data={"page": page}, text=page.rstrip("\n"))


@command(recipe_app, "schema", "evatool recipe schema > docs/recipe.schema.json")
def recipe_schema() -> Report:
    """Print the JSON Schema of recipe files, for editors."""
    import json

    from evatool.recipe.reference import json_schema

    schema = json_schema()
    return Report(data=schema, text=json.dumps(schema, indent=1))


def _check(recipes: list[str]) -> Report:
    from evatool.cli.derived_values import derived_values
    from evatool.recipe.load import load_recipe

    good: list[list[str]] = []
    problems: list[str] = []
    for name in recipes:
        try:
            recipe = load_recipe(name).recipe
            derived_values(recipe)
            good.append([name, recipe.stage])
        except RecipeError as error:
            own = error.problems or [f"{name}: " + ": ".join([error.what, *(text for _, text in error.details())])]
            problems += own
    if problems:
        raise RecipeError(f"{len(recipes) - len(good)} of {len(recipes)} recipes have problems", problems=problems)
    data = {"recipes": [{"recipe": name, "stage": stage, "ok": True} for name, stage in good]}
    return Report(data=data, lines=[f"{name}: a good recipe for {stage}" for name, stage in good])
