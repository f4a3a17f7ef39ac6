"""What a MIM run shows of itself on the way: pictures, and the loss on pictures it does not learn from. No torch."""

from __future__ import annotations

from pathlib import Path

from evatool.recipe.schema.base import Positive, Section


class ImagesSection(Section):
    """Sheets of pictures that show what the student saw, and how well it filled in the rest."""

    every_steps: Positive | None = None
    """Number of optimiser steps between two sheets in the run folder's `pictures/`. One sheet is drawn at the end in
    any case, and only that one when it is absent."""
    num_images: Positive = 6
    """Number of pictures on a sheet. They are the first ones of the run, so that sheets can be compared."""


class ValidationSection(Section):
    """The loss on pictures that are not learned from, uncropped, under a mask that is always the same."""

    data: Path
    """Folder with held-out shards and their `manifest.json`, or local tars given by a glob."""
    every_steps: Positive
    """Number of optimiser steps between two validations, a multiple of `train.log_every`. One more is made at the end.
    """
    max_samples: Positive | None = None
    """Largest number of samples to use. All are used when it is absent; lower it where the set is so large that
    validation slows training down."""
