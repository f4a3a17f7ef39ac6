"""`evatool inspect`: what a source says of its model."""

from __future__ import annotations

import json
from typing import Annotated

import typer

from evatool.cli.console import Report
from evatool.core.shown_text import shown


def inspect(
    source: Annotated[
        str,
        typer.Argument(
            metavar="SOURCE",
            help="A run folder, a checkpoint, an exported folder, a weight file, a preset, open_clip:NAME/TAG.",
        ),
    ],
    weights: Annotated[
        str | None, typer.Option(metavar="WHICH", help="Of several models in a file: raw, ema, or a prefix of names.")
    ] = None,
) -> Report:
    """Show what a source says of its model, and where it says it.

    Architecture, activation, how images are made, tokenizer, temperature: what every other command would use.
    """
    from evatool.stages.inspect import inspect_source

    facts = inspect_source(source, weights)
    rows = [[fact.name, shown(_text(fact.value)), shown(fact.where)] for fact in facts]
    data = {fact.name: {"value": fact.value, "where": fact.where} for fact in facts}
    return Report(data=data, table=[["property", "value", "said by"], *rows])


def _text(value: object) -> str:
    return value if isinstance(value, str) else json.dumps(value)
