"""The commands, in pipeline order: load the recipe, call the stage, print the result."""

from __future__ import annotations

import os
import sys
from pathlib import Path
from typing import Annotated, Any

import typer
import typer.core

import evatool
from evatool.cli import compare as compare_command
from evatool.cli import options as opt
from evatool.cli.console import Report, answer_usage_error, execute, open_closed_streams
from evatool.cli.recipe import recipe_app
from evatool.cli.suites import suites_app
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
    open_closed_streams()
    # Looking for pydantic's plugins reads the metadata of every installed package: a sixth of what --dry-run costs.
    os.environ.setdefault("PYDANTIC_DISABLE_PLUGINS", "__all__")
    try:
        app()
    except SystemExit as stop:
        if stop.code == ExitCode.USAGE:
            answer_usage_error(sys.argv[1:])
        raise


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


# ---------------------------------------------------------------------------------------------------- stages


@app.command(
    "data-prepare",
    epilog=opt.examples(
        "evatool data-prepare demo/data-prepare",
        "evatool data-prepare photos/ --captions photos/captions.csv --run-dir runs/photos",
    ),
)
def data_prepare(
    source: Annotated[str, typer.Argument(metavar="RECIPE|IMAGES", help="A recipe, or a folder of pictures.")],
    captions: Annotated[
        Path | None, typer.Option(metavar="FILE", help="Short form: CSV, TSV or JSONL with columns image and caption.")
    ] = None,
    overrides: opt.Overrides = None,
    run_dir: opt.RunDirectory = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Turn captioned pictures into training shards and a manifest.

    Also draws a contact sheet. The demo's recipe also makes evaluation sets, from the drawings that ship with evatool.
    """
    given = {"--captions": captions}
    _stage("data-prepare", source, given, overrides, run_dir, resume, dry_run, json_output, debug)


@app.command(
    "pretrain-mim",
    epilog=opt.examples(
        "evatool pretrain-mim demo/pretrain-mim",
        "evatool pretrain-mim EVA02-CLIP-toy --teacher runs/demo/train-clip --data runs/demo/data-prepare "
        "--samples-seen 60000",
    ),
)
def pretrain_mim(
    source: Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="A recipe, or a model preset's name.")],
    teacher: opt.Teacher = None,
    data: opt.TrainData = None,
    samples_seen: opt.SamplesSeen = None,
    overrides: opt.Overrides = None,
    run_dir: opt.RunDirectory = None,
    resume: opt.Resume = False,
    accept_drift: opt.AcceptDrift = None,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train an image encoder on a CLIP teacher's masked features.

    Short form defaults: batch 256, AdamW at 1.5e-3, 10 % warm-up, gradient norm clipped at 3.
    Everything else through --set.
    """
    given = {"--teacher": teacher, "--data": data, "--samples-seen": samples_seen}
    _stage("pretrain-mim", source, given, overrides, run_dir, resume, dry_run, json_output, debug, accept_drift)


@app.command(
    "train-clip",
    epilog=opt.examples(
        "evatool train-clip demo/train-clip --set train.seed=1 --run-dir runs/seed1",
        "evatool train-clip EVA02-CLIP-toy --data runs/demo/data-prepare --samples-seen 120000",
    ),
)
def train_clip(
    source: Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="A recipe, or a model preset's name.")],
    data: opt.TrainData = None,
    samples_seen: opt.SamplesSeen = None,
    overrides: opt.Overrides = None,
    run_dir: opt.RunDirectory = None,
    resume: opt.Resume = False,
    accept_drift: opt.AcceptDrift = None,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train a CLIP model on image-text shards.

    Starts one process a GPU itself. Short form defaults: random weights, batch 256, AdamW at 5e-4, 10 % warm-up,
    gradient norm clipped at 1. Everything else through --set, such as --set model.init.kind=image-tower --set
    model.init.path=runs/mim.
    """
    given = {"--data": data, "--samples-seen": samples_seen}
    _stage("train-clip", source, given, overrides, run_dir, resume, dry_run, json_output, debug, accept_drift)


@app.command(
    "distill",
    epilog=opt.examples(
        "evatool distill demo/distill",
        "evatool distill EVA02-CLIP-toy-small --teacher runs/demo/train-clip-mim --data runs/demo/data-prepare",
    ),
)
def distill(
    source: Annotated[str, typer.Argument(metavar="RECIPE|PRESET", help="A recipe, or the student's preset name.")],
    teacher: opt.Teacher = None,
    data: opt.TrainData = None,
    samples_seen: opt.SamplesSeen = None,
    overrides: opt.Overrides = None,
    run_dir: opt.RunDirectory = None,
    resume: opt.Resume = False,
    accept_drift: opt.AcceptDrift = None,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Train a smaller CLIP model on the data and a frozen teacher.

    Short form defaults: batch 256, AdamW at 5e-4, 10 % warm-up, gradient norm clipped at 1, all weights 1.
    Everything else through --set.
    """
    given = {"--teacher": teacher, "--data": data, "--samples-seen": samples_seen}
    _stage("distill", source, given, overrides, run_dir, resume, dry_run, json_output, debug, accept_drift)


