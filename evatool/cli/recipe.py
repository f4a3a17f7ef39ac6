"""`evatool recipe`: list, show, check and compare recipes, and say what every key means."""

from __future__ import annotations

from typing import Annotated

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report, execute
from evatool.core.errors import RecipeError

recipe_app = typer.Typer(
    help="List, show, check and compare recipes.",
    epilog=opt.examples("evatool recipe list", "evatool recipe show demo/train-clip"),
    no_args_is_help=True,
)
Name = Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file or a shipped recipe's name.")]


@recipe_app.command("list", epilog=opt.examples("evatool recipe list", "evatool recipe list --json"))
def recipe_list(json_output: opt.Json = False, debug: opt.Debug = False) -> None:
    """List the recipes that ship with evatool."""

    def action() -> Report:
        from evatool.cli.reports import recipe_list_report
        from evatool.recipe.load import list_recipes

        return recipe_list_report(list_recipes())

    execute(action, json_output=json_output, debug=debug)


@recipe_app.command(
    "show",
    epilog=opt.examples(
        "evatool recipe show demo/train-clip", "evatool recipe show demo/train-clip --set train.seed=1 --docs"
    ),
)
def recipe_show(
    recipe: Name,
    overrides: opt.Overrides = None,
    docs: Annotated[bool, typer.Option("--docs", help="Say above each key what it means.")] = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Print the resolved recipe with the origin of each value."""

    def action() -> Report:
        from evatool.cli.reports import recipe_report
        from evatool.recipe.load import load_recipe

        return recipe_report(load_recipe(recipe, overrides or []), docs)

    execute(action, json_output=json_output, debug=debug)


@recipe_app.command(
    "check", epilog=opt.examples("evatool recipe check mine.toml", "evatool recipe check recipes/demo/*.toml")
)
def recipe_check(
    recipes: Annotated[list[str], typer.Argument(metavar="RECIPE...", help=".toml files or shipped recipes' names.")],
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Check recipes and report all their problems at once."""
    execute(lambda: _check(recipes), json_output=json_output, debug=debug)


@recipe_app.command(
    "diff",
    epilog=opt.examples(
        "evatool recipe diff eva02-clip-l-14/train-clip eva02-clip-l-14/train-clip-faithful",
        "evatool recipe diff demo/train-clip runs/mine/resolved.toml",
    ),
)
def recipe_diff(first: Name, second: Name, json_output: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print the keys that two recipes set differently, and where each value comes from."""

    def action() -> Report:
        from evatool.cli.reports import recipe_diff_report
        from evatool.recipe.load import load_recipe

        return recipe_diff_report(load_recipe(first), load_recipe(second))

    execute(action, json_output=json_output, debug=debug)


@recipe_app.command("reference", epilog=opt.examples("evatool recipe reference > docs/recipes.md"))
def recipe_reference(json_output: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print what every key of every stage means, as Markdown."""

    def action() -> Report:
        from evatool.recipe.reference import reference_page

        page = reference_page()
        return Report(data={"page": page}, text=page.rstrip("\n"))

    execute(action, json_output=json_output, debug=debug)


@recipe_app.command("schema", epilog=opt.examples("evatool recipe schema > docs/recipe.schema.json"))
def recipe_schema(json_output: opt.Json = False, debug: opt.Debug = False) -> None:
    """Print the JSON Schema of recipe files, for editors."""

    def action() -> Report:
        import json

        from evatool.recipe.reference import json_schema

        schema = json_schema()
        return Report(data=schema, text=json.dumps(schema, indent=1))

    execute(action, json_output=json_output, debug=debug)


def _check(recipes: list[str]) -> Report:
    from evatool.cli.figures import derived_values
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
