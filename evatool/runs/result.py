"""What a finished stage hands back, and how it is kept in `result.json`. No torch."""

from __future__ import annotations

import json
import math
from collections.abc import Mapping
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any


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


def read_result(path: Path) -> Result:
    """The result that a finished run left in its folder `path`."""
    stored = json.loads((path / "result.json").read_text(encoding="utf-8"))
    return Result(
        stage=stored["stage"],
        run_dir=Path(stored["run_dir"]),
        outputs={name: Path(output) for name, output in stored["outputs"].items()},
        metrics=stored["metrics"],
        next_command=stored["next_command"],
        table=stored["table"],
    )


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
