"""Weights on disk, of any kind, as lazy mappings: a tensor is read when asked for, so that nothing is held twice.

No pickle is ever executed: torch archives are parsed with a closed table of inert stand-ins (`pickles.py`).
"""

from __future__ import annotations

import json
from collections.abc import Iterator, Mapping
from pathlib import Path

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.formats.deepspeed_checkpoint import deepspeed_folder, open_deepspeed
from evatool.formats.safetensors import SafetensorsMap, TensorMap, dtype_of, shape_of
from evatool.formats.torch_pickle import open_torch_archive

# Names of a folder's only weight file, in the order in which libraries prefer them.
_SINGLE_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.pt",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


NO_WEIGHTS = "this folder holds no weights"


class MergedMap(TensorMap):
    """The tensors of several files as one mapping."""

    def __init__(self, owners: Mapping[str, Mapping[str, Tensor]]) -> None:
        self._owners = dict(owners)
        self.gives_copies = all(getattr(owner, "gives_copies", False) for owner in self._owners.values())

    def __getitem__(self, name: str) -> Tensor:
        return self._owners[name][name]

    def __iter__(self) -> Iterator[str]:
        return iter(self._owners)

    def __len__(self) -> int:
        return len(self._owners)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape in its file."""
        return shape_of(self._owners[name], name)

    def dtype(self, name: str) -> torch.dtype:
        """Dtype in its file."""
        return dtype_of(self._owners[name], name)


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors at `path`, by content and not by name.

    A file: safetensors, any torch archive, or the index of a sharded model. A folder: a DeepSpeed checkpoint, or a
    model in one file or in shards with an index, as the Hugging Face hub has them.

    Raises: CheckpointError for what is neither, incomplete, damaged, or holds objects that are not plain data.
    """
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError("there is no such file", where=str(path))
    with path.open("rb") as file:
        head = file.read(9)
    if not head:
        raise CheckpointError("the file is empty", where=str(path), fix="copy or download the file again")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_torch_archive(path)
    if head[8:9] == b"{":
        return SafetensorsMap(path)
    raise CheckpointError(
        "this is no weight file that evatool reads",
        where=str(path),
        expected="safetensors, a torch archive (.pt, .bin, .pth) or an index of shards (*.index.json)",
    )


def _open_folder(path: Path) -> Mapping[str, Tensor]:
    deepspeed = deepspeed_folder(path)
    if deepspeed is not None:
        return open_deepspeed(deepspeed)
    indices = sorted(path.glob("*.index.json"))
    if indices:
        preferred = [index for index in indices if index.name.endswith(".safetensors.index.json")]
        return _open_index((preferred or indices)[0])
    for name in _SINGLE_FILES:
        if (path / name).is_file():
            return open_weights(path / name)
    raise CheckpointError(
        NO_WEIGHTS,
        where=str(path),
        expected="a DeepSpeed checkpoint, an index of shards, or one of " + ", ".join(_SINGLE_FILES),
    )


def _open_index(index: Path) -> MergedMap:
    try:
        weight_map: dict[str, str] = json.loads(index.read_text(encoding="utf-8"))["weight_map"]
        names = sorted(set(weight_map.values()))
    except (ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError("the index of shards cannot be read", where=str(index)) from error
    outside = [name for name in names if Path(name).name != name]
    missing = [name for name in names if not (index.parent / name).is_file()]
    if outside or missing:
        raise CheckpointError(
            f"{len(outside or missing)} of {len(names)} shards are not in the folder: {', '.join(outside or missing)}",
            where=str(index),
            fix="download the missing shards beside the index",
        )
    shards = {name: open_weights(index.parent / name) for name in names}
    lost = [tensor for tensor, name in weight_map.items() if tensor not in shards[name]]
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors are not in the shards that the index names: {', '.join(lost[:4])} ...",
            where=str(index),
            fix="download index and shards from the same place",
        )
    return MergedMap({tensor: shards[name] for tensor, name in weight_map.items()})
