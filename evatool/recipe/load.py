"""Recipe files to checked recipes: `extends`, `unset`, `--set`, and every error at once with a way out."""

from __future__ import annotations

import datetime
import json
import logging
import tomllib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from functools import cache
from pathlib import Path
from typing import Any

from pydantic import ValidationError

from evatool.core.bounded_toml import parse_toml
from evatool.core.errors import RecipeError, UsageError
from evatool.core.regular_files import is_regular, read_regular_text
from evatool.core.renamed_keys import rename_recipe_keys, renamed_recipe_key
from evatool.recipe import schema
from evatool.recipe.problems import describe
from evatool.recipe.write import dotted, flatten, format_value, to_table

log = logging.getLogger(__name__)

MAX_BYTES = 2 * 2**20
"""Limit for all files of a recipe together."""

MAX_FILES = 100
MAX_EXTENDS_DEPTH = 64
"""Files that extend each other, one the next."""

MAX_DEPTH = 32
"""Tables and arrays within each other."""

MAX_KEYS, MAX_VALUES = 5_000, 200_000
"""Keys, and values within arrays, of all files together."""

MAX_SUGGESTED_CHARS = 200
"""A longer name is cut before a similar one is looked for."""

SET_ORIGIN = "--set"
DEFAULT_ORIGIN = "default"


@dataclass(frozen=True)
class Resolved:
    """A checked recipe and where each of its values came from."""

    recipe: schema.Recipe
    name: str
    """Name of the default run folder: the shipped name, or the file's stem."""
    origins: dict[str, str]
    """Dotted key -> the file, `--set`, `command line` or `default`; one entry per value of `resolved.toml`."""
    path: Path | None = None
    """The recipe file; None for the short forms of the command line."""


@dataclass
class _Layer:
    """A table under construction and the origin of each of its leaves."""

    table: dict[str, Any] = field(default_factory=dict)
    origins: dict[str, str] = field(default_factory=dict)
    problems: list[str] = field(default_factory=list)
    """What is wrong with the files themselves, told together with what the schema finds."""

    def merge(self, other: _Layer) -> None:
        """Lay `other` over this: tables merge, the rest replaces, a table whose `kind` changes replaces the old one."""
        _merge(self.table, other.table)
        self.origins |= other.origins
        self.problems += [problem for problem in other.problems if problem not in self.problems]
        kept = flatten(self.table)
        self.origins = {key: origin for key, origin in self.origins.items() if key in kept}


# ---------------------------------------------------------------------------------------------------- entry points


def load_recipe(source: str | Path, overrides: Sequence[str] = (), stage: str | None = None) -> Resolved:
    """The recipe of a `.toml` file or of a shipped name such as `demo/train-clip`, checked.

    Args:
        overrides: `key=value` texts in order of precedence, the last one wins.
        stage: the command's stage; a recipe of another stage is refused.
    Raises: RecipeError with all known problems, UsageError for an override that cannot be read.
    """
    path = find_recipe(source)
    layer = _Files().layers(path)
    return _resolve(layer, recipe_name(path), path, display_path(path), overrides, stage)


def resolve_table(
    table: Mapping[str, Any],
    stage: str,
    origin: str = "command line",
    overrides: Sequence[str] = (),
    name: str | None = None,
) -> Resolved:
    """The same for a table built in Python, as the short forms of the command line do; `name` defaults to the stage."""
    own = {"stage": stage, **json.loads(json.dumps(dict(table), default=str))}
    layer = _layer_of(own, origin)
    return _resolve(layer, name or stage, None, origin, overrides, stage)


def find_recipes_dir() -> Path:
    """The shipped recipes: `evatool/_recipes` in an installed wheel, `recipes/` in a source tree."""
    package = Path(__file__).resolve().parents[1]
    installed = package / "_recipes"
    return installed if installed.is_dir() else package.parent / "recipes"


def list_recipes() -> list[tuple[str, str, str]]:
    """(name, stage, source of the figures) of every shipped recipe that a stage can run.

    The demo first, debug versions last, else by folder; in pipeline order within one.
    """
    rows = []
    for path in sorted(find_recipes_dir().rglob("*.toml")):
        table = _Files().layers(path).table
        if "stage" in table:  # the pieces that recipes extend have none
            rows.append((recipe_name(path), str(table["stage"]), str(table.get("source", ""))))
    order = {name: i for i, name in enumerate(schema.RECIPES)}
    folder_order = {"demo": 0, "debug": 2}

    def place(row: tuple[str, str, str]) -> tuple[int, str, int, str]:
        folder = row[0].rpartition("/")[0]
        return folder_order.get(row[0].partition("/")[0], 1), folder, order.get(row[1], len(order)), row[0]

    return sorted(rows, key=place)


