"""Weight files of any kind as lazy mappings: a tensor is read when asked for, so that nothing is held twice.

No pickle is ever executed: torch archives are parsed with a closed table of inert stand-ins (`pickles.py`).
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from evatool.errors import CheckpointError
from evatool.model.pickles import open_torch_archive
from evatool.tensorfile import SafetensorsMap


def open_weights(path: Path) -> Mapping[str, Tensor]:
    """The tensors of a weight file, by content and not by name: safetensors or any torch archive.

    Raises CheckpointError for what is neither, damaged, or holds objects that are not plain data.
    """
    if not path.exists():
        raise CheckpointError("there is no such file", where=str(path))
    if path.stat().st_size == 0:
        raise CheckpointError("the file is empty", where=str(path), fix="copy or download the file again")
    with path.open("rb") as file:
        head = file.read(9)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_torch_archive(path)
    if head[8:9] == b"{":
        return SafetensorsMap(path)
    raise CheckpointError(
        "this is no weight file that evatool reads",
        where=str(path),
        expected="safetensors, or a torch archive (.pt, .bin, .pth)",
    )
