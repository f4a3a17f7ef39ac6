"""Every option and argument that more than one command has, the short forms of the stages, and the form of examples."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated

import typer


def examples(*commands: str) -> str:
    """The last part of a help page; the first character keeps Typer from joining the lines."""
    return "\n".join(["\b", "Examples:", *(f"  {command}" for command in commands)])


Overrides = Annotated[
    list[str] | None,
    typer.Option(
        "--set", metavar="KEY=VALUE", help="Change one value of the recipe, read as TOML, else as text. Repeatable."
    ),
]
RunDirectory = Annotated[
    Path | None, typer.Option("--run-dir", metavar="DIR", help="Folder to write. Default: runs/<recipe name>.")
]
OutDirectory = Annotated[
    Path | None,
    typer.Option("--out", "--run-dir", metavar="DIR", help="Folder to write. Default: runs/<recipe name>."),
]
Resume = Annotated[
    bool, typer.Option("--resume", help="Go on in a used run folder; a finished run hands back its result at once.")
]
AcceptDrift = Annotated[
    list[str] | None,
    typer.Option(
        "--accept-drift",
        metavar="KEY",
        help="With --resume: a key of the recipe, or a table of keys, that may differ from the run's. Repeatable.",
    ),
]
DryRun = Annotated[
    bool, typer.Option("--dry-run", help="Print the resolved recipe, the origin of each value and derived figures.")
]
Json = Annotated[bool, typer.Option("--json", help="Print one JSON object on stdout and nothing else there.")]
Debug = Annotated[bool, typer.Option("--debug", help="Show debug records, and the trace of an error.")]

RecipeName = Annotated[str, typer.Argument(metavar="RECIPE", help="A .toml file or a shipped recipe's name.")]

# Short forms: options that stand in for a recipe (short_forms.py).
Captions = Annotated[
    Path | None, typer.Option(metavar="FILE", help="Short form: CSV, TSV or JSONL with columns image and caption.")
]
TrainData = Annotated[
    Path | None,
    typer.Option("--data", metavar="DIR", help="Short form: shards, as data-prepare writes them (DIR or DIR/train)."),
]
Teacher = Annotated[
    str | None, typer.Option("--teacher", metavar="MODEL", help="Short form: the frozen model to learn from.")
]
SamplesSeen = Annotated[
    int | None,
    typer.Option("--samples-seen", metavar="N", min=1, help="Short form: length of the run. Default: 1000000."),
]
ExportFormat = Annotated[
    str | None,
    typer.Option(
        metavar="FORMAT",
        help="Short form: open_clip, baai, timm, safetensors, onnx, torch-export, transformers or deepspeed.",
    ),
]
ModelConfigOfFile = Annotated[
    str | None,
    typer.Option(metavar="JSON|PRESET", help="Short form: the model of a weight file that no preset fits."),
]
PushToHub = Annotated[
    str | None,
    typer.Option(metavar="OWNER/NAME", help="Short form: also upload the verified files to the Hugging Face hub."),
]
Quantize = Annotated[
    str | None,
    typer.Option(metavar="int8", help="Short form: ONNX graphs with 8-bit weights; the loss of agreement is reported."),
]
Suite = Annotated[
    str | None, typer.Option(metavar="NAME", help="Short form: suite of evaluation sets. Default: drawings.")
]
EvalData = Annotated[
    Path | None,
    typer.Option(metavar="DIR", help="Short form: evaluation sets (DIR or DIR/eval), one folder a set."),
]