def is_recipe(source: str | Path) -> bool:
    """True if `source` is read as a recipe: a `.toml` file, existing or not, or a shipped recipe's name."""
    return str(source).endswith(".toml") or shipped_path(str(source)) is not None


def shipped_path(name: str) -> Path | None:
    """The file of a shipped recipe; None if there is none of this name. `./demo/eval` is a path, not a name."""
    path = find_recipes_dir() / f"{name}.toml"
    is_name = not name.startswith((".", "/")) and ".." not in Path(name).parts
    return path if is_name and is_regular(path) else None


def find_recipe(source: str | Path) -> Path:
    """The file behind a recipe argument. Raises: RecipeError that names the nearest shipped recipe."""
    text = str(source)
    if text.endswith(".toml"):
        path = Path(text)
        if is_regular(path):
            return path
        raise RecipeError(
            f"{text} is not a regular file" if _exists(path) else f"there is no recipe file {text}",
            fix="`evatool recipe list` shows the recipes that ship with evatool",
        )
    shipped = shipped_path(text)
    if shipped is None:
        raise RecipeError(
            f"there is no recipe named {text!r}",
            expected="a .toml file or the name of a shipped recipe" + suggest_recipe(text),
            fix="`evatool recipe list` shows them",
        )
    return shipped


def _exists(path: Path) -> bool:
    try:
        return path.exists()
    except OSError:  # a name that is too long
        return False


def suggest_recipe(text: str) -> str:
    """`, such as demo/eval` for the shipped names nearest to a misspelt one, or nothing."""
    root = find_recipes_dir()
    names = [recipe_name(path) for path in root.rglob("*.toml")]
    near = get_close_matches(text[:MAX_SUGGESTED_CHARS], names, n=1, cutoff=0.6)
    return f", such as {near[0]}" if near else ""


def recipe_name(path: Path) -> str:
    """`demo/train-clip` for a shipped recipe, `mine` for mine.toml, the folder's name for a run's resolved.toml."""
    absolute, root = path.resolve(), find_recipes_dir()
    if absolute.is_relative_to(root):
        return absolute.relative_to(root).with_suffix("").as_posix()
    return absolute.parent.name if absolute.name == "resolved.toml" else absolute.stem


def display_path(path: Path) -> str:
    """The path as a reader would name it: relative under the current directory, else `shipped NAME`, else absolute."""
    absolute, here = path.resolve(), Path.cwd()
    if absolute.is_relative_to(here):
        return str(absolute.relative_to(here))
    root = find_recipes_dir()
    return f"shipped {absolute.relative_to(root)}" if absolute.is_relative_to(root) else str(absolute)


# ---------------------------------------------------------------------------------------------------- files


class _Files:
    """The files of one recipe: each is read once, however often it is extended, and all of them within bounds."""

    def __init__(self) -> None:
        self.known: dict[Path, _Layer] = {}
        self.num_bytes = self.num_values = self.num_keys = 0

    def layers(self, path: Path, chain: tuple[Path, ...] = ()) -> _Layer:
        """The file over its bases; `chain` holds the files that led here, to refuse circles."""
        path = path.resolve()
        shown = display_path(path)
        if path in chain:
            circle = " -> ".join(display_path(p) for p in (*chain[chain.index(path) :], path))
            fix = "remove one of these `extends`"
            raise RecipeError("recipes extend each other in a circle", where=circle, fix=fix)
        if path in self.known:
            return self.known[path]
        if len(chain) >= MAX_EXTENDS_DEPTH:
            raise _beyond(f"recipes extend each other more than {MAX_EXTENDS_DEPTH} deep", shown)
        own = self._read(path, shown)
        extends, unset = _names(own, "extends", shown), _names(own, "unset", shown)
        layer = _Layer()
        for name in dict.fromkeys(extends):
            layer.merge(self.layers(_find_base(name, path), (*chain, path)))
        _unset(layer, unset, shown)
        layer.merge(_layer_of(own, shown))
        self.known[path] = layer
        if len(self.known) > MAX_FILES:
            raise _beyond(f"the recipe consists of more than {MAX_FILES} files", shown)
        return layer

    def _read(self, path: Path, shown: str) -> dict[str, Any]:
        """One file's table, added to what all files together may hold."""
        text = _read_text(path, shown)
        self.num_bytes += len(text)
        table = _parse_toml(text, shown)
        keys, values = _count(table, shown)
        self.num_keys, self.num_values = self.num_keys + keys, self.num_values + values
        if self.num_bytes > MAX_BYTES or self.num_keys > MAX_KEYS or self.num_values > MAX_VALUES:
            raise _beyond(
                f"the recipe's files hold {self.num_bytes} bytes, {self.num_keys} keys and {self.num_values} values",
                shown,
                expected=f"at most {MAX_BYTES}, {MAX_KEYS} and {MAX_VALUES}",
            )
        return table


