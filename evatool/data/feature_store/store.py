"""A frozen teacher's features of each view of each sample, kept on the disk and checked row by row.

A view of a sample is one draw of augmentation, mask and caption, keyed by (store seed, sample, epoch mod views): the
loader draws it alike whether the teacher runs or its features are read. A store is a folder:

    store.json                             whose features these are, of which draws, of which data
    source0/shard000003.view1.features     rows of one training shard and view, in the order of its samples

A row is float16 numbers, a mark and a checksum of row, place and store.json: it is there if and only if the checksum
fits. Ranks write rows of their own samples, nothing has to be committed, and a killed run loses nothing.

How a stage plugs in: it gives `build_train_loader` a `Views` with one `StoreSpec` a teacher, and takes each
`loader.stores[name]`. `store.rows(batch)` are a batch's rows, or None where any is missing; then the stage runs the
teacher on the whole batch and `store.keep(batch, features)` writes its rows and hands them back as they will be read.
"""

# B batch, N patches, M most masked patches of a sample, T a teacher's features of a patch

from __future__ import annotations

import os
import zlib
from collections import OrderedDict
from collections.abc import Mapping, Sequence
from pathlib import Path
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatool.core.batch import Batch
from evatool.core.errors import DataError
from evatool.data.feature_store.header import open_header
from evatool.data.feature_store.spec import ROW_MARK, TRAILER_BYTES, StoreSpec, own_folder, saying_where

_MAX_OPEN_FILES = 64
_HALF_MAX = 65504.0


