"""Who teaches, and where what a teacher says is kept. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from pydantic import model_validator

from evatool.recipe.schema.base import Positive, Section
from evatool.recipe.schema.data import TrainDataSection

TIMM_PREFIX = "timm/"
"""What the name of a timm model begins with."""

STORE_FOLDER = "teacher-features"
"""Name of a store's folder where the recipe gives none."""


class StoreSection(Section):
    """Teacher features on the disk, written when they are first needed and read from then on."""

    path: Path | None = None
    """Folder of the store. When absent it is `teacher-features` in the folder of the shards, which must then be one
    local source."""
    views: Positive = 1
    """Number of views of a sample whose features are kept. Epoch e uses view e mod `views`, with its augmentation, mask
    and caption. More views keep more variety and take more disk; set 1 where the data is seen about once."""
    seed: int = 0
    """Seed of augmentation, masks and caption choice, in the place of `train.seed`. Runs of other seeds therefore share
    one store."""


class PatchStoreSection(StoreSection):
    """Teacher patch features on the disk, written when they are first needed and read from then on."""

    masked_only: bool = False
    """Whether only the features of masked patches are kept. The store then takes `mask_ratio` of the bytes, and no
    other mask can be drawn over it."""


class TeacherSection(Section):
    """A frozen CLIP model to learn from."""

    model: str
    """Teacher, as `evatool.load_clip` reads it: a run folder, an exported folder, a released file or a preset's name
    (random weights)."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """Numbers in which the teacher computes and keeps its weights, whatever the student does. `auto` is bf16 on a GPU
    and fp32 on a CPU."""
    compile: bool = True
    """Whether its transformer blocks are compiled on a GPU, where a compiler is found. On a CPU they run as they are.
    """
    store: StoreSection | None = None
    """Where its features are kept. The teacher runs at every step when it is absent; a store pays off where the data is
    seen several times."""


class PatchTeacherSection(TeacherSection):
    """A frozen model whose patch features are learned: a CLIP, or any timm model that gives a grid of them."""

    model: str
    """Teacher: a CLIP as `evatool.load_clip` reads it (a run folder, an exported folder, a released file or a preset's
    name), or `timm/` and a timm model's name."""
    weights: Path | None = None
    """State dict of the timm model, under timm's names or with the same tensors in the same order. Its weights are
    random when it is absent."""
    layer: int | None = None
    """Layer of the timm model whose features are learned, as its `forward_intermediates` counts them from 0: blocks of
    a transformer, stages of a convolutional network. Negative numbers count from the end; the last is used when it is
    absent."""
    image_size: Positive | None = None
    """Input side in pixels, where it is to differ from the teacher's own. The teacher's grid of features is carried to
    the student's."""
    store: PatchStoreSection | None = None
    """Where its patch features are kept. The teacher runs at every step when it is absent; a store pays off where the
    data is seen several times."""

    @model_validator(mode="after")
    def _timm_has_its_settings(self) -> PatchTeacherSection:
        given = [name for name in ("weights", "layer") if getattr(self, name) is not None]
        if given and not self.is_timm:
            raise ValueError(
                f"{' and '.join(given)} belong to a timm teacher, and model = {self.model!r} is read as a CLIP, whose "
                'file says it all: leave them out, or write model = "timm/NAME"'
            )
        return self

    @property
    def is_timm(self) -> bool:
        """Whether timm builds it."""
        return self.model.startswith(TIMM_PREFIX)


def store_path(store: StoreSection, data: TrainDataSection) -> Path | None:
    """Folder of the store; None where the recipe has to name it: several sources, or remote ones."""
    if store.path is not None:
        return store.path
    shards: object = data.train
    if data.sources is not None:
        shards = data.sources[0].shards if len(data.sources) == 1 else None
    if isinstance(shards, list):
        shards = shards[0] if len(shards) == 1 else None
    if shards is None or "://" in str(shards):
        return None
    folder = Path(str(shards))
    is_folder = folder.suffix not in (".tar", ".json") and "*" not in folder.name and "{" not in folder.name
    return (folder if is_folder else folder.parent) / STORE_FOLDER
