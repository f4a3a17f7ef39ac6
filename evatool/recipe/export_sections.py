"""The recipe of an export. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evatool.recipe.section import PositiveFloat, Section


class ExportSection(Section):
    """What to write."""

    checkpoint: str
    """Model to export, as `evatool.load_clip` reads it: run folder, checkpoint folder or released file."""
    format: Literal["open_clip"] = "open_clip"
    """`open_clip`: a folder for `local-dir:`."""
    tolerance: PositiveFloat = 1e-5
    """Largest relative L2 difference between our features and the reloaded export's."""


class ExportRecipe(Section):
    """A trained model as files that other libraries load; verified by reloading it there."""

    stage: Literal["export"] = "export"
    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Output folder; `runs/<recipe name>` when absent."""
    export: ExportSection
