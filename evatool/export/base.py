"""The contract of an export format: which files it writes, from what, and how they are verified."""

from __future__ import annotations

from abc import ABC, abstractmethod
from pathlib import Path
from typing import ClassVar

from evatool.export.folder import Exported, Target
from evatool.export.model_card import CardFacts
from evatool.export.streamed import StreamedFormat
from evatool.inference.loaded_clip import LoadedClip
from evatool.model.config import ModelConfig
from evatool.weights.load import UnloadedClip


class Exporter(ABC):
    """One format that a trained model is written in.

    An exporter writes into `staged_folder(target, ...)`, opens what it wrote with the library that the format is for,
    compares outputs on `fixed_inputs` with the model's own, and lets the folder appear only if they agree. A new format
    is a subclass in a file of this folder and a line in `formats.py`; docs/extending.md shows the smallest one.
    """

    format: ClassVar[str]
    """Its name in `export.format`."""
    writes: ClassVar[str]
    """Its files, in words."""
    verified_by: ClassVar[str]
    """The library that opens them again before they appear, in words."""

    @abstractmethod
    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """Write and verify a model that is in memory.

        Args:
            clip: in float32, its weights rounded to `stored_dtype`, which is the dtype to write.
            facts: for the model card.
            target: where to, and how much the reloaded model may differ.
        Raises: EvatoolError beyond the tolerance or on a full disk; UsageError if the folder already holds an export;
        RecipeError if the format cannot hold this model. Then nothing of the export is left.
        """

    @abstractmethod
    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """One line of Python that opens the folder in the library that the format is for."""

    def streamed_format(self, clip: UnloadedClip, facts: CardFacts, target: Target) -> StreamedFormat | None:
        """The way to write a model larger than the memory; None for a format whose writer runs the whole model."""
        return None

    @property
    def can_stream(self) -> bool:
        """True where the format has a `streamed_format`."""
        return type(self).streamed_format is not Exporter.streamed_format
