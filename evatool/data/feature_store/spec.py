"""Descriptions of a store and of the views that it keeps: the teacher, the shape of a row, the draws."""

from __future__ import annotations

import errno
from collections.abc import Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evatool.core.errors import DataError
from evatool.core.own_folder import OwnFolder

ROW_MARK = b"row1"
"""Begins what stands behind the numbers of each row that has been written."""

TRAILER_BYTES = len(ROW_MARK) + 4
"""Bytes of the mark and the checksum behind the numbers of a row."""


@dataclass(frozen=True)
class StoreSpec:
    """One teacher's store.

    Attributes:
        name: the teacher's name, under which a batch carries its rows.
        path: the folder; made where it is missing.
        row_shape: shape of one sample's features, for instance (N, T); (M, T) where only masked patches are kept.
        facts: everything that the features depend on besides the data, by dotted name: the teacher's fingerprint,
            its picture size. The loader adds its own; where both say something, this one counts.
        masked_only: rows hold the masked patches in order, padded with zeros up to M.
    """

    name: str
    path: Path
    row_shape: tuple[int, ...]
    facts: Mapping[str, Any] = field(default_factory=dict)
    masked_only: bool = False

    @property
    def row_bytes(self) -> int:
        """Bytes of one view of one sample on the disk."""
        return 2 * int(np.prod(self.row_shape)) + TRAILER_BYTES


@dataclass(frozen=True)
class Views:
    """The draws that a run sees: `count` views of each sample under one seed, and the stores that are keyed by them."""

    count: int
    seed: int
    stores: tuple[StoreSpec, ...] = ()


def own_folder(spec: StoreSpec) -> OwnFolder:
    """The folder of a store, which may be shared but not with everyone."""
    fix = "take the permission to write from others (chmod o-w), or choose another teacher.store.path"
    return OwnFolder(spec.path, is_named=True, fix=fix)


@contextmanager
def saying_where(spec: StoreSpec) -> Iterator[None]:
    """A folder that cannot be written in, as an error that says what to do."""
    try:
        yield
    except OSError as error:
        if error.errno not in (errno.EACCES, errno.EPERM, errno.EROFS, errno.ENOTDIR, errno.EEXIST):
            raise
        raise DataError(
            f"teacher features cannot be written: {error.strerror}",
            where=str(error.filename or spec.path),
            fix="choose a folder with teacher.store.path; a store that is complete needs no permission to write",
        ) from error
