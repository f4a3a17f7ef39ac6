"""Frozen CLIP and image models that are loaded when they are first asked for features."""

# B batch, S input side in pixels, N patches, T width of the features

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

from torch import Tensor, nn

from evatool.distributed.engines.amp import own_precision
from evatool.model.config import ModelConfig
from evatool.teachers.timm import resize_grid


@dataclass(frozen=True)
class TeacherFacts:
    """The facts that a run needs of a teacher before it runs, if it runs at all."""

    name: str
    fingerprint: str
    """Equal if and only if two teachers give the same features; "" where no store asks for it."""
    image_size: int
    grid: tuple[int, int]
    width: int
    context_length: int = 0
    logit_scale: float = 1.0
    config: dict[str, Any] | None = None
    """The configuration, where the teacher is a CLIP."""


class LazyTeacher:
    """A frozen model that is loaded when it is first asked for features.

    Args:
        facts: known without its weights.
        load: reads its weights, onto this rank's device.
        loaded: the model, where it is there already.
    """

    def __init__(self, facts: TeacherFacts, load: Callable[[], Any], loaded: Any = None) -> None:
        self.facts, self._load, self._loaded = facts, load, loaded

    @property
    def loaded(self) -> Any:
        """The teacher itself."""
        if self._loaded is None:
            self._loaded = self._load()
        return self._loaded

    @property
    def config(self) -> ModelConfig:
        """A CLIP's configuration."""
        assert self.facts.config is not None
        return ModelConfig.from_json(self.facts.config)

    @property
    def image_size(self) -> int:
        """Input side in pixels."""
        return self.facts.image_size

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        return self.facts.width

    @property
    def context_length(self) -> int:
        """Text tokens of a caption."""
        return self.facts.context_length

    @property
    def logit_scale(self) -> float:
        """The temperature's inverse, exponentiated."""
        return self.facts.logit_scale

    @property
    def model(self) -> nn.Module:
        """The towers."""
        model: nn.Module = self.loaded.model
        return model

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, T)."""
        with own_precision(image):
            features: Tensor = self.loaded.encode_image(image)
            return features


class GridTeacher:
    """A teacher whose patch features are carried to the student's grid (a `PatchTeacher`)."""

    def __init__(self, teacher: LazyTeacher, grid: tuple[int, int]) -> None:
        self.teacher, self.grid = teacher, grid

    def visual_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, T) float32."""
        with own_precision(image):
            return resize_grid(self.teacher.loaded.visual_tokens(image), self.teacher.facts.grid, self.grid)
