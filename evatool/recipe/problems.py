"""Pydantic's errors as lines a reader can act on: file, dotted key, value, what would be right, nearest key."""

from __future__ import annotations

import re
import types
import typing
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from difflib import get_close_matches
from typing import Any

from pydantic import ValidationError

from evatool.recipe import schema
from evatool.recipe.write import dotted, flatten, format_value

MAX_DESCRIBED = 50
"""Problems that get a line of their own."""

Path = tuple[str, ...]


@dataclass(frozen=True)
class _Key:
    """One key of a stage's schema."""

    path: Path
    kind: str | None
    """`kind` of the innermost table, where that is a choice."""


def describe(
    error: ValidationError, model: type[schema.Recipe], table: Mapping[str, Any], origins: Mapping[str, str], top: str
) -> list[str]:
    """One line for each problem of the recipe.

    Args:
        table: the merged recipe that was refused.
        origins: dotted key -> file or `--set`; what is missing is put down to `top`, the recipe that was asked for.
    """
    lines = []
    for item in error.errors()[:MAX_DESCRIBED]:
        path, index = strip_union_tags(item["loc"], model)
        kind, given, context = item["type"], item["input"], item.get("ctx", {})
        if kind in ("union_tag_invalid", "union_tag_not_found"):
            path = (*path, "kind")
            if isinstance(given, dict) and "kind" in given:
                given = given["kind"]
            elif isinstance(given, dict):
                kind = "missing"
        origin = _origin(path, origins, top)
        shown = f"{origin}: {dotted(path) or 'recipe'}{index}"
        match kind:
            case "missing":
                lines.append(f"{shown} is missing{_about(path, context, model)}")
            case "extra_forbidden":
                lines.append(f"{shown} = {format_value(given)}: unknown key{_nearest(path, table, model)}")
            case "value_error":
                lines.append(f"{shown}: {context['error']}")
            case _:
                lines.append(f"{shown} = {format_value(given)}: {_expected(kind, item['msg'], given, context)}")
    if error.error_count() > MAX_DESCRIBED:
        lines.append(f"and {error.error_count() - MAX_DESCRIBED} more")
    return lines


def strip_union_tags(location: tuple[int | str, ...], model: type[schema.Section]) -> tuple[Path, str]:
    """A pydantic location as (dotted key path, `[index]` of an array item), without the tags of chosen unions."""
    path: list[str] = []
    index = ""
    sections: tuple[type[schema.Section], ...] = (model,)
    pending_tag = False
    for part in location:
        if pending_tag:
            pending_tag = False
            chosen = tuple(s for s in sections if _kind_of(s) == part)
            if chosen:
                sections = chosen
                continue
        if isinstance(part, int):
            index += f"[{part}]"
        elif part != "[key]":  # pydantic's mark of an error in a dict's key rather than its value
            path.append(part)
            field = sections[0].model_fields.get(part) if len(sections) == 1 else None
            sections = tuple(_sections_in(field.annotation)) if field else ()
            pending_tag = len(sections) > 1
    return tuple(path), index


def schema_keys(model: type[schema.Section], path: Path = (), kind: str | None = None) -> Iterator[_Key]:
    """Every key of a stage's schema, the tables included."""
    for name, field in model.model_fields.items():
        yield _Key((*path, name), kind)
        choices = list(_sections_in(field.annotation))
        for section in choices:
            yield from schema_keys(section, (*path, name), _kind_of(section) if len(choices) > 1 else None)


def _sections_in(annotation: Any) -> Iterator[type[schema.Section]]:
    if isinstance(annotation, type) and issubclass(annotation, schema.Section):
        yield annotation
    elif typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType):
        for inner in typing.get_args(annotation):
            yield from _sections_in(inner)


def _kind_of(section: type[schema.Section]) -> str | None:
    field = section.model_fields.get("kind")
    return str(field.default) if field else None


def _origin(path: Path, origins: Mapping[str, str], top: str) -> str:
    """Who set this key, or the first thing inside the table."""
    key = dotted(path)
    inside = (origin for name, origin in origins.items() if key and name.startswith(f"{key}."))
    return origins.get(key) or next(inside, top)


