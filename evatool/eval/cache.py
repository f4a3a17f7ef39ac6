"""A cache between evaluations: text classifiers, features, fingerprints of weight files.

Every file is named by a digest of all that its content depends on, so nothing in here is ever stale; it may be
deleted at any time.
"""

from __future__ import annotations

import hashlib
import io
import json
from pathlib import Path

import numpy as np
import torch
from torch import Tensor

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import read_json
from evatool.core.disk import can_wait

_FINGERPRINTS = "fingerprints.json"


class TensorCache:
    """Tensors of one kind and origin on disk, by key.

    Args:
        folder: made when something is kept.
        kind: "classifiers" or "features": a folder of its own.
        origin: all that the tensors depend on besides the key, for instance a model's fingerprint and precision.
        writes: False where another process of this run keeps the same.
    """

    def __init__(self, folder: Path, kind: str, *origin: str, writes: bool = True) -> None:
        self._folder, self._origin, self._writes = folder / kind, origin, writes

    def get(self, key: str) -> Tensor | None:
        """The tensor kept under that key; None where there is none, or it is damaged."""
        try:
            content = self._path(key).read_bytes()
        except OSError:
            return None
        digest, _, body = content.partition(b"\n")
        if digest != hashlib.sha256(body).hexdigest().encode():
            return None  # cut off or changed on disk: it is built again
        return torch.from_numpy(np.load(io.BytesIO(body), allow_pickle=False))

    def put(self, key: str, value: Tensor) -> None:
        """Keep it; complete or not there. A full disk is a warning: what is kept saves time only."""
        if not self._writes:
            return
        buffer = io.BytesIO()
        np.save(buffer, value.detach().cpu().contiguous().numpy(), allow_pickle=False)
        body = buffer.getvalue()
        content = hashlib.sha256(body).hexdigest().encode() + b"\n" + body
        with can_wait(f"{self._folder}: this part of the cache"):
            write_bytes_atomically(self._path(key), content, make_parents=True)

    def _path(self, key: str) -> Path:
        digest = hashlib.sha256(json.dumps([*self._origin, key]).encode()).hexdigest()
        return self._folder / digest[:2] / f"{digest}.npy"


class FingerprintCache:
    """Fingerprints of what was made of large files, by the files' paths, sizes and times of writing."""

    def __init__(self, folder: Path) -> None:
        self._path = folder / _FINGERPRINTS

    def get(self, files: list[Path], *about: str) -> str | None:
        """The fingerprint of what these files gave; None where one of them is new or was written since."""
        found = self._read().get(self._key(files, about))
        return found if isinstance(found, str) else None

    def put(self, fingerprint: str, files: list[Path], *about: str) -> None:
        """Remember it."""
        known = self._read() | {self._key(files, about): fingerprint}
        with can_wait(f"{self._path}: the cache of fingerprints"):
            write_bytes_atomically(self._path, json.dumps(known, indent=1).encode(), make_parents=True)

    def _read(self) -> dict[str, object]:
        try:
            known = read_json(self._path, 256 * 2**20, memory_per_byte=20)
        except (OSError, ValueError):
            return {}
        return known if isinstance(known, dict) else {}

    @staticmethod
    def _key(files: list[Path], about: tuple[str, ...]) -> str:
        stamps = []
        for path in files:
            status = path.stat()
            stamps.append([str(path.resolve()), status.st_size, status.st_mtime_ns])
        return json.dumps([sorted(stamps), *about])