@app.command(
    "store-features",
    epilog=opt.examples(
        "evatool store-features demo/pretrain-mim --set teacher.store.views=4",
        "evatool store-features demo/pretrain-mim --set teacher.store.views=4 --dry-run",
    ),
)
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
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Store what a recipe's teachers say, ahead of time.

    The training run then reads their features and does not load them. Interrupt it and run it again: what is stored
    is not made again.
    """

    def action() -> Report:
        from evatool.cli.store_features import store_features_report

        return store_features_report(source, overrides or [], run_dir, dry_run, debug)

    go_on = "run the same command again: it goes on where it stopped"
    execute(action, json_output=json_output, debug=debug, go_on=go_on)


@app.command(
    "export",
    epilog=opt.examples(
        "evatool export demo/export", "evatool export runs/demo/distill --to open_clip --out exported/student"
    ),
)
def export(
    source: Annotated[
        str, typer.Argument(metavar="RECIPE|CHECKPOINT", help="A recipe, or a run or checkpoint folder.")
    ],
    to: Annotated[
        str | None,
        typer.Option(
            metavar="FORMAT",
            help="Short form: open_clip, baai, timm, safetensors, onnx, torch-export or deepspeed. Default: open_clip.",
        ),
    ] = None,
    model_config: Annotated[
        str | None,
        typer.Option(metavar="JSON|PRESET", help="Short form: the model of a weight file that no preset fits."),
    ] = None,
    push_to_hub: Annotated[
        str | None,
        typer.Option(metavar="OWNER/NAME", help="Short form: also upload the verified files to the Hugging Face hub."),
    ] = None,
    overrides: opt.Overrides = None,
    run_dir: opt.OutDirectory = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Write a trained model as files that other libraries load.

    They are reloaded there, and their features compared; beyond the tolerance nothing is left.
    """
    given = {"--to": to, "--model-config": model_config, "--push-to-hub": push_to_hub}
    _stage("export", source, given, overrides, run_dir, resume, dry_run, json_output, debug)


@app.command(
    "eval",
    epilog=opt.examples(
        "evatool eval demo/eval --json", "evatool eval runs/demo/distill --suite drawings --data runs/demo/data-prepare"
    ),
)
def evaluate(
    source: Annotated[str, typer.Argument(metavar="RECIPE|MODEL", help="A recipe, or a run folder or model file.")],
    suite: Annotated[
        str | None, typer.Option(metavar="NAME", help="Short form: suite of evaluation sets. Default: drawings.")
    ] = None,
    data: Annotated[
        Path | None,
        typer.Option(metavar="DIR", help="Short form: evaluation sets (DIR or DIR/eval), one folder a set."),
    ] = None,
    overrides: opt.Overrides = None,
    run_dir: opt.RunDirectory = None,
    resume: opt.Resume = False,
    dry_run: opt.DryRun = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Measure zero-shot accuracy and retrieval; write a report.

    Every figure has a 95 % interval.
    """
    given = {"--suite": suite, "--data": data}
    _stage("eval", source, given, overrides, run_dir, resume, dry_run, json_output, debug)


def _stage(
    stage: str,
    source: str,
    given: dict[str, Any],
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    dry_run: bool,
    json_output: bool,
    debug: bool,
    accept_drift: list[str] | None = None,
) -> None:
    """One stage's command: everything heavy is imported after the recipe is known to be good."""

    def action() -> Report:
        from evatool.cli.short_forms import resolve_argument

        resolved = resolve_argument(stage, source, given, overrides or [])

        from evatool.cli.reports import dry_run_report, result_report
        from evatool.runs.launch import launch_if_needed
        from evatool.runs.run_dir import RunOptions, run_path, stored_result
        from evatool.stages import run_stage

        options = RunOptions(
            resolved.name,
            run_dir,
            resume,
            debug,
            command=("evatool", *sys.argv[1:]),
            accept_drift=tuple(accept_drift or ()),
        )
        if dry_run:
            return dry_run_report(resolved, run_path(resolved.recipe, options))
        result = stored_result(resolved.recipe, options) or launch_if_needed(resolved.recipe, options, sys.argv[1:])
        return result_report(result or run_stage(resolved, options))

    execute(action, json_output=json_output, debug=debug)


# ---------------------------------------------------------------------------------------------- demo, plan, recipe


@app.command("demo", epilog=opt.examples("evatool demo", "evatool demo --out runs/seed1 --seed 1"))
def demo(
    out: Annotated[Path, typer.Option(metavar="DIR", help="Folder of the whole chain.")] = Path("runs/demo"),
    seed: Annotated[int, typer.Option(metavar="N", min=0, help="Seed of every training stage.")] = 0,
    debug_size: Annotated[
        bool, typer.Option("--debug-size", help="A minute instead of ten; the models are toys.")
    ] = False,
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Run the whole chain on real pictures in about ten minutes.

    Ends with a report. Stages that are finished are not repeated: interrupt it and run it again.
    """

    def action() -> Report:
        from evatool.cli.reports import result_report
        from evatool.stages.demo import DemoOptions, run

        return result_report(run(DemoOptions(out=out, seed=seed, debug_size=debug_size, debug=debug)))

    execute(
        action, json_output=json_output, debug=debug, go_on="run the same command again: it goes on where it stopped"
    )


app.add_typer(recipe_app, name="recipe")
app.command("compare", epilog=compare_command.EPILOG)(compare_command.compare)
app.add_typer(suites_app, name="suites")


@app.command(
    "plan",
    epilog=opt.examples(
        "evatool plan demo/train-clip --gpu cpu", "evatool plan demo/train-clip --gpus 8 --gpu h100 --json"
    ),
)
def plan(
    recipe: Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file or a shipped recipe's name.")],
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
    json_output: opt.Json = False,
    debug: opt.Debug = False,
) -> None:
    """Say what a training recipe will need, or that it cannot fit.

    Memory, time, network, data and disk from formulas (docs/plan.md); nothing is built. What does not fit exits 1.
    """

    def action() -> Report:
        from evatool.cli.plan import plan_report

        return plan_report(recipe, overrides or [], gpus, gpu, price)

    execute(action, json_output=json_output, debug=debug)
