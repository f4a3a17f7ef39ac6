"""Every recipe key, from the schema itself: a page for people, a JSON Schema for editors. No torch."""

from __future__ import annotations

import types
import typing
from collections.abc import Iterator
from pathlib import Path
from typing import Any

from pydantic.fields import FieldInfo
from pydantic_core import PydanticUndefined

from evatool.recipe.field_docs import field_doc
from evatool.recipe.schema import RECIPES
from evatool.recipe.schema.base import Section
from evatool.recipe.write import format_value

_INTRO = """# Recipe reference

Made from the schema by `evatool recipe reference`; a test holds it. `evatool recipe show NAME --docs` says the same of
one recipe, and `docs/recipe.schema.json` (`evatool recipe schema`) tells it to editors that check TOML.

Any recipe may also say `extends = "FILE"` (or a list, left to right; tables merge, the rest replaces) and
`unset = ["dotted.key", ...]`, which drops what a base sets. `--set key=value` comes last.
"""
_HEADER = "| key | value | default | meaning |\n|---|---|---|---|\n"
_WORDS = {int: "whole number", float: "number", str: "text", bool: "true or false", Path: "path"}
_BOUNDS = {"gt": "above {}", "ge": "at least {}", "lt": "below {}", "le": "at most {}"}


def reference_page() -> str:
    """The page as Markdown: a chapter a stage, a table a section."""
    parts = [_INTRO]
    seen: dict[type[Section], str] = {}
    for stage, recipe in RECIPES.items():
        parts.append(f"\n## {stage}\n\n{_summary(recipe)}\n")
        for path, section in _sections(recipe, ""):
            title = f"`[{path}]`" if path else "top level"
            name = title + (f' with `kind = "{_kind(section)}"`' if _kind(section) else "")
            if section in seen and path:
                parts.append(f"\n### {name}\n\nAs {seen[section]}.\n")
                continue
            seen[section] = f"{name} of `{stage}`"
            parts.append(
                f"\n### {name}\n\n{_summary(section)}\n\n| key | value | default | meaning |\n|---|---|---|---|\n"
            )
            parts += [_row(section, key, field) for key, field in section.model_fields.items()]
    return "".join(parts)


def json_schema() -> dict[str, Any]:
    """JSON Schema (2020-12) of a recipe file. Nothing is required: a base may hold it."""
    definitions: dict[str, Any] = {}
    stages = [_schema(recipe, definitions) for recipe in RECIPES.values()]
    names = {"anyOf": [{"type": "string"}, {"type": "array", "items": {"type": "string"}}]}
    for recipe in RECIPES.values():
        definitions[recipe.__name__]["properties"] |= {"extends": names, "unset": names}
    return {
        "$schema": "https://json-schema.org/draft/2020-12/schema",
        "title": "evatool recipe",
        "anyOf": stages,
        "$defs": dict(sorted(definitions.items())),
    }


# ------------------------------------------------------------------------------------------------------------- page


def _summary(section: type[Section]) -> str:
    return " ".join((section.__doc__ or "").split())


def _kind(section: type[Section]) -> str | None:
    field = section.model_fields.get("kind")
    return None if field is None or field.annotation is str else typing.get_args(field.annotation)[0]


def _sections(section: type[Section], path: str) -> Iterator[tuple[str, type[Section]]]:
    """The section, then every section inside it, as TOML nests them."""
    yield path, section
    for key, field in section.model_fields.items():
        for inner, suffix in _inner(field.annotation):
            yield from _sections(inner, f"{path}.{key}{suffix}".lstrip("."))


def _inner(annotation: Any, suffix: str = "") -> Iterator[tuple[type[Section], str]]:
    if isinstance(annotation, type) and issubclass(annotation, Section):
        yield annotation, suffix
        return
    is_list = typing.get_origin(annotation) is list
    for part in typing.get_args(annotation) if _is_compound(annotation) else ():
        yield from _inner(part, "[]" if is_list else suffix)


def _is_compound(annotation: Any) -> bool:
    return typing.get_origin(annotation) in (typing.Annotated, typing.Union, types.UnionType, list)


