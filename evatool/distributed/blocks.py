"""The transformer blocks of an objective: the units in which weights come together and activations are recomputed."""

from __future__ import annotations

from torch import nn


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    """Every block of every tower, in the order of the modules; blocks stand in lists called `blocks`, `resblocks`."""
    lists = (part for name, part in objective.named_modules() if name.rpartition(".")[2] in ("blocks", "resblocks"))
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]