def _count(table: dict[str, Any], shown: str) -> tuple[int, int]:
    """(keys, values of arrays), counted level by level. Raises: RecipeError for what is nested too deep."""
    keys = values = 0
    level: list[Any] = [table]
    for _ in range(MAX_DEPTH):
        keys += sum(len(item) for item in level if isinstance(item, dict))
        values += sum(len(item) for item in level if isinstance(item, list))
        inside = (item.values() if isinstance(item, dict) else item for item in level)
        level = [value for item in inside for value in item if isinstance(value, dict | list)]
        if not level:
            return keys, values
    raise _beyond(f"the recipe is nested more than {MAX_DEPTH} deep", shown)


def _beyond(what: str, where: str, expected: str | None = None) -> RecipeError:
    return RecipeError(what, where=where, expected=expected, fix="docs/limits.md says what a recipe may hold")


def _layer_of(table: dict[str, Any], origin: str) -> _Layer:
    """A table as a layer, its keys under today's names."""
    renamed, refused = rename_recipe_keys(table)
    for old, new in renamed:
        note_renamed(origin, old, new)
    problems = [f"{origin}: {keys} are one key under two names; keep the second" for keys in refused]
    return _Layer(table, dict.fromkeys(flatten(table), origin), problems)


@cache
def note_renamed(origin: str, old: str, new: str) -> None:
    """Say, once in a process, that a key has another name today: recipes are read several times in one command."""
    log.info("%s: %s is called %s now", origin, old, new)


def _read_text(path: Path, shown: str) -> str:
    try:
        return read_regular_text(path, MAX_BYTES)
    except UnicodeDecodeError as error:
        raise RecipeError("not UTF-8 text, which TOML must be", where=f"{shown}, byte {error.start}") from error
    except OSError as error:
        raise RecipeError(f"the recipe cannot be read: {error.strerror}", where=shown) from error


def _parse_toml(text: str, shown: str) -> dict[str, Any]:
    try:
        return parse_toml(text)
    except tomllib.TOMLDecodeError as error:
        message, _, place = str(error).rpartition(" (at ")
        line = place.removeprefix("line ").partition(",")[0] if message else "end"
        where = f"{shown}, line {line}" if line.isdigit() else f"{shown}, end of file"
        raise RecipeError(f"not valid TOML: {message or error}", where=where) from error


def _names(table: dict[str, Any], key: str, where: str) -> list[str]:
    """Take `extends` or `unset` out of the table: a string or an array of strings."""
    value = table.pop(key, [])
    names = [value] if isinstance(value, str) else value
    if not isinstance(names, list) or not all(isinstance(name, str) for name in names):
        raise RecipeError(
            f"{key} = {format_value(value)} is neither a string nor an array of strings",
            where=where,
            expected=f'{key} = ["..."] above the first [table]',
        )
    return names


def _find_base(name: str, child: Path) -> Path:
    """A base's file: a `.toml` path relative to the file that extends it, else a shipped name."""
    if not name.endswith(".toml"):
        found = shipped_path(name)
        expected = "a .toml path relative to this file, or a shipped recipe" + suggest_recipe(name)
    else:
        path = child.parent / name
        found = path if is_regular(path) else None
        expected = f"a file at {display_path(path)}"
    if found is None:
        raise RecipeError(f"extends = {name!r} is not there", where=display_path(child), expected=expected)
    return found


def _unset(layer: _Layer, keys: Sequence[str], where: str) -> None:
    """Drop values of the bases. A key that no base sets is a problem: it would silently do nothing."""
    for key in (key[:MAX_SUGGESTED_CHARS] for key in keys):
        try:
            renamed = renamed_recipe_key(key)
            if renamed != key:
                note_renamed(where, key, renamed)
            *parents, last = _key_path(renamed)
            table = layer.table
            for part in parents:
                table = table[part]
            del table[last]
        except (KeyError, TypeError, ValueError):
            near = get_close_matches(key, list(flatten(layer.table)), n=1)
            hint = f"; did you mean {near[0]}?" if near else ""
            layer.problems.append(f"{where}: unset = [{format_value(key)}] names a key that no base sets{hint}")
    kept = flatten(layer.table)
    layer.origins = {key: origin for key, origin in layer.origins.items() if key in kept}


def _merge(base: dict[str, Any], over: Mapping[str, Any]) -> None:
    for key, value in over.items():
        old = base.get(key)
        if isinstance(old, dict) and isinstance(value, dict) and not _kind_changes(old, value):
            _merge(old, value)
        else:
            base[key] = _copy(value)


def _kind_changes(old: Mapping[str, Any], new: Mapping[str, Any]) -> bool:
    return "kind" in old and "kind" in new and old["kind"] != new["kind"]


