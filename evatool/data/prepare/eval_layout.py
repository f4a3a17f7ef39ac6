"""Evaluation sets on disk, in the layout that clip-benchmark reads as `wds/<name>` from a local folder.

    <set>/test/0.tar  <set>/test/nshards.txt  <set>/classnames.txt
    <set>/zeroshot_classification_templates.txt  <set>/dataset_type.txt

Source: clip_benchmark/datasets/builder.py (1.6.2). Our own manifest stands beside the tar in `test/`.
"""

from __future__ import annotations

from collections.abc import Iterable, Sequence
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.data.tar.writer import Sample, ShardWriter


def write_eval_set(
    folder: Path,
    samples: Iterable[Sample],
    *,
    kind: str,
    classnames: Sequence[str],
    templates: Sequence[str],
    **extra: Any,
) -> dict[str, Any]:
    """Write one set; returns its manifest.

    Args:
        folder: the set's folder, made here.
        samples: with a `cls` member (class number) for kind "classification", `txt` for "retrieval".
        templates: prompts with `{c}` in place of the class name.
        extra: further entries of the manifest.
    """
    # One tar: clip-benchmark numbers tars from 0, and webdataset 1.x refuses fewer tars than worker processes.
    with ShardWriter(folder / "test", samples_per_shard=1_000_000_000, name="{:d}") as writer:
        for sample in samples:
            writer.write(sample)
        manifest = writer.finish(kind=kind, num_classes=len(classnames), **extra)
    write_bytes_atomically(folder / "test" / "nshards.txt", str(len(manifest["shards"])).encode())
    write_bytes_atomically(folder / "dataset_type.txt", kind.encode())
    if kind == "classification":
        write_bytes_atomically(folder / "classnames.txt", "\n".join(classnames).encode())
        write_bytes_atomically(folder / "zeroshot_classification_templates.txt", "\n".join(templates).encode())
    return manifest
