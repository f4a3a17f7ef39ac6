"""`store.json`, which says what the features of a store depend on; a store of anything else is refused."""

from __future__ import annotations

import hashlib
import json
import os
from collections.abc import Mapping
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import read_json
from evatool.core.errors import DataError
from evatool.data.feature_store.spec import StoreSpec, own_folder, saying_where

HEADER = "store.json"
FORMAT = "evatool-features-1"


def open_header(spec: StoreSpec, facts: Mapping[str, Any]) -> str:
    """The digest of everything that the rows of a store depend on; `store.json` is made where there is none.

    Args:
        facts: facts that the loader adds; where both say something, the spec's own count.
    Raises: DataError where the folder holds another store's features, naming what differs.
    """
    wanted = {"row_shape": list(spec.row_shape), "masked_only": spec.masked_only, **facts, **spec.facts}
    wanted = json.loads(json.dumps({"format": FORMAT, **dict(sorted(wanted.items()))}))
    found = read_store_header(spec.path)
    if found is not None:
        with saying_where(spec), own_folder(spec).opened():
            pass  # it is not open to everyone
    else:
        with saying_where(spec), own_folder(spec).opened():
            _create_header(spec.path, wanted)
        found = read_store_header(spec.path)
    _check_header(spec, found or {}, wanted)
    return hashlib.sha256(json.dumps(wanted, sort_keys=True).encode()).hexdigest()


def read_store_header(path: Path) -> dict[str, Any] | None:
    """The contents of `store.json`; None where there is no store. Raises: DataError where it cannot be read."""
    file = path / HEADER
    try:
        found = read_json(file)
    except (FileNotFoundError, NotADirectoryError):
        return None
    except ValueError as error:
        raise DataError(f"{HEADER} is damaged", where=str(file), fix="delete the folder: it is made again") from error
    if not isinstance(found, dict) or found.get("format") != FORMAT:
        raise DataError(
            f"{HEADER} is of another format", where=str(file), expected=FORMAT, fix="choose another teacher.store.path"
        )
    return found


def _create_header(path: Path, facts: Mapping[str, Any]) -> None:
    """Write `store.json` unless somebody else just has: the first one counts."""
    temporary = path / f".{HEADER}.{os.getpid()}"
    write_bytes_atomically(temporary, (json.dumps(facts, indent=2) + "\n").encode())
    try:
        os.link(temporary, path / HEADER)
    except FileExistsError:
        pass
    except OSError:  # a file system without hard links
        os.replace(temporary, path / HEADER)
    temporary.unlink(missing_ok=True)


def _check_header(spec: StoreSpec, found: Mapping[str, Any], wanted: Mapping[str, Any]) -> None:
    different = [key for key in sorted({*found, *wanted}) if found.get(key) != wanted.get(key)]
    if not different:
        return
    problems = [
        f"{key}: stored with {found.get(key, 'nothing')}, now {wanted.get(key, 'nothing')}" for key in different
    ]
    raise DataError(
        "the store holds features of something else:\n  " + "\n  ".join(problems),
        where=str(spec.path / HEADER),
        expected="the same teacher, data, augmentation, masks, views and seed as the features were made with",
        fix="put these back, choose another teacher.store.path, or delete the folder to make the features again",
    )
