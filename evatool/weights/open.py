"""Weights on disk, of any kind, as lazy mappings: a tensor is read when asked for, so that nothing is held twice.

No pickle is ever executed: `formats/torch_pickle.py` parses torch archives with a closed table of inert stand-ins.
"""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path

from torch import Tensor

from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError
from evatool.core.regular_files import is_regular, open_regular
from evatool.formats.deepspeed_checkpoint import deepspeed_folder, open_deepspeed
from evatool.formats.safetensors import SafetensorsMap
from evatool.formats.torch_pickle import open_torch_archive
from evatool.weights.mapped_tensors import MergedMap
from evatool.weights.wrappers import unwrapped

_MAX_INDEX_BYTES = 32 * 2**20

# Names of a folder's only weight file, in the order in which libraries prefer them.
_SINGLE_FILES = (
    "open_clip_model.safetensors",
    "open_clip_pytorch_model.safetensors",
    "model.safetensors",
    "model.pt",
    "open_clip_pytorch_model.bin",
    "pytorch_model.bin",
)


def open_weights(path: Path, weights: str | None = None) -> Mapping[str, Tensor]:
    """The tensors of the model at `path`, by content and not by name, without what training put around their names.

    A file: safetensors, any torch archive, or the index of a sharded model. A folder: a DeepSpeed checkpoint, or a
    model in one file or in shards with an index, as the Hugging Face hub has them.

    Args:
        weights: which of several models in a file, as in `unwrapped`.
    Raises: CheckpointError for what is neither, incomplete, damaged, or holds objects that are not plain data.
    """
    return unwrapped(_open_all(path), str(path), weights)


def _open_all(path: Path) -> Mapping[str, Tensor]:
    """Every tensor at `path` under the name that it has there."""
    if path.is_dir():
        return _open_folder(path)
    if not path.exists():
        raise CheckpointError("there is no such file", where=str(path))
    try:
        with open_regular(path) as file:
            head = file.read(9)
    except OSError as error:
        raise CheckpointError(f"the weights cannot be read: {error.strerror}", where=str(path)) from error
    if not head:
        raise CheckpointError("the file is empty", where=str(path), fix="copy or download the file again")
    if path.name.endswith(".index.json"):
        return _open_index(path)
    if head[8:9] == b"{":  # first: the length before it may begin with any byte, a pickle's 0x80 among them
        return SafetensorsMap(path)
    if head[:4] == b"PK\x03\x04" or head[:1] == b"\x80":
        return open_torch_archive(path)
    raise CheckpointError(
        "this is no weight file that evatool reads",
        where=str(path),
        expected="safetensors, a torch archive (.pt, .bin, .pth) or an index of shards (*.index.json)",
    )


def weights_in(folder: Path) -> Path | None:
    """The folder of a DeepSpeed checkpoint, the index of shards or the weight file in `folder`; None without one.

    Raises: CheckpointError where `latest` names a DeepSpeed checkpoint that is not there.
    """
    deepspeed = deepspeed_folder(folder)
    if deepspeed is not None:
        return deepspeed
    indices = sorted(folder.glob("*.index.json"))
    if indices:
        preferred = [index for index in indices if index.name.endswith(".safetensors.index.json")]
        return (preferred or indices)[0]
    return next((folder / name for name in _SINGLE_FILES if (folder / name).is_file()), None)


def _open_folder(path: Path) -> Mapping[str, Tensor]:
    found = weights_in(path)
    if found is None:
        raise CheckpointError(
            "this folder holds no weights",
            where=str(path),
            expected="a DeepSpeed checkpoint, an index of shards, or one of " + ", ".join(_SINGLE_FILES),
        )
    return open_deepspeed(found) if found.is_dir() else _open_all(found)


def _open_index(index: Path) -> MergedMap:
    try:
        weight_map: dict[str, str] = read_json(index, _MAX_INDEX_BYTES)["weight_map"]
        names = sorted(set(weight_map.values()))
        outside = [name for name in names if Path(name).name != name or name.endswith(".index.json")]
        missing = [name for name in names if not is_regular(index.parent / name)]
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as error:
        raise CheckpointError(
            f"the index of shards cannot be read: {str(error)[:300]}",
            where=str(index),
            expected='a JSON object whose "weight_map" has a file beside the index for each tensor',
        ) from error
    if outside or missing:
        some = ", ".join(name[:100] for name in (outside or missing)[:4])
        raise CheckpointError(
            f"{len(outside or missing)} of {len(names)} shards are not in the folder: {some}",
            where=str(index),
            fix="download the missing shards beside the index",
        )
    shards = {name: _open_all(index.parent / name) for name in names}
    lost = [tensor for tensor, name in weight_map.items() if tensor not in shards[name]]
    if lost:
        raise CheckpointError(
            f"{len(lost)} tensors are not in the shards that the index names: {', '.join(lost[:4])} ...",
            where=str(index),
            fix="download index and shards from the same place",
        )
    return MergedMap({tensor: shards[name] for tensor, name in weight_map.items()})
