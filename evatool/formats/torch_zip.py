"""A torch archive written one tensor at a time. Imports torch.

The layout is `torch.save`'s own: a zip archive, uncompressed, with `data.pkl` (the dictionary, its tensors by
reference), `byteorder`, `version` and one entry a tensor below `data/`.
Why not `torch.save`: it needs every tensor in memory at once. Of 512 MB it peaks at 479, this at 64
(docs/benchmarks.md#weight-files); a model of 18 billion parameters would not fit a machine that can convert it.
"""

from __future__ import annotations

import io
import os
import pickle
import zipfile
from collections import OrderedDict
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.formats.safetensors import dtype_of, shape_of, tensor_bytes

_ROOT = "archive"
_STORAGE_BY_DTYPE = {
    torch.float64: torch.DoubleStorage,
    torch.float32: torch.FloatStorage,
    torch.float16: torch.HalfStorage,
    torch.bfloat16: torch.BFloat16Storage,
    torch.int64: torch.LongStorage,
    torch.int32: torch.IntStorage,
    torch.int16: torch.ShortStorage,
    torch.int8: torch.CharStorage,
    torch.uint8: torch.ByteStorage,
    torch.bool: torch.BoolStorage,
}


@dataclass(frozen=True)
class _Storage:
    key: str
    dtype: torch.dtype
    size: int


@dataclass(frozen=True)
class _Reference:
    storage: _Storage
    shape: tuple[int, ...]


class _Pickler(pickle.Pickler):
    """Writes `_Reference`s as torch writes tensors."""

    def persistent_id(self, obj: Any) -> Any:
        if isinstance(obj, _Storage):
            return "storage", _STORAGE_BY_DTYPE[obj.dtype], obj.key, "cpu", obj.size
        return None

    def reducer_override(self, obj: Any) -> Any:
        if not isinstance(obj, _Reference):
            return NotImplemented
        strides = torch.empty(obj.shape, device="meta").stride()
        arguments: tuple[Any, ...] = (obj.storage, 0, obj.shape, strides, False, OrderedDict())
        return torch._utils._rebuild_tensor_v2, arguments


def write_torch_archive(path: Path, tensors: Mapping[str, Tensor]) -> None:
    """Write a flat state dict as `torch.save` would, one tensor in memory at a time, and flush it to the disk.

    Every tensor gets a storage of its own, contiguous.
    """
    references = {}
    for number, name in enumerate(tensors):
        shape, dtype = shape_of(tensors, name), dtype_of(tensors, name)
        size = torch.empty(shape, device="meta").numel()
        references[name] = _Reference(_Storage(str(number), dtype, size), shape)
    head = io.BytesIO()
    _Pickler(head, protocol=2).dump(references)
    with path.open("xb") as raw:
        with zipfile.ZipFile(raw, "w", zipfile.ZIP_STORED, allowZip64=True) as archive:
            for entry, content in (("data.pkl", head.getvalue()), ("byteorder", b"little"), ("version", b"3\n")):
                # A ZipInfo of its own: from a bare name zipfile would write the time of day into the file.
                archive.writestr(zipfile.ZipInfo(f"{_ROOT}/{entry}"), content)
            for name, reference in references.items():
                info = zipfile.ZipInfo(f"{_ROOT}/data/{reference.storage.key}")
                with archive.open(info, "w", force_zip64=True) as file:
                    file.write(tensor_bytes(tensors[name].detach().cpu().contiguous()))
        raw.flush()
        os.fsync(raw.fileno())
