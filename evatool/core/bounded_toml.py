"""TOML from files that anyone may have written. No torch.

Python's own reader needs time that grows with the square of a dotted key's parts, and a stack as deep as the arrays.
"""

from __future__ import annotations

import re
import tomllib
from typing import Any

MAX_KEY_PARTS = 32

_QUOTED = re.compile(r'"(?:[^"\\\n]++|\\.)*+"|\'[^\'\n]*+\'')  # possessive: nothing is kept to go back to
_LONG_NUMBER = re.compile(r"[=\[,][ \t\n]*+[+-]?(?:0[xob])?[0-9a-f_]{10000}")
_BETWEEN_KEYS = re.compile(r"[,=\[\]{}\n#]")
_DOT = re.compile(r"[\w-][ \t]*\.(?=[ \t]*[\w-])")


def parse_toml(text: str) -> dict[str, Any]:
    """The table of a TOML text. Raises: tomllib.TOMLDecodeError, also for what is nested too deep to be read."""
    if _LONG_NUMBER.search(text):
        raise tomllib.TOMLDecodeError("a number of more than 10000 digits")
    if text.count(".") > MAX_KEY_PARTS:
        for piece in _BETWEEN_KEYS.split(_QUOTED.sub("q", text)):
            if piece.count(".") > MAX_KEY_PARTS and sum(1 for _ in _DOT.finditer(piece)) > MAX_KEY_PARTS:
                raise tomllib.TOMLDecodeError(f"a key of more than {MAX_KEY_PARTS} parts")
    try:
        return tomllib.loads(text)
    except RecursionError as error:
        raise tomllib.TOMLDecodeError("arrays or tables are nested too deep") from error
    except tomllib.TOMLDecodeError:
        raise
    except ValueError as error:  # a number of thousands of digits
        raise tomllib.TOMLDecodeError(str(error)) from error