def _row(section: type[Section], key: str, field: FieldInfo) -> str:
    bounds = _bounds(field.metadata)
    value = " or ".join(dict.fromkeys(_words(field.annotation)))
    value += f", {bounds}" if bounds else ""
    cells = [f"`{key}`", value, _default(field), field_doc(section, key)]
    return "| " + " | ".join(cell.replace("|", "\\|") for cell in cells) + " |\n"


def _words(annotation: Any) -> Iterator[str]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if annotation is type(None):
        return
    if origin is typing.Annotated:
        bounds = _bounds(arguments[1:])
        inner = " or ".join(dict.fromkeys(_words(arguments[0])))
        yield inner + (f" {bounds}" if bounds else "")
    elif origin in (typing.Union, types.UnionType):
        for part in arguments:
            yield from _words(part)
    elif origin is typing.Literal:
        yield " or ".join(f"`{format_value(choice)}`" for choice in arguments)
    elif origin in (list, tuple, dict):
        shown = [" or ".join(_words(part)) for part in arguments if part is not Ellipsis]
        yield f"{'table' if origin is dict else 'list'} of {', '.join(dict.fromkeys(shown))}"
    elif issubclass(annotation, Section):
        yield "table"
    else:
        yield _WORDS[annotation]


def _bounds(metadata: Any) -> str:
    found = []
    for item in metadata:
        for each in getattr(item, "metadata", None) or [item]:
            found += [text.format(f"{getattr(each, name):g}") for name, text in _BOUNDS.items() if hasattr(each, name)]
    return " and ".join(found)


def _default(field: FieldInfo) -> str:
    if field.is_required():
        return "required"
    default = field.get_default(call_default_factory=True)
    if default is None:
        return "absent"
    return "its defaults" if isinstance(default, Section) else f"`{format_value(default)}`"


# ------------------------------------------------------------------------------------------------------ JSON Schema

_TYPES = {int: "integer", float: "number", str: "string", bool: "boolean", Path: "string"}
_LIMITS = {"gt": "exclusiveMinimum", "ge": "minimum", "lt": "exclusiveMaximum", "le": "maximum", "min_length": ""}


def _schema(annotation: Any, definitions: dict[str, Any]) -> dict[str, Any]:
    origin, arguments = typing.get_origin(annotation), typing.get_args(annotation)
    if origin is typing.Annotated:
        return _schema(arguments[0], definitions) | _limits(arguments[1:])
    if origin in (typing.Union, types.UnionType):
        parts = [_schema(part, definitions) for part in arguments if part is not type(None)]
        return parts[0] if len(parts) == 1 else {"anyOf": parts}
    if origin is typing.Literal:
        return {"enum": list(arguments)}
    if origin is dict:
        return {"type": "object", "additionalProperties": _schema(arguments[1], definitions)}
    if origin is list or (origin is tuple and Ellipsis in arguments):
        return {"type": "array", "items": _schema(arguments[0], definitions)}
    if origin is tuple:
        return {"type": "array", "prefixItems": [_schema(part, definitions) for part in arguments]}
    if issubclass(annotation, Section):
        return _table(annotation, definitions)
    return {"type": _TYPES[annotation]}


def _table(section: type[Section], definitions: dict[str, Any]) -> dict[str, Any]:
    name = section.__name__
    if name not in definitions:
        definitions[name] = {}  # holds the place, should a section ever hold itself
        properties = {}
        for key, field in section.model_fields.items():
            described = _schema(field.annotation, definitions) | _limits(field.metadata)
            doc = field_doc(section, key)
            default = None if field.is_required() else field.get_default(call_default_factory=True)
            if doc:
                described = described | {"description": doc}
            if default is not None and default is not PydanticUndefined and not isinstance(default, Section):
                described = described | {"default": list(default) if isinstance(default, tuple) else default}
            properties[key] = described
        definitions[name] = {
            "type": "object",
            "description": _summary(section),
            "properties": properties,
            "additionalProperties": False,
        }
    return {"$ref": f"#/$defs/{name}"}


def _limits(metadata: Any) -> dict[str, Any]:
    found: dict[str, Any] = {}
    for item in metadata:
        for each in getattr(item, "metadata", None) or [item]:
            found |= {limit: getattr(each, name) for name, limit in _LIMITS.items() if limit and hasattr(each, name)}
    return found
