"""DeepSpeed checkpoint folders: whole float32 tensors out of ZeRO's partitions, without importing DeepSpeed.

ZeRO 1 and 2 keep one flat float32 vector a parameter group, cut over the ranks; ZeRO 3 cuts every parameter over the
ranks and lays the pieces of one rank end to end. ZeRO 0 keeps the weights whole, in the precision of the run.
Why not DeepSpeed's own `zero_to_fp32.py`: it loads with `weights_only=False`, which runs code from the file (three
calls in 0.19.8), and gives all tensors at once; here one is in memory at a time (docs/benchmarks.md#weight-files).
Source: deepspeed/utils/zero_to_fp32.py describes the layout; tests/model/test_foreign.py compares with it.
"""

from __future__ import annotations

import math
import re
from collections.abc import Iterator, Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.core.regular_files import read_regular_text
from evatool.formats.safetensors import TensorMap
from evatool.formats.torch_pickle import Archive, StoredTensor, read_archive

_MODEL_STATES = re.compile(r"(?:zero_pp_rank_(\d+)_)?mp_rank_00_model_states\.pt")
_OPTIM_STATES = re.compile(r"(?:bf16_|fp16_)?zero_pp_rank_(\d+)_mp_rank_00_optim_states\.pt")


@dataclass(frozen=True)
class _Piece:
    """Consecutive elements of one rank's flat vector."""

    archive: Archive
    flat: StoredTensor
    start: int
    count: int


class ZeroMap(TensorMap):
    """Tensors put together from the ranks' partitions, each when it is asked for."""

    def __init__(self, shapes: Mapping[str, tuple[int, ...]], pieces: Mapping[str, list[_Piece]]) -> None:
        self._shapes, self._pieces = dict(shapes), dict(pieces)

    def __getitem__(self, name: str) -> Tensor:
        shape = self._shapes[name]
        found = sum(piece.count for piece in self._pieces[name])
        if found < math.prod(shape):  # before memory is taken for it
            raise CheckpointError(f"{name}: {found} of {math.prod(shape)} elements are in the checkpoint's files")
        flat = torch.empty(math.prod(shape), dtype=self.dtype(name))
        done = 0
        for piece in self._pieces[name]:
            count = min(piece.count, len(flat) - done)  # the last rank's piece of a parameter may end in padding
            if count > 0:
                flat[done : done + count] = piece.archive.part(piece.flat, piece.start, count, name)
                done += count
        assert done == len(flat), f"{name}: {done} of {len(flat)} elements were found"
        return flat.reshape(shape)

    def __iter__(self) -> Iterator[str]:
        return iter(self._shapes)

    def __len__(self) -> int:
        return len(self._shapes)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape of the whole parameter."""
        return self._shapes[name]

    def dtype(self, name: str) -> torch.dtype:
        """Dtype of the partitions."""
        return self._pieces[name][0].flat.dtype


def deepspeed_folder(path: Path) -> Path | None:
    """The folder with the files of one DeepSpeed checkpoint at or below `path` (by its `latest` file), else None."""
    if any(_MODEL_STATES.fullmatch(entry.name) for entry in path.iterdir()):
        return path
    latest = path / "latest"
    if not latest.is_file():
        return None
    try:
        tag = path / read_regular_text(latest, 4096).strip()
    except (ValueError, OSError) as error:
        raise CheckpointError(f"`latest` cannot be read: {error}", where=str(latest)) from error
    if tag.parent == path and tag.is_dir() and any(_MODEL_STATES.fullmatch(entry.name) for entry in tag.iterdir()):
        return tag
    raise CheckpointError(
        f"`latest` names {tag.name!r}, which holds no DeepSpeed checkpoint",
        where=str(path),
        fix="name the folder of a complete checkpoint",
    )


def open_deepspeed(folder: Path) -> Mapping[str, Tensor]:
    """The weights of a DeepSpeed checkpoint: the float32 masters where the optimiser's files are there.

    Raises: CheckpointError where a rank's file is missing or damaged.
    """
    try:
        return _whole_tensors(folder)
    except (LookupError, TypeError, ValueError, AttributeError, AssertionError, OverflowError) as error:
        raise CheckpointError(
            "the files of this DeepSpeed checkpoint do not hold what DeepSpeed writes",
            where=str(folder),
            expected="model and optimiser states as its engines of ZeRO stage 0 to 3 save them",
            fix="copy the whole checkpoint folder again",
        ) from error


def _whole_tensors(folder: Path) -> Mapping[str, Tensor]:
    model_files = _by_rank(folder, _MODEL_STATES)
    optim_files = _by_rank(folder, _OPTIM_STATES)
    models = {rank: read_archive(file) for rank, file in model_files.items()}
    root, reader = models[min(models)]
    shapes = root.get("param_shapes")
    if not optim_files or not shapes:
        return _full_weights(root, reader, folder)
    optims = [read_archive(file) for _, file in sorted(optim_files.items())]
    _check_ranks(optims, sorted(optim_files), folder)
    is_stage3 = "fp32_flat_groups" in optims[0][0]["optimizer_state_dict"]
    trainable = _stage3(shapes, optims) if is_stage3 else _stage12(shapes, optims)
    others = _frozen(models, is_stage3) | _buffers(root, reader)
    for name, pieces in others.items():
        trainable.setdefault(name, pieces)
    for name, same_as in (root.get("shared_params") or {}).items():
        trainable[name] = trainable[same_as]
    return ZeroMap(
        {n: shape for n, (shape, _) in trainable.items()}, {n: pieces for n, (_, pieces) in trainable.items()}
    )


_Found = dict[str, tuple[tuple[int, ...], list[_Piece]]]


def _stage12(shapes: list[Mapping[str, Any]], optims: list[tuple[Any, Archive]]) -> _Found:
    """One flat vector a group over all ranks; parameters lie in it one after the other."""
    found: _Found = {}
    states = [root["optimizer_state_dict"] for root, _ in optims]
    paddings = states[0].get("param_alignment_paddings")
    for number, group in enumerate(shapes):
        vectors = [
            (state["single_partition_of_fp32_groups"][number], reader) for state, (_, reader) in _zip(states, optims)
        ]
        offset = 0
        for index, (name, shape) in enumerate(group.items()):
            shape = tuple(shape)
            found[name] = (shape, _cut(vectors, offset, math.prod(shape)))
            offset += math.prod(shape) + (paddings[number][index] if paddings else 0)
    return found


def _zip(states: list[Any], optims: list[tuple[Any, Archive]]) -> Iterator[tuple[Any, tuple[Any, Archive]]]:
    return zip(states, optims, strict=True)


def _cut(vectors: list[tuple[StoredTensor, Archive]], offset: int, count: int) -> list[_Piece]:
    """`count` elements from `offset` of the vectors laid end to end."""
    pieces: list[_Piece] = []
    begin = 0
    for flat, archive in vectors:
        size = math.prod(flat.size)
        start, end = max(offset, begin), min(offset + count, begin + size)
        if start < end or (count == 0 and not pieces):
            pieces.append(_Piece(archive, flat, start - begin, max(end - start, 0)))
        begin += size
    return pieces


def _stage3(shapes: list[Mapping[str, Any]], optims: list[tuple[Any, Archive]]) -> _Found:
    """Every parameter is cut over the ranks; a rank's pieces lie end to end over its flat vectors."""
    found: _Found = {}
    world_size, offset = len(optims), 0
    vectors = [[(flat, reader) for flat in root["optimizer_state_dict"]["fp32_flat_groups"]] for root, reader in optims]
    for group in shapes:
        for name, shape in group.items():
            shape = tuple(shape)
            share = math.ceil(math.prod(shape) / world_size)
            found[name] = (shape, [piece for rank in vectors for piece in _cut(rank, offset, share)])
            offset += share
    return found


