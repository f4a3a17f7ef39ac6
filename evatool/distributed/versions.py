"""Versions that must be the same on every rank: ranks of different ones may disagree without a word."""

from __future__ import annotations

import platform
from importlib import metadata

import torch

import evatool
from evatool.core.errors import UsageError
from evatool.distributed.collectives import gather_objects


def own_versions() -> dict[str, str]:
    """Python, torch with what it was built for, evatool and DeepSpeed of this process."""
    try:
        deepspeed = metadata.version("deepspeed")
    except metadata.PackageNotFoundError:
        deepspeed = "none"
    return {
        "python": ".".join(platform.python_version_tuple()[:2]),
        "torch": torch.__version__,
        "cuda": str(torch.version.cuda or torch.version.hip),
        "evatool": evatool.__version__,
        "deepspeed": deepspeed,
    }


def check_versions() -> None:
    """Every rank must call it. Raises: UsageError, on every rank, naming the ranks whose versions are not rank 0's."""
    found = gather_objects((platform.node(), own_versions()))
    first = found[0][1]
    deviating = [
        f"rank {rank} on {node}: {', '.join(f'{n} {v} (rank 0: {first[n]})' for n, v in own.items() if v != first[n])}"
        for rank, (node, own) in enumerate(found)
        if own != first
    ]
    if deviating:
        raise UsageError(
            f"{len(deviating)} of {len(found)} ranks run other versions: {'; '.join(deviating[:4])}",
            where="environment",
            expected="the same Python, torch, evatool and DeepSpeed on every machine",
            fix="install the same environment everywhere, then start again",
        )
