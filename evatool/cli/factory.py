"""Commands made from functions that return a `Report`: what all commands share is written once, here.

Typer reads a command's options from the signature of a function. So the signature is put together here from the
function's own parameters and the shared ones, and the function that Typer calls hands the report to `execute`.
"""

from __future__ import annotations

import functools
import inspect
from collections.abc import Callable, Sequence
from typing import Any

import typer

from evatool.cli import options as opt
from evatool.cli.console import GO_ON, Report, execute

JSON = inspect.Parameter("json_output", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Json)
DEBUG = inspect.Parameter("debug", inspect.Parameter.KEYWORD_ONLY, default=False, annotation=opt.Debug)


def command(
    app: typer.Typer, name: str, *examples: str, go_on: str = GO_ON
) -> Callable[[Callable[..., Report]], Callable[..., Report]]:
    """A decorator that registers a function returning a `Report` as a command, with `--json` and `--debug` added.

    The function's docstring is the help page. A parameter named `debug` is given the flag's value.

    Args:
        examples: command lines at the end of the help page.
        go_on: what to do after Ctrl-C or a full disk.
    """

    def register(make_report: Callable[..., Report]) -> Callable[..., Report]:
        own = list(inspect.signature(make_report, eval_str=True).parameters.values())
        add_command(app, name, own, make_report, help=inspect.getdoc(make_report), examples=examples, go_on=go_on)
        return make_report

    return register


def add_command(
    app: typer.Typer,
    name: str,
    parameters: Sequence[inspect.Parameter],
    make_report: Callable[..., Report],
    *,
    help: str | None,
    examples: Sequence[str],
    go_on: str = GO_ON,
) -> None:
    """Register `make_report`, called with the values of `parameters`, as a command with `--json` and `--debug` added.

    Args:
        parameters: annotated as Typer's documentation asks; one named `debug` is given the flag's value.
    """
    takes_debug = any(each.name == DEBUG.name for each in parameters)
    own = [each.replace(kind=inspect.Parameter.KEYWORD_ONLY) for each in parameters if each.name != DEBUG.name]

    def run(*, json_output: bool, debug: bool, **values: Any) -> None:
        action = functools.partial(make_report, **values, **({"debug": debug} if takes_debug else {}))
        execute(action, json_output=json_output, debug=debug, go_on=go_on)

    run.__signature__ = inspect.Signature([*own, JSON, DEBUG])  # type: ignore[attr-defined]
    app.command(name, help=help, epilog=opt.examples(*examples))(run)
