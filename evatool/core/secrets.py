"""Credentials in text made unreadable, where a command line is kept or a recipe is shown. No torch.

A credential is the user and the values of the query of a URL, the value of a key or option whose name says that it is
one (`token`, `secret`, `password`, ...), what follows `Bearer`, or a text in the form of a well-known kind of token.
"""

from __future__ import annotations

import re
from collections.abc import Mapping, Sequence
from typing import Any

HIDDEN = "***"
"""Stands in the place of a credential."""

_NAME = (
    r"[\w.-]*(?:token|secret|password|passwd|passphrase|credentials?|authorization|cookie|signature"
    r"|(?:api|access|account|private|secret|auth|sas|shared)[_-]?key)"
)
_SECRET_NAME = re.compile(_NAME, re.IGNORECASE)
_QUOTED = r"\"(?:[^\"\\\n]|\\.)*\"|'[^'\n]*'"
# name="value", name = "value", "name": "value", name=value
_NAMED_VALUE = re.compile(rf"(?<![\w.-])({_NAME})(\"?\s*[=:]\s*)({_QUOTED})|(?<![\w.-])({_NAME})=([^\s\"'&,;]+)", re.I)
_URL = re.compile(
    r"(?P<scheme>(?<![a-z0-9+.-])[a-z][a-z0-9+.-]*://)(?P<user>[^\s/?#\"'<>]*@)?(?P<place>[^\s?#\"'<>]*)"
    r"(?P<query>\?[^\s#\"'<>]*)?(?P<fragment>#[^\s\"'<>]*)?",
    re.IGNORECASE,
)
_BEARER = re.compile(r"\b(bearer)\s+[\w.~+/=-]{4,}", re.IGNORECASE)
_KNOWN_FORMS = re.compile(r"\b(?:hf_|gh[opsru]_|github_pat_|glpat-|xox[a-z]-|AKIA|ASIA)[\w-]{12,}")
_PARAMETER = re.compile(r"([^=&?#]+=)[^&#]+|(?<=[?&])[^=&#]+(?=&|$)")


def mask_secrets(text: str) -> str:
    """The text with `***` in the place of every credential that is found in it."""
    text = _URL.sub(_mask_url, text)
    text = _BEARER.sub(rf"\1 {HIDDEN}", text)
    return _KNOWN_FORMS.sub(HIDDEN, _NAMED_VALUE.sub(_mask_named, text))


def holds_secrets(text: str) -> bool:
    """True where `mask_secrets` would hide something."""
    return mask_secrets(text) != text


def mask_arguments(arguments: Sequence[str]) -> list[str]:
    """A command line without its credentials, also where one is an argument of its own after `--token`."""
    masked: list[str] = []
    is_secret = False
    for argument in arguments:
        name, equals, value = argument.partition("=")
        if is_secret:
            masked.append(HIDDEN)
        elif equals and name.startswith("--"):  # --set=KEY=VALUE
            masked.append(f"{name}={HIDDEN if _SECRET_NAME.fullmatch(name[2:]) else mask_arguments([value])[0]}")
        elif equals and _SECRET_NAME.fullmatch(name):
            masked.append(f"{name}={HIDDEN}")
        else:
            masked.append(mask_secrets(argument))
        is_secret = argument.startswith("-") and not equals and bool(_SECRET_NAME.fullmatch(argument.lstrip("-")))
    return masked


def mask_values(value: Any, name: str = "") -> Any:
    """Nested tables and lists with the credentials in their texts hidden; numbers and keys stay."""
    match value:
        case str():
            return HIDDEN if value and _SECRET_NAME.fullmatch(name) else mask_secrets(value)
        case Mapping():
            return {key: mask_values(each, str(key)) for key, each in value.items()}
        case list() | tuple():
            return [mask_values(each, name) for each in value]
        case _:
            return value


def _mask_url(found: re.Match[str]) -> str:
    if found["scheme"].lower() == "file://":
        return found[0]  # a `?` is a glob there
    user = f"{HIDDEN}@" if found["user"] else ""
    query, fragment = (_PARAMETER.sub(_mask_parameter, found[part] or "") for part in ("query", "fragment"))
    return f"{found['scheme']}{user}{found['place']}{query}{fragment}"


def _mask_parameter(found: re.Match[str]) -> str:
    return f"{found[1] or ''}{HIDDEN}"


def _mask_named(found: re.Match[str]) -> str:
    if found[1] is None:
        return f"{found[4]}={HIDDEN}"
    quote = found[3][0]
    return found[0] if len(found[3]) == 2 else f"{found[1]}{found[2]}{quote}{HIDDEN}{quote}"
