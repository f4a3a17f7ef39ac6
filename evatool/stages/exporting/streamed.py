"""The choice of exporting tensor by tensor: for a model that would not fit the memory."""

from __future__ import annotations

import os
from pathlib import Path

import torch

from evatool.core.errors import RecipeError
from evatool.export.base import Exporter
from evatool.export.formats import EXPORTERS
from evatool.recipe.schema.export import ExportSection
from evatool.weights.load import UnloadedClip

_HEADROOM = 1.3  # of the float32 weights: activations, and the copy that a library makes on reading


def needs_streaming(clip: UnloadedClip, section: ExportSection, exporter: Exporter) -> bool:
    """True to export without loading: as the section says, else if the float32 model does not fit the free memory.

    Raises: RecipeError where that is asked for in a format that runs the whole model.
    """
    needed = _HEADROOM * sum(4 * torch.Size(clip.tensors.shape(name)).numel() for name in clip.tensors)
    is_asked = section.streamed if section.streamed is not None else needed > available_memory()
    if is_asked and not exporter.can_stream:
        others = [kind.format for kind in EXPORTERS if kind.streamed_format is not Exporter.streamed_format]
        raise RecipeError(
            f"format = {section.format!r} runs the whole model, which takes about {needed / 1e9:.0f} GB of memory",
            where="export.format",
            expected=f"at most {available_memory() / 1e9:.0f} GB, or a format written tensor by tensor: "
            + ", ".join(others),
            fix="export on a larger machine, or set export.streamed = false to try",
        )
    return is_asked


def available_memory() -> float:
    """Bytes that can be had without swapping."""
    try:
        with Path("/proc/meminfo").open(encoding="ascii") as file:
            line = next(line for line in file if line.startswith("MemAvailable:"))
        return 1024.0 * int(line.split()[1])
    except (OSError, StopIteration):
        return float(os.sysconf("SC_PAGE_SIZE") * os.sysconf("SC_PHYS_PAGES"))
