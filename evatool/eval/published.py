"""Published numbers beside which a model's own are shown. No torch."""

from __future__ import annotations

import tomllib
from dataclasses import dataclass
from functools import cache
from pathlib import Path
from typing import Any

_FILE = Path(__file__).with_name("published.toml")


@dataclass(frozen=True)
class Published:
    """A published value, as a share, and where it stands."""

    value: float
    source: str  # with the resizing transform


def published_value(preset: str, set_name: str, metric: str, resize: str) -> Published | None:
    """The value published for that model, set and metric; of several, the one measured with the same `resize`."""
    key = set_name if metric == "top1" else f"{set_name}/{metric}"
    found = [entry for entry in _table() if entry["preset"] == preset and key in entry["values"]]
    found.sort(key=lambda entry: entry["resize"] != resize)  # stable: else the first one in the file
    if not found:
        return None
    first = found[0]
    return Published(first["values"][key] / 100, f"{first['source']}, resize {first['resize']}")


@cache
def _table() -> list[dict[str, Any]]:
    entries: list[dict[str, Any]] = tomllib.loads(_FILE.read_text(encoding="utf-8"))["published"]
    return entries
