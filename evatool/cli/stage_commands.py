"""The commands that run a stage: one table of what differs between them, and one function that they all call."""

from __future__ import annotations

import inspect
import sys
from collections.abc import Mapping
from dataclasses import dataclass, field
from functools import partial
from pathlib import Path
from typing import Annotated, Any

import typer

from evatool.cli import options as opt
from evatool.cli.console import Report
from evatool.cli.factory import add_command


@dataclass(frozen=True)
class StageCommand:
    """What one stage's command has of its own.

    Attributes:
        stage: name of the stage and of the command.
        argument: what the command takes beside a recipe, as the usage line shows it, and the argument's help.
        help: the help page above the options.
        examples: command lines at the end of the help page.
        short_form: options that stand in for a recipe, parameter name -> annotated type, in their order on the page.
        run_dir: type of the option that names the run folder.
        trains: whether a resumed run can be told to accept a recipe that differs.
    """

    stage: str
    argument: tuple[str, str]
    help: str
    examples: tuple[str, ...]
    short_form: Mapping[str, Any] = field(default_factory=dict)
    run_dir: Any = opt.RunDirectory
    trains: bool = False

    @property
    def parameters(self) -> list[inspect.Parameter]:
        """All parameters but `--json`, which every command has."""
        metavar, about = self.argument
        source = Annotated[str, typer.Argument(metavar=f"RECIPE|{metavar}", help=about)]
        optional: list[tuple[str, Any, Any]] = [
            *((name, kind, None) for name, kind in self.short_form.items()),
            ("overrides", opt.Overrides, None),
            ("run_dir", self.run_dir, None),
            ("resume", opt.Resume, False),
            *([("accept_drift", opt.AcceptDrift, None)] if self.trains else []),
            ("dry_run", opt.DryRun, False),
            ("debug", opt.Debug, False),
        ]
        keyword = inspect.Parameter.KEYWORD_ONLY
        return [
            inspect.Parameter("source", keyword, annotation=source),
            *(inspect.Parameter(name, keyword, default=value, annotation=kind) for name, kind, value in optional),
        ]


DATA_PREPARE = StageCommand(
    stage="data-prepare",
    argument=("IMAGES", "A recipe, or a folder of pictures."),
    help="""Turn captioned pictures into training shards and a manifest.

Also draws a contact sheet. The demo's recipe also makes evaluation sets, from the drawings that ship with evatool.
""",
    examples=(
        "evatool data-prepare demo/data-prepare",
        "evatool data-prepare photos/ --captions photos/captions.csv --run-dir runs/photos",
    ),
    short_form={"captions": opt.Captions},
)

PRETRAIN_MIM = StageCommand(
    stage="pretrain-mim",
    argument=("PRESET", "A recipe, or a model preset's name."),
    help="""Train an image encoder on a CLIP teacher's masked features.

Short form defaults: batch 256, AdamW at 1.5e-3, 10 % warm-up, gradient norm clipped at 3.
Everything else through --set.
""",
    examples=(
        "evatool pretrain-mim demo/pretrain-mim",
        "evatool pretrain-mim EVA02-CLIP-toy --teacher runs/demo/train-clip --data runs/demo/data-prepare "
        "--samples-seen 60000",
    ),
    short_form={"teacher": opt.Teacher, "data": opt.TrainData, "samples_seen": opt.SamplesSeen},
    trains=True,
)

TRAIN_CLIP = StageCommand(
    stage="train-clip",
    argument=("PRESET", "A recipe, or a model preset's name."),
    help="""Train a CLIP model on image-text shards.

Starts one process a GPU itself. Short form defaults: random weights, batch 256, AdamW at 5e-4, 10 % warm-up,
gradient norm clipped at 1. Everything else through --set, such as --set model.init.kind=image-tower --set
model.init.path=runs/mim.
""",
    examples=(
        "evatool train-clip demo/train-clip --set train.seed=1 --run-dir runs/seed1",
        "evatool train-clip EVA02-CLIP-toy --data runs/demo/data-prepare --samples-seen 120000",
    ),
    short_form={"data": opt.TrainData, "samples_seen": opt.SamplesSeen},
    trains=True,
)

DISTILL = StageCommand(
    stage="distill",
    argument=("PRESET", "A recipe, or the student's preset name."),
    help="""Train a smaller CLIP model on the data and a frozen teacher.

Short form defaults: batch 256, AdamW at 5e-4, 10 % warm-up, gradient norm clipped at 1, all weights 1.
Everything else through --set.
""",
    examples=(
        "evatool distill demo/distill",
        "evatool distill EVA02-CLIP-toy-small --teacher runs/demo/train-clip-mim --data runs/demo/data-prepare",
    ),
    short_form={"teacher": opt.Teacher, "data": opt.TrainData, "samples_seen": opt.SamplesSeen},
    trains=True,
)

EXPORT = StageCommand(
    stage="export",
    argument=("CHECKPOINT", "A recipe, or a run or checkpoint folder."),
    help="""Write a trained model as files that other libraries load.

They are reloaded there, and their features compared; beyond the tolerance nothing is left.
""",
    examples=(
        "evatool export demo/export",
        "evatool export runs/demo/distill --to open_clip --out exported/student",
    ),
    short_form={
        "to": opt.ExportFormat,
        "model_config": opt.ModelConfigOfFile,
        "push_to_hub": opt.PushToHub,
        "quantize": opt.Quantize,
    },
    run_dir=opt.OutDirectory,
)

EVAL = StageCommand(
    stage="eval",
    argument=("MODEL", "A recipe, or a run folder or model file."),
    help="""Measure zero-shot accuracy and retrieval; write a report.

Every figure has a 95 % interval.
""",
    examples=(
        "evatool eval demo/eval --json",
        "evatool eval runs/demo/distill --suite drawings --data runs/demo/data-prepare",
    ),
    short_form={"suite": opt.Suite, "data": opt.EvalData},
)


def add_stage_command(app: typer.Typer, command: StageCommand) -> None:
    """Register a stage's command."""
    short_form = tuple(command.short_form)
    make_report = partial(_run, command.stage, short_form)
    add_command(app, command.stage, command.parameters, make_report, help=command.help, examples=command.examples)


def _run(
    stage: str,
    short_form: tuple[str, ...],
    *,
    source: str,
    overrides: list[str] | None,
    run_dir: Path | None,
    resume: bool,
    dry_run: bool,
    debug: bool,
    accept_drift: list[str] | None = None,
    **given: Any,
) -> Report:
    """Run a stage, or say what it would do. Everything heavy is imported after the recipe is known to be good."""
    from evatool.cli.short_forms import resolve_argument

    as_typed = {"--" + name.replace("_", "-"): given[name] for name in short_form}
    resolved = resolve_argument(stage, source, as_typed, overrides or [])

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