def _nearest(path: Path, table: Mapping[str, Any], model: type[schema.Section]) -> str:
    """A way out for an unknown key: a sibling spelt like it, else where the key does exist, else the likeliest key."""
    keys = list(schema_keys(model))
    here = [k for k in keys if k.path[:-1] == path[:-1]]
    chosen = _chosen_kind(path[:-1], table)
    siblings = {k.path[-1]: k for k in here if k.kind in (None, chosen)}
    taken = flatten(table)
    free = [name for name in siblings if dotted(siblings[name].path) not in taken] or list(siblings)
    near = get_close_matches(path[-1], free, n=1, cutoff=0.8)
    if near:
        return f"; did you mean {dotted(siblings[near[0]].path)}?"
    elsewhere = _elsewhere(path, keys, here, model)
    if elsewhere:
        return elsewhere
    near = get_close_matches(path[-1], free, n=1, cutoff=0.6) or get_close_matches(path[-1], siblings, n=1, cutoff=0.6)
    if near:
        return f"; did you mean {dotted(siblings[near[0]].path)}?"
    last_names = {k.path[-1]: k for k in keys}
    near = get_close_matches(path[-1], list(last_names), n=1, cutoff=0.6)
    if near:
        return f"; did you mean {dotted(last_names[near[0]].path)}?"
    return f"; known here: {', '.join(siblings)}" if siblings else ""


def _elsewhere(path: Path, keys: list[_Key], here: list[_Key], model: type[schema.Section]) -> str:
    """Where a key of exactly this name exists: another kind of the same table, another table, another stage."""
    kinds = [k.kind for k in here if k.path == path]
    if kinds:
        table = dotted(path[:-1])
        return f"; it needs {table}.kind = " + " or ".join(f'"{kind}"' for kind in kinds)
    tables = list(dict.fromkeys(dotted(k.path[:-1]) or "the top" for k in keys if k.path[-1] == path[-1]))
    if tables:
        return f"; {path[-1]} belongs to {' or '.join(tables)}"
    for stage, other in schema.RECIPES.items():
        found = [k for k in schema_keys(other) if k.path[-1] == path[-1]] if other is not model else []
        if found:
            return f"; {dotted(found[0].path)} belongs to recipes for {stage}"
    return ""


def _chosen_kind(path: Path, table: Any) -> str | None:
    for part in path:
        table = table.get(part) if isinstance(table, Mapping) else None
    kind = table.get("kind") if isinstance(table, Mapping) else None
    return kind if isinstance(kind, str) else None


def _about(path: Path, context: Mapping[str, Any], model: type[schema.Section]) -> str:
    """The first sentence of a missing key's description, or the values that it may have."""
    if "discriminator" in context and path[-1] == "kind":
        tags = sorted({k.kind for k in schema_keys(model) if k.path == path and k.kind})
        return " (one of " + ", ".join(f'"{tag}"' for tag in tags) + ")"
    from evatool.recipe.field_docs import field_doc

    current: tuple[type[schema.Section], ...] = (model,)
    description = ""
    for part in path:
        owners = [s for s in current if part in s.model_fields]
        current = tuple(inner for s in owners for inner in _sections_in(s.model_fields[part].annotation))
        description = next((doc for s in owners if (doc := field_doc(s, part))), "")
        if not description and len(current) == 1:
            description = (current[0].__doc__ or "").splitlines()[0]
    first_sentence = re.split(r"\.(?= [A-Z`])", " ".join(description.split()))[0].rstrip(".")
    return f" ({first_sentence})" if first_sentence else ""


def _expected(kind: str, message: str, given: Any, context: Mapping[str, Any]) -> str:
    """What would be right, in a few words."""
    if kind == "union_tag_invalid":
        tags = [tag.strip().strip("'") for tag in str(context.get("expected_tags", "")).split(",")]
        return "expected one of " + ", ".join(f'"{tag}"' for tag in tags) + _close(given, tags)
    if kind == "literal_error":
        choices = str(context.get("expected", ""))
        return f"expected {choices.replace(chr(39), chr(34))}" + _close(given, [c for c in choices.split("'") if c])
    if kind in ("too_short", "too_long"):
        lengths = [
            f"{w} {context[k]}" for k, w in (("min_length", "at least"), ("max_length", "at most")) if k in context
        ]
        return f"expected {' and '.join(lengths)} values, found {context['actual_length']}"
    text = message.removeprefix("Input should be ").removeprefix("a valid ")
    expectations = {
        "int_type": "expected a whole number",
        "int_from_float": "expected a whole number",
        "float_type": "expected a number",
        "bool_type": "expected true or false",
        "string_type": "expected text in quotes",
        "path_type": "expected a path in quotes",
        "model_type": "expected a table",
        "model_attributes_type": "expected a table",
        "dict_type": "expected a table",
        "list_type": "expected an array",
        "tuple_type": "expected an array",
        "finite_number": "expected a finite number",
    }
    if kind in ("int_type", "int_from_float") and isinstance(given, float) and given.is_integer():
        return f"{expectations[kind]}; write {int(given):_}"
    return expectations.get(kind, f"expected {text}" if text != message else message)


def _close(given: Any, choices: list[str]) -> str:
    near = get_close_matches(str(given), choices, n=1, cutoff=0.6)
    return f'; did you mean "{near[0]}"?' if near else ""
