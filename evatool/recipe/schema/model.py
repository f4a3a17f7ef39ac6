"""The models of a training recipe: what is built, and where its first weights come from. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, Positive, PositiveFloat, Section


class NoInit(Section):
    """Random first weights."""

    kind: Literal["none"] = "none"
    """Selects random first weights."""


class ImageTowerInit(Section):
    """First weights of the image tower from a MIM or CLIP model.

    The text tower, the projections and the temperature stay random.
    """

    kind: Literal["image-tower"] = "image-tower"
    """Selects the image tower of another model as the source of first weights."""
    path: Path
    """Run folder or file of that MIM or CLIP model."""


class SelectSection(Section):
    """Takes part of a larger model of the same kind of blocks (weight selection, arXiv 2311.18823)."""

    layers: Literal["even", "first"] = "even"
    """Which layers are taken: at equal steps over the larger model's depth (`even`), or the first ones (`first`)."""
    channels: Literal["even", "first"] = "even"
    """Which channels and heads are taken: at equal steps over the larger model's width (`even`), or the first ones
    (`first`). Heads stay whole."""


class WholeModelInit(Section):
    """All first weights from another CLIP model, of the same shape or, with `select`, from a larger one."""

    kind: Literal["clip"] = "clip"
    """Selects another CLIP model as the source of all first weights."""
    path: Path
    """Run folder or file of that model."""
    select: SelectSection | None = None
    """Which part of a larger model's layers, heads and channels is taken. When it is absent the model must have the
    same shape."""


class TextTowerSource(Section):
    """Where the first weights of the text tower come from."""

    path: Path
    """Run folder, or a file or folder of a published model (docs/models.md)."""
    fresh: list[str] | None = None
    """Patterns of parameter names that keep their random weights, `*` for anything. When absent it is the projection,
    as in EVA's runs."""
    select: SelectSection | None = None
    """Which part of a larger tower is taken. When it is absent the tower must have the same shape."""


class ImageTowerSource(TextTowerSource):
    """Where the first weights of the image tower come from."""

    fresh: list[str] | None = None
    """Patterns of parameter names that keep their random weights, `*` for anything. When absent it is the projection
    and, where the source has none of them, the norms inside the attention (EVA-02's MIM models)."""
    patch_resize: Literal["bicubic", "pseudo-inverse"] = "bicubic"
    """How a patch kernel of another size is resized: `bicubic` as EVA's scripts do, or `pseudo-inverse`, FlexiViT's
    way."""


class TowersInit(Section):
    """First weights of each tower from a file of its own.

    The temperature, and a tower that is not named, stay random.
    """

    kind: Literal["towers"] = "towers"
    """Selects a source of first weights for each tower."""
    image: ImageTowerSource | None = None
    """Source of the image tower: a MIM or CLIP model. The tower stays random when it is absent."""
    text: TextTowerSource | None = None
    """Source of the text tower: a CLIP model of EVA, OpenAI or LAION. The tower stays random when it is absent."""

    @model_validator(mode="after")
    def _a_tower_is_named(self) -> TowersInit:
        if self.image is None and self.text is None:
            raise ValueError("kind = 'towers' names no tower: give image.path, text.path or both, or kind = 'none'")
        return self


ClipInit = Annotated[NoInit | ImageTowerInit | TowersInit | WholeModelInit, Field(discriminator="kind")]


class LockSection(Section):
    """Frozen parts of the towers (LiT, arXiv 2111.07991).

    Freezing goes from the input up; the projection to the shared embedding always learns.
    """

    visual: NonNegative | Literal["all"] | None = None
    """Number of frozen blocks of the image tower, its embeddings with them; 0 freezes the embeddings alone, and `"all"`
    everything before the projection. Nothing is frozen when it is absent."""
    text: NonNegative | Literal["all"] | None = None
    """Number of frozen blocks of the text tower, its embeddings with them; 0 freezes the embeddings alone, and `"all"`
    everything before the projection. Nothing is frozen when it is absent."""


class ClipModelSection(Section):
    """The CLIP model that is trained."""

    preset: str
    """Name of the architecture, in evatool's, BAAI's or open_clip's spelling. docs/models.md lists them."""
    image_size: Positive | None = None
    """Input side in pixels, where it is to differ from the preset's. It must be a multiple of the patch side."""
    image_mean: tuple[float, float, float] | None = None
    """Mean of the pixels of each channel (red, green, blue), for values from 0 to 1. By default it is OpenAI CLIP's,
    which every EVA model has; first weights of another model want theirs, which `evatool inspect` prints."""
    image_std: tuple[PositiveFloat, PositiveFloat, PositiveFloat] | None = None
    """Standard deviation of the pixels of each channel, as `image_mean`."""
    init: ClipInit = NoInit()
    """Where the first weights come from. They are random by default."""
    patch_dropout: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Share of the patches of each picture that are dropped in training (FLIP). Of N patches max(1, int((1 - share) N))
    stay, as in EVA. It is off by default; 0.5, as in EVA's largest runs, nearly halves the work of the image tower."""
    patch_dropout_schedule: tuple[tuple[Positive, Annotated[float, Field(ge=0.0, lt=1.0)]], ...] = ()
    """Pairs `[samples_seen, share]` from which on another share is dropped. `[[3_800_000_000, 0.0]]`, for instance,
    lets the last part of a run see all patches."""
    lock: LockSection = LockSection()
    """Parts of the model that stay as `[model.init]` brought them. Nothing is frozen by default."""
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of skipping the last block of the image tower in training (stochastic depth). It rises linearly from
    0 at the first block. Raise it against overfitting on small sets."""

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
    """Name of a CLIP or MIM architecture (docs/models.md). Its image tower is built with a prediction head, without
    projection."""
    image_size: Positive | None = None
    """Input side in pixels, where it is to differ from the preset's. It must be a multiple of the patch side."""
    drop_path_rate: Annotated[float, Field(ge=0.0, lt=1.0)] = 0.0
    """Probability of skipping the last block in training (stochastic depth). It rises linearly from 0 at the first
    block. EVA's larger models have 0.1 and more (docs/reference/eva.md#mim-recipes)."""
    patch_embed_grad_scale: Fraction = 0.1
    """Factor on the gradient of the patch embedding, from 0 to 1. EVA-02 has 0.1, EVA-01 has 1.0
    (docs/reference/eva.md#mim-student)."""
