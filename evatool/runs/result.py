"""What a finished stage hands back, and how it is kept in `result.json`. No torch."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_json_atomically
from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError

RESULT = "result.json"


@dataclass
class Result:
    """What a stage hands back to the command line (and `--json` prints)."""

    stage: str
    run_dir: Path
    outputs: dict[str, Path] = field(default_factory=dict)
    """What was made: name -> path."""
    metrics: dict[str, float | int | str] = field(default_factory=dict)
    """The figures that sum the run up, by metric name."""
    next_command: str | None = None
    """The command line that goes on from here; None where nothing follows."""
    table: list[list[str]] = field(default_factory=list)
    """Rows for the terminal, the header row first."""


def write_result(path: Path, result: Result) -> None:
    """Keep the result of the run in folder `path` as its result.json."""
    more = {"table": result.table, "resolved_run_dir": str(path.resolve())}
    write_json_atomically(path / RESULT, result_to_json(result) | more)


def read_result(path: Path) -> Result:
    """The result that a finished run left in its folder `path`, with the paths that hold today: the folder may have
    been moved since.

    Raises: CheckpointError where result.json is missing or damaged.
    """
    file = path / RESULT
    try:
        stored = read_json(file)
        return _restored(stored, path)
    except (FileNotFoundError, ValueError, KeyError, TypeError, AttributeError, RecursionError) as error:
        raise CheckpointError(
            "result.json is missing or damaged", where=str(file), fix="run the same command with --resume"
        ) from error


def is_moved(path: Path) -> bool:
    """True where the readable result in folder `path` was written under another path."""
    stored = read_json(path / RESULT)
    return bool(stored["run_dir"] != str(path))


def _restored(stored: dict[str, Any], path: Path) -> Result:
    before, command = Path(stored["run_dir"]), stored["next_command"]
    metrics, table = stored["metrics"], stored["table"]
    if not isinstance(stored["stage"], str) or not isinstance(metrics, dict) or not isinstance(command, str | None):
        raise TypeError("a value of another kind")
    if any(isinstance(value, list | dict) for value in metrics.values()):
        raise TypeError("a metric that is no number")
    if command is not None and before != path:
        command = _with_new_path(command, stored.get("resolved_run_dir") or str(before), path)
    return Result(
        stage=stored["stage"],
        run_dir=path,
        outputs={name: _below(Path(output), before, path) for name, output in stored["outputs"].items()},
        metrics=metrics,
        next_command=command,
        table=[[str(cell) for cell in row] for row in table],
    )


def _below(output: Path, before: Path, now: Path) -> Path:
    """A path in the folder that was at `before`; others are as they were."""
    return now / output.relative_to(before) if output.is_relative_to(before) else output


def _with_new_path(command: str, before: str, now: Path) -> str | None:
    """A command with the folder's new path; None where that cannot be said: how it is quoted depends on what is in it,
    which is only the same for paths of ordinary characters."""
    name = r"(?<![\w./-])" + re.escape(before) + r"(?![\w.-])"
    if not re.search(name, command):
        return command
    new = str(now.resolve() if Path(before).is_absolute() else now)
    return re.sub(name, lambda found: new, command) if re.fullmatch(r"[\w./-]*", before + new) else None


def result_to_json(result: Result) -> dict[str, Any]:
    """The object that `--json` prints for a result; numbers that are not finite become null."""
    return {
        "stage": result.stage,
        "run_dir": str(result.run_dir),
        "outputs": {name: str(path) for name, path in result.outputs.items()},
        "metrics": _finite(result.metrics),
        "next_command": result.next_command,
    }


def _finite(value: Any) -> Any:
    """The value as JSON can hold it, which has no NaN and no infinity: they become null."""
    if isinstance(value, Mapping):
        return {str(k): _finite(v) for k, v in value.items()}
    if isinstance(value, bool | int | str) or value is None:
        return value
    return float(value) if math.isfinite(value) else None