def _copy(value: Any) -> Any:
    """Tables are copied, so that merging into one recipe never writes into another's."""
    return {k: _copy(v) for k, v in value.items()} if isinstance(value, dict) else value


# ---------------------------------------------------------------------------------------------------- --set


def _read_overrides(overrides: Sequence[str]) -> _Layer:
    """All `--set key=value` as one layer, the last of equal keys winning.

    One layer, so that `--set model.init.path=x --set model.init.kind=clip` works in either order: a changed `kind`
    replaces the recipe's table once, not what the line before has just set.
    """
    table: dict[str, Any] = {}
    for text in overrides:
        key, equals, value = text.partition("=")
        if not equals or "\n" in key:
            raise _bad_override(text)
        try:
            *parents, last = _key_path(key.strip())
            text.encode("utf-8")
        except ValueError as error:
            raise _bad_override(text) from error
        if key.strip() == "extends":
            raise UsageError("--set extends= has no effect", fix="write a recipe file that extends both")
        inner = table
        for part in parents:
            if not isinstance(inner.get(part), dict):
                inner[part] = {}
            inner = inner[part]
        inner[last] = _override_value(value)
    return _layer_of(table, SET_ORIGIN)


def _bad_override(text: str) -> UsageError:
    return UsageError(
        f"--set {text!r} is not readable", expected="--set dotted.key=value", fix="for example --set train.seed=1"
    )


def _override_value(text: str) -> Any:
    """The text as a TOML value, else as a string: `1e-3`, `true`, `[1, 2]` and `"x"`, but also plain `runs/x`."""
    try:
        parsed = parse_toml(f"value = {text}")
    except tomllib.TOMLDecodeError:
        return text
    # A line break in the text could smuggle in a second key, and TOML reads 2024-01-01 as a date: both are strings.
    plain = set(parsed) == {"value"} and not _is_date(parsed["value"])
    return parsed["value"] if plain else text


def _key_path(key: str) -> tuple[str, ...]:
    """A dotted TOML key as its parts. Raises: ValueError."""
    table: Any = parse_toml(f"{key} = 0")
    parts: list[str] = []
    while isinstance(table, dict):
        ((part, table),) = table.items()
        parts.append(part)
    return tuple(parts)


# ---------------------------------------------------------------------------------------------------- checking


def _resolve(
    layer: _Layer, name: str, path: Path | None, top: str, overrides: Sequence[str], stage: str | None
) -> Resolved:
    over = _read_overrides(overrides)
    _unset(layer, _names(over.table, "unset", SET_ORIGIN), SET_ORIGIN)
    layer.merge(over)
    model = _recipe_model(layer, top, stage)
    problems = layer.problems + [
        f"{layer.origins.get(key, top)}: {key} = {format_value(value)}: recipes hold no dates; quote it"
        for key, value in flatten(layer.table).items()
        if any(_is_date(item) for item in _items(value))
    ]
    try:
        recipe = model.model_validate_json(json.dumps(layer.table, default=str))
    except ValidationError as error:
        problems += describe(error, model, layer.table, layer.origins, top)
        raise _recipe_error(problems, top) from error
    if problems:
        raise _recipe_error(problems, top)
    origins = {key: layer.origins.get(key, DEFAULT_ORIGIN) for key in flatten(to_table(recipe))}
    return Resolved(recipe=recipe, name=name, origins=origins, path=path)


def _recipe_error(problems: list[str], top: str) -> RecipeError:
    count = "1 problem" if len(problems) == 1 else f"{len(problems)} problems"
    return RecipeError(f"the recipe has {count}: {top}", problems=problems)


def _recipe_model(layer: _Layer, top: str, stage: str | None) -> type[schema.Recipe]:
    """The model of the recipe's stage, which must be the command's."""
    seen = layer.table.get("stage")
    origin = layer.origins.get("stage", top)
    if seen is None:
        example = stage or "train-clip"
        raise RecipeError("the recipe names no stage", where=top, fix=f'add `stage = "{example}"` at its top')
    if not isinstance(seen, str) or seen not in schema.RECIPES:
        near = get_close_matches(str(seen)[:MAX_SUGGESTED_CHARS], list(schema.RECIPES), n=1)
        raise RecipeError(
            f"{dotted(('stage',))} = {format_value(seen)} is no stage",
            where=origin,
            expected=f"`{near[0]}`" if near else "one of " + ", ".join(schema.RECIPES),
        )
    if stage is not None and seen != stage:
        raise RecipeError(
            f"a recipe for {seen}, not for {stage}", where=origin, fix=f"run `evatool {seen}` with this recipe"
        )
    return schema.RECIPES[seen]


def _items(value: Any) -> Iterator[Any]:
    if isinstance(value, list):
        for item in value:
            yield from _items(item)
    else:
        yield value


def _is_date(value: Any) -> bool:
    return isinstance(value, datetime.date | datetime.time)
