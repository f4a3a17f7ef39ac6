"""JSON from files that anyone may have written: bounded by what it would take in memory, and by its depth. No torch.

Python's own reader makes 24 bytes and more of each byte of `[],[],[]`: 100 MB of it would take gigabytes. What the
values will need at most is counted before they are made:

    containers  240 bytes each (a table of one entry), by the brackets and braces in the text
    values       72 bytes each (a short text or number and its place), by the commas
    characters    1 byte each, doubled for the text they are read from; 4 where they are not all ASCII

A bracket or comma inside a text counts as well: the bound is one from above.
"""

from __future__ import annotations

import json
import os
from typing import Any

from evatool.core.regular_files import MAX_SMALL_FILE_BYTES, read_regular

MAX_DEPTH = 100
"""Tables and lists within each other."""

FREE_BYTES = 56 * 2**20
"""Memory that a JSON text of any size may take."""

_CONTAINER_BYTES, _VALUE_BYTES = 240, 72


class JsonBoundError(ValueError):
    """A JSON text that is refused for its depth or for the memory that it would take."""


def parse_json(data: bytes | str, *, max_depth: int = MAX_DEPTH, memory_per_byte: int = 2) -> Any:
    """The value of a JSON text.

    Args:
        max_depth: tables and lists within each other.
        memory_per_byte: memory that is granted for each byte of the text, beyond `FREE_BYTES`.
    Raises: ValueError for what is no JSON or not UTF-8, JsonBoundError (a ValueError too) for what is beyond a bound.
    """
    needed, allowed = _memory(data), FREE_BYTES + memory_per_byte * len(data)
    if needed > allowed:
        raise JsonBoundError(
            f"{len(data)} bytes of JSON would take up to {needed >> 20} MiB of memory, and {allowed >> 20} are allowed"
        )
    try:
        value = json.loads(data)
    except RecursionError as error:
        raise JsonBoundError(f"the JSON is nested more than {max_depth} deep") from error
    if _is_deeper(value, max_depth):
        raise JsonBoundError(f"the JSON is nested more than {max_depth} deep")
    return value


def read_json(path: str | os.PathLike[str], max_bytes: int = MAX_SMALL_FILE_BYTES, *, memory_per_byte: int = 2) -> Any:
    """The value of a JSON file. Raises: OSError as `read_regular`, ValueError as `parse_json`."""
    return parse_json(read_regular(path, max_bytes), memory_per_byte=memory_per_byte)


def _memory(data: bytes | str) -> int:
    if isinstance(data, str):
        containers, values = data.count("[") + data.count("{"), data.count(",")
    else:
        containers, values = data.count(b"[") + data.count(b"{"), data.count(b",")
    width = 2 if data.isascii() else 8
    return _CONTAINER_BYTES * containers + _VALUE_BYTES * values + width * len(data)


def _is_deeper(value: Any, max_depth: int) -> bool:
    """True where containers lie in each other more than `max_depth` deep; by levels, so that no stack grows."""
    level = [value] if isinstance(value, dict | list) else []
    for _ in range(max_depth):
        if not level:
            return False
        level = [
            inner
            for outer in level
            for inner in (outer.values() if isinstance(outer, dict) else outer)
            if isinstance(inner, dict | list)
        ]
    return bool(level)
