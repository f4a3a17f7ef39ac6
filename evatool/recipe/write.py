"""Recipes as TOML: what `resolved.toml` holds and `evatool recipe show` prints. Reads back equal (tests/recipe)."""

from __future__ import annotations

import re
import textwrap
from collections.abc import Iterator, Mapping
from typing import Any

from evatool.recipe.schema import Recipe, Section

# Sections stand in the order the data flows; a name that is not here comes last, in the schema's order.
SECTION_ORDER = (
    "data",
    "shards",
    "model",
    "teacher",
    "teachers",
    "objective",
    "optim",
    "schedule",
    "train",
    "checkpoint",
    "engine",
)

_BARE_KEY = re.compile(r"[A-Za-z0-9_-]+")
_ESCAPES = {'"': '\\"', "\\": "\\\\", "\b": "\\b", "\t": "\\t", "\n": "\\n", "\f": "\\f", "\r": "\\r"}


def to_toml(recipe: Recipe, origins: Mapping[str, str] | None = None, docs: bool = False) -> str:
    """The recipe with every value that is set, defaults included, as TOML that `load_recipe` reads back equal.

    Args:
        origins: dotted key -> where its value came from, shown as a comment after the value.
        docs: put each field's description above it.
    """
    descriptions = _descriptions(recipe) if docs else {}
    lines: list[str] = []
    for path, table in _tables(to_table(recipe)):
        if path:
            if docs and ".".join(path) in descriptions:
                lines += ["", *_comment(descriptions[".".join(path)]), f"[{dotted(path)}]"]
            else:
                lines += ["", f"[{dotted(path)}]"]
        settings = {name: f"{quote_key(name)} = {format_value(value)}" for name, value in table.items()}
        width = min(48, max(map(len, settings.values()), default=0))  # a long value does not push all comments away
        for name, setting in settings.items():
            key = dotted((*path, name))
            lines += _comment(descriptions.get(key, ""))
            origin = origins.get(key) if origins else None
            lines.append(f"{setting:{width}}  # {_one_line(origin)}" if origin else setting)
    return "\n".join(lines) + "\n"


def to_table(recipe: Section) -> dict[str, Any]:
    """The recipe as nested dicts of plain TOML values: paths as strings, tuples as lists, absent fields left out."""
    table = recipe.model_dump(mode="json", exclude_none=True)
    order = {name: i for i, name in enumerate(("stage", "source", "run_dir", *SECTION_ORDER))}
    return dict(sorted(table.items(), key=lambda item: order.get(item[0], len(order))))


def flatten(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> dict[str, Any]:
    """Dotted key -> value of every leaf; arrays and empty tables are leaves."""
    leaves: dict[str, Any] = {}
    for name, value in table.items():
        if isinstance(value, Mapping) and value:
            leaves |= flatten(value, (*path, name))
        else:
            leaves[dotted((*path, name))] = value
    return leaves


def dotted(path: tuple[str, ...]) -> str:
    """A key path as TOML writes it: `eval.models."my model"`."""
    return ".".join(quote_key(part) for part in path)


def quote_key(name: str) -> str:
    """One part of a key, quoted where TOML needs it."""
    return name if _BARE_KEY.fullmatch(name) else format_value(name)


def format_value(value: Any) -> str:
    """A plain value as TOML on one line; tables become inline tables."""
    match value:
        case bool():
            return "true" if value else "false"
        case int() | float():
            return repr(value)
        case str():
            return '"' + "".join(_escape(c) for c in value) + '"'
        case list() | tuple():
            return "[" + ", ".join(format_value(v) for v in value) + "]"
        case dict():
            inner = ", ".join(f"{quote_key(k)} = {format_value(v)}" for k, v in value.items())
            return f"{{ {inner} }}" if inner else "{}"
        case _:
            return str(value)  # dates: TOML has them, recipes do not; only error messages show them


def _escape(char: str) -> str:
    if char in _ESCAPES:
        return _ESCAPES[char]
    # TOML forbids control characters; NEL and the like would end the line for str.splitlines, so they go too.
    return char if char.isprintable() else f"\\U{ord(char):08X}"


def _tables(table: Mapping[str, Any], path: tuple[str, ...] = ()) -> Iterator[tuple[tuple[str, ...], dict[str, Any]]]:
    """Every table that needs a header, parents first, each with its own leaves only."""
    leaves = {k: v for k, v in table.items() if not isinstance(v, Mapping)}
    children = {k: v for k, v in table.items() if isinstance(v, Mapping)}
    if leaves or not children:  # an empty table keeps its header: `[eval.models]`
        yield path, leaves
    for name, child in children.items():
        yield from _tables(child, (*path, name))


def _descriptions(section: Section, path: tuple[str, ...] = ()) -> dict[str, str]:
    from evatool.recipe.field_docs import field_doc

    found: dict[str, str] = {}
    for name in type(section).model_fields:
        value = getattr(section, name)
        if isinstance(value, Section):
            found[dotted((*path, name))] = (type(value).__doc__ or "").strip().splitlines()[0]
            found |= _descriptions(value, (*path, name))
        if doc := field_doc(type(section), name):
            found[dotted((*path, name))] = doc
    return found


def _comment(text: str) -> list[str]:
    return [f"# {line}" for line in textwrap.wrap(text, 100)]


def _one_line(text: str) -> str:
    return "".join(c if c.isprintable() else "?" for c in text)
