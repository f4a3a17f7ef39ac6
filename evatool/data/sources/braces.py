"""Brace lists in the names of shards: counted before one name is made, and then made one at a time."""

from __future__ import annotations

import itertools
import math
import re
from collections.abc import Iterator

from evatool.core.errors import DataError
from evatool.data.sources.fetch import display_url

MAX_EXPANDED = 500_000
"""Shards that a pattern of braces and globs may name."""

MAX_PATTERN_CHARS = 100_000
_MAX_EXPANDED_CHARS = 2**28
_MAX_NESTED_BRACES = 8
_RANGE = re.compile(r"(\d{1,15})\.\.(\d{1,15})", re.ASCII)


def expand_braces(spec: str) -> Iterator[str]:
    """The names that a brace list stands for, the first brace turning slowest; counted before one of them is made.

    `{000..123}` is a range, `{a,b}` a choice, which may hold braces itself; a brace without its partner is a letter.
    Raises: DataError where there are more than `MAX_EXPANDED` names, with their number.
    """
    if len(spec) > MAX_PATTERN_CHARS:
        raise too_long(spec)
    pattern = _Pattern(spec)
    if pattern.count > MAX_EXPANDED or pattern.count * len(spec) > _MAX_EXPANDED_CHARS:
        raise too_many(spec, str(pattern.count) if pattern.count < 10**30 else "more than 10^30")
    return iter(pattern)


class _Pattern:
    """A text with braces in it: how many names it stands for, and these names in order."""

    def __init__(self, text: str, depth: int = 0) -> None:
        self.parts: list[str | range | list[_Pattern]] = []
        self.width: dict[int, int] = {}
        at = 0
        for start, end, commas in _outer_braces(text) if depth < _MAX_NESTED_BRACES else []:
            self.parts.append(text[at:start])
            found = _RANGE.fullmatch(text, start + 1, end)
            if found:
                first, last = int(found[1]), int(found[2])
                is_padded = found[1].startswith("0") or len(found[1]) == len(found[2])
                self.width[len(self.parts)] = len(found[1]) if is_padded else 0
                step = 1 if first <= last else -1
                self.parts.append(range(first, last + step, step))
            else:
                cuts = [start, *commas, end]
                words = [text[a + 1 : b] for a, b in itertools.pairwise(cuts)]
                self.parts.append([_Pattern(word, depth + 1) for word in words])
            at = end + 1
        self.parts.append(text[at:])
        self.count = math.prod(map(_count, self.parts))

    def __iter__(self) -> Iterator[str]:
        pools = (self._names(number, part) for number, part in enumerate(self.parts))
        return map("".join, itertools.product(*pools))

    def _names(self, number: int, part: str | range | list[_Pattern]) -> Iterator[str]:
        match part:
            case str():
                return iter((part,))
            case range():
                return (str(value).zfill(self.width[number]) for value in part)
            case _:
                return itertools.chain.from_iterable(part)


def _count(part: str | range | list[_Pattern]) -> int:
    match part:
        case str():
            return 1
        case range():
            return abs(part.stop - part.start)
        case _:
            return sum(pattern.count for pattern in part)


def _outer_braces(text: str) -> Iterator[tuple[int, int, list[int]]]:
    """(start, end, commas between) of each pair of braces that lies in no other."""
    partner: dict[int, int] = {}
    open_braces: list[int] = []
    for found in re.finditer("[{}]", text):
        if found[0] == "{":
            open_braces.append(found.start())
        elif open_braces:
            partner[open_braces.pop()] = found.start()
    at = 0
    while (start := text.find("{", at)) >= 0:
        at = start + 1
        if start not in partner:
            continue
        at, commas = start + 1, []
        while at < partner[start]:
            if text[at] == ",":
                commas.append(at)
            at = partner.get(at, at) + 1
        yield start, partner[start], commas
        at = partner[start] + 1


def too_many(spec: str, count: str) -> DataError:
    """The refusal of a pattern, with the count of what it names."""
    return DataError(
        f"the pattern names {count} shards",
        where=display_url(spec),
        expected=f"at most {MAX_EXPANDED}",
        fix="correct the pattern, or name the folder or manifest of the shards",
    )


def too_long(spec: str) -> DataError:
    """The refusal of a pattern for its length, or for its stars."""
    return DataError(
        f"a pattern of {len(spec)} characters with {spec.count('*')} stars is too long",
        where=display_url(f"{spec[:100]}..."),
        expected=f"at most {MAX_PATTERN_CHARS} characters and 20 stars",
    )
