"""The models of a training recipe: what is built, and where its first weights come from. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, Positive, Section


class NoInit(Section):
    """Random weights."""

    kind: Literal["none"] = "none"


class ImageTowerInit(Section):
    """Image tower from a MIM or CLIP model; text tower, projections and temperature stay random."""

    kind: Literal["image-tower"] = "image-tower"
    path: Path
    """Run folder or file of the MIM or CLIP model."""


class SelectSection(Section):
    """Part of a larger model of the same kind of blocks (weight selection, arXiv 2311.18823)."""

    layers: Literal["even", "first"] = "even"
    """Which layers: at equal steps, or the first."""
    channels: Literal["even", "first"] = "even"
    """Which channels and heads: at equal steps, or the first; heads stay whole."""


class WholeModelInit(Section):
    """All weights from another CLIP model: of the same shape, or with `select` from a larger one."""

    kind: Literal["clip"] = "clip"
    path: Path
    """Run folder or file."""
    select: SelectSection | None = None
    """Take part of the layers, heads and channels; when absent the model has to be of the same shape."""


class TextTowerSource(Section):
    """Where the text tower's first weights come from."""

    path: Path
    """Run folder, or a file or folder of a published model (docs/models.md)."""
    fresh: list[str] | None = None
    """Parameters that keep their first weights, `*` for anything; the projection when absent (EVA's choice)."""
    select: SelectSection | None = None
    """Take part of a larger tower; when absent it has to be of the same shape."""


class ImageTowerSource(TextTowerSource):
    """Where the image tower's first weights come from."""

    fresh: list[str] | None = None
    """Parameters that keep their first weights, `*` for anything. When absent: the projection and, where the source
    has none of them, the norms inside the attention (EVA-02's MIM models)."""
    patch_resize: Literal["bicubic", "pseudo-inverse"] = "bicubic"
    """How a patch kernel of another size is resized: as EVA's scripts do, or FlexiViT's way."""


class TowersInit(Section):
    """Each tower from a file of its own; the temperature, and a tower that is not named, stay random."""

    kind: Literal["towers"] = "towers"
    image: ImageTowerSource | None = None
    """Image tower, from a MIM or CLIP model."""
    text: TextTowerSource | None = None
    """Text tower, from a CLIP model of EVA, OpenAI or LAION."""

    @model_validator(mode="after")
    def _a_tower_is_named(self) -> TowersInit:
        if self.image is None and self.text is None:
            raise ValueError("kind = 'towers' names no tower: give image.path, text.path or both, or kind = 'none'")
        return self


ClipInit = Annotated[NoInit | ImageTowerInit | TowersInit | WholeModelInit, Field(discriminator="kind")]


class LockSection(Section):
    """Frozen parts of the towers (LiT, arXiv 2111.07991), counted from the input; projections always learn."""

    visual: NonNegative | Literal["all"] | None = None
    """Blocks of the image tower that are frozen, with its embeddings; `all`: everything before the projection."""
    text: NonNegative | Literal["all"] | None = None
    """The same of the text tower."""


class ClipModelSection(Section):
    """The CLIP model to train."""

    preset: str
    """Preset name: ours, BAAI's or open_clip's spelling (`evatool recipe list` shows recipes, docs/models.md names)."""
    image_size: Positive | None = None
    """Input side in pixels where it differs from the preset's."""
    init: ClipInit = NoInit()
    """Where the first weights come from."""
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of patches dropped in training (FLIP); of N patches max(1, int((1 - share) N)) stay, as EVA keeps them."""
    patch_dropout_schedule: tuple[tuple[Positive, Annotated[float, Field(ge=0.0, lt=1.0)]], ...] = ()
    """`[samples_seen, share]` pairs: from there on that share is dropped, for instance `[[3_800_000_000, 0.0]]`."""
    lock: LockSection = LockSection()
    """What stays as `[model.init]` brought it."""
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Stochastic depth at the last block of the image tower, linear from 0 at the first."""

    @model_validator(mode="after")
    def _schedule_rises(self) -> ClipModelSection:
        starts = [start for start, _ in self.patch_dropout_schedule]
        if starts != sorted(set(starts)):
            raise ValueError(f"patch_dropout_schedule begins at {starts}: give each start once, in rising order")
        return self

    @model_validator(mode="after")
    def _what_is_frozen_is_not_regularised(self) -> ClipModelSection:
        if self.lock.visual == "all" and self.drop_path_rate > 0:
            raise ValueError(
                f"drop_path_rate = {self.drop_path_rate} only disturbs a frozen tower: set it to 0 with "
                'model.lock.visual = "all", or freeze fewer blocks'
            )
        if self.lock != LockSection() and self.init.kind == "none":
            raise ValueError(
                "model.lock freezes random weights: say in [model.init] where they come from, or unset model.lock"
            )
        return self


class MimModelSection(Section):
    """The image encoder that learns by masked image modelling."""

    preset: str
    """Preset name of a CLIP or MIM model: its image tower is built, without projection, with a prediction head."""
    image_size: Positive | None = None
    """Input side in pixels where it differs from the preset's."""
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Stochastic depth at the last block, linear from 0 at the first."""
    patch_embed_grad_scale: Fraction = 0.1
    """Factor on the gradient of the patch embedding: 0.1 in EVA-02, 1.0 in EVA-01 (docs/reference/eva.md#mim-student).
    """
