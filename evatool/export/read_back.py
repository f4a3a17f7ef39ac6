"""Written files through the libraries that they are for, one tensor in memory at a time."""

from __future__ import annotations

import mmap
from collections.abc import Iterator
from pathlib import Path

import torch
from safetensors import safe_open
from torch import Tensor

from evatool.formats.safetensors import SafetensorsMap, TensorMap


class ReadBack(TensorMap):
    """The tensors of a written file.

    Attributes:
        reader: what reads it, in words.
    """

    reader = "the format's library"
    _shapes: dict[str, tuple[int, ...]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as the file says."""
        return self._shapes[name]


class LibraryMap(ReadBack):
    """A safetensors file through the library itself, opened anew for every tensor.

    The library maps the file into memory: what was read would count as this process's memory until it is closed. A
    file larger than the memory it may not map for torch at all; then it reads the header, and we the tensors.
    """

    def __init__(self, path: Path) -> None:
        self._path = path
        self._ours: TensorMap | None = None
        try:
            self._shapes = self._read_header("pt")
        except RuntimeError as error:  # of torch's mapping: ENOMEM
            if "mmap" not in str(error):
                raise
            self._shapes = self._read_header("np")
            self._ours = SafetensorsMap(path)
            self.reader = "the format's library (its header) and evatool (the tensors: the file exceeds the memory)"

    def _read_header(self, framework: str) -> dict[str, tuple[int, ...]]:
        with safe_open(self._path, framework=framework) as file:
            return {name: tuple(file.get_slice(name).get_shape()) for name in file.keys()}  # noqa: SIM118

    def __getitem__(self, name: str) -> Tensor:
        if self._ours is not None:
            return self._ours[name]
        with safe_open(self._path, framework="pt") as file:
            tensor: Tensor = file.get_tensor(name)
            return tensor


class TorchMap(ReadBack):
    """A torch file through torch's restricted loader, mapped anew for every tensor, for the same reason."""

    def __init__(self, path: Path) -> None:
        self._path = path
        self._shapes = {name: tuple(tensor.shape) for name, tensor in self._open().items()}

    def __getitem__(self, name: str) -> Tensor:
        return self._open()[name]

    def _open(self) -> dict[str, Tensor]:
        # A shared mapping is not charged to the process: one of a file larger than the memory is allowed.
        with torch.serialization.set_default_mmap_options(mmap.MAP_SHARED):
            tensors: dict[str, Tensor] = torch.load(self._path, weights_only=True, mmap=True)
            return tensors
