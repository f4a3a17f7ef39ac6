"""The command line: its commands in pipeline order, and where a process of it starts."""

from __future__ import annotations

import os
import sys
from typing import Annotated, Any

import typer
import typer.core

import evatool
from evatool.cli import options as opt
from evatool.cli import stage_commands as stages
from evatool.cli.compare import compare
from evatool.cli.console import answer_usage_error
from evatool.cli.demo import demo
from evatool.cli.factory import command
from evatool.cli.inspect import inspect
from evatool.cli.plan import plan
from evatool.cli.recipe import recipe_app
from evatool.cli.store_features import store_features
from evatool.cli.streams import keep_streams
from evatool.cli.suites import suites_app
from evatool.core import own_process, stop_signals
from evatool.core.errors import ExitCode


class _PipelineOrder(typer.core.TyperGroup):
    """Typer lists groups of commands last; `recipe` belongs beside `demo`, before what only looks at results."""

    def list_commands(self, ctx: Any) -> list[str]:
        names = [name for name in super().list_commands(ctx) if name != "recipe"]
        names.insert(names.index("demo") + 1, "recipe")
        return names


app = typer.Typer(
    name="evatool",
    cls=_PipelineOrder,
    help="Train EVA-style CLIP models: from pictures and captions to an exported, evaluated model.",
    epilog=opt.examples("evatool demo", "evatool train-clip demo/train-clip --dry-run"),
    no_args_is_help=True,
    add_completion=False,
    pretty_exceptions_enable=False,
    rich_markup_mode=None,  # plain help costs a third of the CPU time
)


def main() -> None:
    """Entry point of the `evatool` script, of `python -m evatool` and of `torchrun -m evatool`."""
    stop_signals.end_at_once()
    own_process.prepare_own_process()
    if own_process.is_launched():
        own_process.end_with_parent(own_process.launcher_pid())
    keep_streams()
    # Looking for pydantic's plugins reads the metadata of every installed package: a sixth of what --dry-run costs.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app()
    except SystemExit as stop:
        if stop.code == ExitCode.USAGE:
            answer_usage_error(sys.argv[1:])
        raise
    finally:
        stop_signals.restore()


def _show_version(wanted: bool) -> None:
    if wanted:
        typer.echo(f"evatool {evatool.__version__}")
        raise typer.Exit


@app.callback()
def _root(
    version: Annotated[
        bool, typer.Option("--version", callback=_show_version, is_eager=True, help="Print the version.")
    ] = False,
) -> None:
    pass


_AGAIN = "run the same command again: it goes on where it stopped"

for _stage in (stages.DATA_PREPARE, stages.PRETRAIN_MIM, stages.TRAIN_CLIP, stages.DISTILL):
    stages.add_stage_command(app, _stage)
command(
    app,
    "store-features",
    "evatool store-features demo/pretrain-mim --set teacher.store.views=4",
    "evatool store-features demo/pretrain-mim --set teacher.store.views=4 --dry-run",
    go_on=_AGAIN,
)(store_features)
for _stage in (stages.EXPORT, stages.EVAL):
    stages.add_stage_command(app, _stage)
command(app, "demo", "evatool demo", "evatool demo --out runs/seed1 --seed 1", go_on=_AGAIN)(demo)
app.add_typer(recipe_app, name="recipe")
command(
    app,
    "compare",
    "evatool compare runs/eval-a runs/eval-b",
    "evatool compare runs/seed0 runs/seed1 runs/seed2 --out runs/seeds",
)(compare)
app.add_typer(suites_app, name="suites")
command(app, "inspect", "evatool inspect runs/demo/distill", "evatool inspect open_clip:ViT-B-32 --json")(inspect)
command(
    app, "plan", "evatool plan demo/train-clip --gpu cpu", "evatool plan demo/train-clip --gpus 8 --gpu h100 --json"
)(plan)