class FeatureStore:
    """Rows of one teacher, found by place: (source, shard, number within the shard, view).

    Args:
        spec: the teacher's store: its folder, and the shape of its rows.
        counts: samples of each shard of each source.
        digest: digest of everything that the rows depend on; a row written under another one does not count.
    """

    def __init__(self, spec: StoreSpec, counts: Sequence[np.ndarray], digest: str) -> None:
        self.spec, self.counts = spec, [np.asarray(c) for c in counts]
        self._key = f"{digest}/{spec.name}/".encode()
        self._files: OrderedDict[tuple[Path, bool], int] = OrderedDict()
        self.damaged: list[str] = []

    def read(self, store_rows: np.ndarray) -> Tensor | None:
        """Rows (B, *row_shape) float16 at places int (B, 4); None where any is missing.

        A row that was written and does not fit its checksum counts as missing, and is named in `damaged`.
        """
        rows = np.empty((len(store_rows), self.spec.row_bytes - TRAILER_BYTES), dtype=np.uint8)
        trailer = bytearray(TRAILER_BYTES)
        for row, place in zip(rows, map(tuple, store_rows.tolist()), strict=True):
            file, size = self._file(place, writing=False), self.spec.row_bytes
            if file is None or os.preadv(file, [row.data, trailer], place[2] * size) != size:
                return None
            if trailer[: len(ROW_MARK)] != ROW_MARK:
                return None
            if trailer != self._trailer(place, row):
                self.damaged.append(f"{self._path(place)}, row {place[2]}")
                return None
        return torch.from_numpy(rows).view(torch.float16).view(len(store_rows), *self.spec.row_shape)

    def write(self, store_rows: np.ndarray, rows: Tensor) -> None:
        """Write rows (B, *row_shape) float16 on the CPU at their places. Raises: OSError, for instance disk full."""
        payload = rows.contiguous().view(len(store_rows), -1).view(torch.uint8).numpy()
        for row, place in zip(payload, map(tuple, store_rows.tolist()), strict=True):
            file = self._file(place, writing=True)
            assert file is not None
            pieces, offset = [row.data, self._trailer(place, row)], place[2] * self.spec.row_bytes
            if os.pwritev(file, pieces, offset) != self.spec.row_bytes:
                os.pwrite(file, b"".join(map(bytes, pieces)), offset)  # says why not: a full disk

    def rows(self, batch: Batch) -> Tensor | None:
        """The batch's rows as its loader found them, on its device; None where the teacher has to run."""
        return None if batch.stored is None else batch.stored.get(self.spec.name)

    def keep(self, batch: Batch, features: Tensor) -> Tensor:
        """Write the teacher's features of a batch.

        Args:
            features: (B, *row_shape) float; with `masked_only` (B, N, T), of which the batch's mask takes its part.
        Returns: rows as `rows` gives them once they are stored, on the same device: a run is the same to the last bit
            whether it computes features or finds them.
        Raises: DataError where a feature is not finite in float16.
        """
        assert batch.store_rows is not None, "the batch does not come from a loader with stores"
        rows = features.detach().to(torch.float16)
        if not bool(torch.isfinite(rows).all()):
            raise DataError(
                f"the teacher's features reach {float(features.abs().max()):.3g}, which float16 does not hold",
                where=f"samples {', '.join(batch.keys[:3])}, ... for the store {self.spec.path}",
                expected=f"finite numbers up to {_HALF_MAX:g}",
                fix="leave out [teacher.store], or take features of another layer",
            )
        if self.spec.masked_only:
            assert batch.mask is not None
            rows = masked_rows(rows, batch.mask, self.spec.row_shape[0])
        self.write(batch.store_rows.numpy(), rows.cpu())
        return rows

    def at_masked(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Patch features (masked patches of the batch, T), sample by sample, from rows; mask is (B, N) bool."""
        return unpadded_rows(rows, mask) if self.spec.masked_only else rows[mask]

    def close(self) -> None:
        """Close the files."""
        while self._files:
            os.close(self._files.popitem()[1])

    def __getstate__(self) -> dict[str, Any]:
        return self.__dict__ | {"_files": OrderedDict()}  # file numbers mean nothing in another process

    def _trailer(self, place: tuple[int, ...], row: np.ndarray) -> bytes:
        start = zlib.crc32(self._key + repr(place).encode())
        return ROW_MARK + zlib.crc32(row.data, start).to_bytes(4, "little")

    def _path(self, place: tuple[int, ...]) -> Path:
        source, shard, _, view = place
        return self.spec.path / f"source{source}" / f"shard{shard:06d}.view{view}.features"

    def _file(self, place: tuple[int, ...], *, writing: bool) -> int | None:
        """The open file of a place; None where there is none and none is to be made."""
        path = self._path(place)
        if (path, writing) in self._files:
            self._files.move_to_end((path, writing))
            return self._files[path, writing]
        if not (writing or path.exists()):
            return None
        own = own_folder(self.spec)
        with saying_where(self.spec), own.opened(path.parent.name) as folder:
            file = own.open_file(folder, path.name, os.O_RDWR | os.O_CREAT if writing else os.O_RDONLY)
        if writing:
            # To its whole length at once (sparse), so that rows may be written in any order.
            whole = int(self.counts[place[0]][place[1]]) * self.spec.row_bytes
            if os.fstat(file).st_size < whole:
                os.truncate(file, whole)
        self._files[path, writing] = file
        if len(self._files) > _MAX_OPEN_FILES:
            os.close(self._files.popitem(last=False)[1])
        return file


def masked_rows(features: Tensor, mask: Tensor, most: int) -> Tensor:
    """The masked patches of (B, N, T) in order, padded with zeros to (B, most, T)."""
    out = features.new_zeros(len(features), most, features.shape[2])
    counts = mask.sum(dim=1)
    out[torch.arange(most, device=mask.device) < counts[:, None]] = features[mask]
    return out


def unpadded_rows(rows: Tensor, mask: Tensor) -> Tensor:
    """The inverse of `masked_rows`: rows (B, M, T) as (masked patches of the batch, T), equal to `features[mask]`."""
    counts = mask.sum(dim=1)
    return rows[torch.arange(rows.shape[1], device=mask.device) < counts[:, None]]


def open_store(spec: StoreSpec, counts: Sequence[np.ndarray], facts: Mapping[str, Any]) -> FeatureStore:
    """The store of `spec`; made where there is none. Any process may call it at any time.

    Args:
        counts: samples of each shard of each source.
        facts: facts that the loader adds to the spec's own: data, augmentation, masks, views, seed.
    Raises: DataError where the folder holds another store's features, naming what differs.
    """
    return FeatureStore(spec, counts, open_header(spec, facts))
