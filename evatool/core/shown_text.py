r"""Text of other people made safe to show: on a terminal, in a log, and in CSV, Markdown and JSON files. No torch.

Names of files, tar members, classes and models, and captions, come from outside. Shown as they are, they could move a
terminal's cursor, forge a line of a log, reverse the order in which a line is read, or be a formula in a spreadsheet.
They are not checked where they come in, of which there are many places, but where they go out, of which there are few:
`core.logging`, `core.progress`, `cli.console` and the writers of reports.
"""

from __future__ import annotations

import json
import re
from typing import Any

# What a terminal acts upon or a reader cannot see: control characters of both ranges, marks that change the direction
# of text, line separators, and lone surrogates, which stand for bytes of a file name that are no UTF-8.
_BEYOND_ASCII = "\x7f-\x9f\u061c\u200e\u200f\u2028-\u202e\u2066-\u2069\ufeff\ud800-\udfff"
_UNSAFE_CHAR = re.compile(f"[\x00-\x1f{_BEYOND_ASCII}]")
_UNSAFE_IN_LINES = re.compile(f"(?!\n  )[\x00-\x1f{_BEYOND_ASCII}]")
_UNSAFE_IN_JSON = re.compile(f"[{_BEYOND_ASCII}]")  # JSON escapes the others itself
_NAMED_ESCAPES = {"\n": "\\n", "\r": "\\r", "\t": "\\t"}
# Also in their full-width forms, which spreadsheets in East Asian locales take for the same.
_FORMULA_STARTS = tuple("=+-@\t\r\uff1d\uff0b\uff0d\uff20")
_MARKDOWN_ESCAPES = {"\\": "\\\\", "|": "\\|", "`": "\\`", "*": "\\*", "<": "&lt;", ">": "&gt;", "&": "&amp;"}
_MARKDOWN_CHAR = re.compile(r"[\\|`*<>]|&(?=#?\w+;)")
_FENCES = re.compile("`+")


def shown(text: str) -> str:
    r"""The text on one line, with everything that is not to be seen written as an escape: `a\nb`, `\x1b`, `\u202e`."""
    return _UNSAFE_CHAR.sub(_escape, text)


def shown_lines(text: str) -> str:
    """The same for a message of several lines: a line break stays where two spaces of indentation follow it.

    Messages of evatool indent all lines but the first, so a name with a line break in it cannot begin a line.
    """
    return _UNSAFE_IN_LINES.sub(_escape, text)


def shown_page(text: str) -> str:
    """The same for text whose line breaks are all evatool's own, such as a recipe as TOML."""
    return "\n".join(shown(line) for line in text.split("\n"))


def csv_cell(value: Any) -> Any:
    """A cell as a spreadsheet shows it and never computes it: text that would be a formula gets an apostrophe.

    Numbers and None stay what they are.
    """
    if not isinstance(value, str):
        return value
    return f"'{shown(value)}" if value.startswith(_FORMULA_STARTS) else shown(value)


def markdown_text(text: str) -> str:
    """Text for a Markdown heading, paragraph or table cell: no markup, link, HTML or further cell can be in it."""
    escaped = _MARKDOWN_CHAR.sub(lambda found: _MARKDOWN_ESCAPES[found[0]], shown(text))
    return escaped.replace("](", "]\\(").replace("][", "]\\[").replace("]:", "]\\:")


def markdown_code(text: str) -> str:
    """Text as code within a line of Markdown, whatever backticks it holds."""
    line = shown(text)
    fence = "`" * (1 + max((len(run) for run in _FENCES.findall(line)), default=0))
    space = " " if line.startswith("`") or line.endswith("`") else ""
    return f"{fence}{space}{line}{space}{fence}"


def markdown_block(text: str, language: str) -> str:
    """Lines as a block of code in Markdown, whatever backticks they hold."""
    fence = "`" * max(3, 1 + max((len(run) for run in _FENCES.findall(text)), default=0))
    return f"{fence}{language}\n{shown_page(text)}\n{fence}"


def json_text(value: Any, *, indent: int | None = None, allow_nan: bool = False) -> str:
    """A value as JSON that reads back exactly, with no character in it that a terminal acts upon.

    Raises: ValueError for numbers that are not finite, unless `allow_nan`.
    """
    text = json.dumps(value, indent=indent, ensure_ascii=False, allow_nan=allow_nan)
    return _UNSAFE_IN_JSON.sub(lambda found: f"\\u{ord(found[0]):04x}", text)


def _escape(found: re.Match[str]) -> str:
    char = found[0]
    if char in _NAMED_ESCAPES:
        return _NAMED_ESCAPES[char]
    if "\udc80" <= char <= "\udcff":  # a byte of a file name
        return f"\\x{ord(char) - 0xDC00:02x}"
    return f"\\x{ord(char):02x}" if ord(char) < 0x100 else f"\\u{ord(char):04x}"
