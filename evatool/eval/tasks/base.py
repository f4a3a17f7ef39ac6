"""What this package needs of a model and of an evaluation set. Stages hand in objects of other packages that fit."""

from __future__ import annotations

from collections.abc import Iterable
from typing import Any, Protocol

from torch import Tensor

# B batch, S input side in pixels, L text tokens, E embedding


class ClipModel(Protocol):
    """The part of a loaded CLIP that evaluation calls."""

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) pictures as (B, E) features, not normalised."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 tokens as (B, E) features, not normalised."""
        ...


class EvaluationSet(Protocol):
    """An opened set; its loader can be iterated more than once and keeps its order."""

    @property
    def name(self) -> str: ...
    @property
    def kind(self) -> str:
        """`classification` or `retrieval`."""
        ...

    @property
    def classnames(self) -> list[str]: ...
    @property
    def templates(self) -> list[str]:
        """Prompts with `{c}` where the class name goes."""
        ...

    @property
    def loader(self) -> Iterable[Any]:
        """Batches (pictures (B, 3, S, S), labels (B,)), or (pictures, B lists of captions) for retrieval."""
        ...
