"""What a MIM run shows of itself on the way: pictures, and the loss on pictures it does not learn from. No torch."""

from __future__ import annotations

from pathlib import Path

from evatool.recipe.schema.base import Positive, Section


class ImagesSection(Section):
    """What the student saw, and how well it filled in the rest."""

    every_steps: Positive | None = None
    """Steps between two sheets in the run folder's `pictures/`; only one at the end when absent."""
    num_images: Positive = 6
    """Pictures of a sheet, the first ones of the run."""


class ValidationSection(Section):
    """The loss on held-out pictures, uncropped, under a mask that is always the same."""

    data: Path
    """Folder with held-out shards and their `manifest.json`, or local tars by glob."""
    every_steps: Positive
    """Steps between two validations; a multiple of train.log_every. One more at the end."""
    max_samples: Positive | None = None
    """Use only this many; all when absent."""