def _frozen(models: Mapping[int, tuple[Any, Archive]], is_stage3: bool) -> _Found:
    """Parameters without gradient: whole in ZeRO 1 and 2, one fragment a rank in ZeRO 3."""
    found: _Found = {}
    ranks = sorted(models) if is_stage3 else [min(models)]
    for name, shape in (models[ranks[0]][0].get("frozen_param_shapes") or {}).items():
        pieces = []
        for rank in ranks:
            root, reader = models[rank]
            pieces.append(_whole(root["frozen_param_fragments"][name], reader))
        found[name] = (tuple(shape), pieces)
    return found


def _buffers(root: Mapping[str, Any], reader: Archive) -> _Found:
    module = root["module"]
    return {name: (module[name].size, [_whole(module[name], reader)]) for name in root.get("buffer_names") or []}


def _whole(stored: StoredTensor, archive: Archive) -> _Piece:
    """A contiguous tensor as one piece."""
    count = math.prod(stored.size)
    steps = tuple(math.prod(stored.size[i + 1 :]) for i in range(len(stored.size)))
    assert stored.stride == steps or count <= 1, f"a tensor of strides {stored.stride} is not contiguous"
    flat = StoredTensor(stored.storage, stored.dtype, stored.storage_size, stored.offset, (count,), (1,))
    return _Piece(archive, flat, 0, count)


def _full_weights(root: Any, reader: Archive, folder: Path) -> Mapping[str, Tensor]:
    """The weights as the run held them (ZeRO 0, or a copy without the optimiser's files)."""
    module = root.get("module")
    tensors = {name: value for name, value in (module or {}).items() if isinstance(value, StoredTensor)}
    empty = [name for name, value in tensors.items() if 0 in value.size]
    if not tensors or empty:
        raise CheckpointError(
            "this ZeRO-3 checkpoint has its weights in the optimiser's files, which are not here",
            where=str(folder),
            expected="zero_pp_rank_*_mp_rank_00_optim_states.pt beside the model states",
            fix="copy the whole checkpoint folder",
        )
    return ZeroMap(
        {name: value.size for name, value in tensors.items()},
        {name: [_whole(value, reader)] for name, value in tensors.items()},
    )


def _by_rank(folder: Path, pattern: re.Pattern[str]) -> dict[int, Path]:
    found = ((pattern.fullmatch(path.name), path) for path in folder.iterdir())
    return {int(match.group(1) or 0): path for match, path in found if match}


def _check_ranks(optims: list[tuple[Any, Archive]], ranks: list[int], folder: Path) -> None:
    state = optims[0][0].get("optimizer_state_dict")
    if not isinstance(state, Mapping) or "partition_count" not in state:
        raise CheckpointError("the optimiser's files hold no ZeRO state", where=str(folder))
    counts = state["partition_count"]
    world_size = max(counts) if isinstance(counts, list | tuple) else counts
    if type(world_size) is not int or ranks != list(range(min(world_size, len(ranks) + 1))):
        missing = sorted(set(range(min(world_size, 10_000))) - set(ranks)) if type(world_size) is int else []
        raise CheckpointError(
            f"the checkpoint was written by {world_size} ranks, and the files of {len(ranks)} are here",
            where=str(folder),
            expected="one optim_states file a rank"
            + (f"; missing: rank {', '.join(map(str, missing))}" if missing else ""),
            fix="copy the whole checkpoint folder",
        )
