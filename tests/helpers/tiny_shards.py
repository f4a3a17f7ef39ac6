"""Small sets of shards for tests of the training loader."""

from __future__ import annotations

import io
import tarfile
from collections.abc import Mapping, Sequence
from itertools import islice
from pathlib import Path
from typing import Any

import torch
from sample_pictures import image

from evatool.core.batch import Batch
from evatool.data.tar.writer import Sample, ShardWriter
from evatool.data.train.loader import TrainLoader, build_train_loader
from evatool.recipe.schema import TrainDataSection


def write_prepared(folder: Path, num_samples: int, per_shard: int, prefix: str = "k", **members: bytes) -> Path:
    """A folder as `data-prepare` leaves it; sample i has key `<prefix>0000i`."""
    with ShardWriter(folder, samples_per_shard=per_shard) as writer:
        for i in range(num_samples):
            extra = {"txt": f"words {prefix}{i}".encode(), "json": b"{}", **members}
            writer.write(Sample(f"{prefix}{i:05d}", "png", image(seed=i % 50), extra, 2304))
        writer.finish(max_pixels=10_000)
    return folder


def write_tar(path: Path, samples: Mapping[str, Mapping[str, bytes]]) -> Path:
    """A plain tar: key -> extension -> bytes."""
    path.parent.mkdir(parents=True, exist_ok=True)
    with tarfile.open(path, "w") as tar:
        for key, members in samples.items():
            for extension, data in members.items():
                add_member(tar, f"{key}.{extension}", data)
    return path


def add_member(tar: tarfile.TarFile, name: str, data: bytes) -> None:
    entry = tarfile.TarInfo(name)
    entry.size = len(data)
    tar.addfile(entry, io.BytesIO(data))


def plain_samples(numbers: Sequence[int], prefix: str = "k") -> dict[str, dict[str, bytes]]:
    return {f"{prefix}{i:05d}": {"png": image(seed=i % 50), "txt": f"words {i}".encode()} for i in numbers}


def loader(section: Mapping[str, Any], **options: Any) -> TrainLoader:
    """A loader of pictures at 8 pixels and words; `section` as in a recipe's `[data]`."""
    options = {
        "image_size": 8,
        "context_length": 8,
        "global_batch_size": 16,
        "rank": 0,
        "world_size": 1,
        "seed": 5,
        "tokenizer": count_letters,
        **options,
    }
    return build_train_loader(TrainDataSection.model_validate_json(_json(section), strict=True), **options)


def count_letters(captions: list[str]) -> torch.Tensor:
    """A tokenizer in no time: the words' length and first and last letters."""
    rows = [[len(c), ord(c[0]), ord(c[-1]), 0, 49407, 0, 0, 0] for c in captions]
    return torch.tensor(rows, dtype=torch.int64)


def take(found: TrainLoader, n: int) -> list[Batch]:
    return list(islice(found, n))


def keys(batches: Sequence[Batch]) -> list[str]:
    return [key for batch in batches for key in batch.keys]


def _json(section: Mapping[str, Any]) -> str:
    import json

    return json.dumps(section, default=str)
