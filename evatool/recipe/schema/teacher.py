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
    """Folder of the store; `teacher-features` in the folder of the shards when absent (one local source only)."""
    views: Positive = 1
    """Views of a sample that are kept: epoch e uses view e mod `views`, its augmentation, mask and caption with it."""
    seed: int = 0
    """Of augmentation, masks and caption choice, in place of train.seed: runs of other seeds share the store."""


class PatchStoreSection(StoreSection):
    """Teacher patch features on the disk."""

    masked_only: bool = False
    """Keep only the masked patches: mask_ratio of the bytes, and no other mask can be drawn over them."""


class TeacherSection(Section):
    """A frozen CLIP model to learn from."""

    model: str
    """Run folder, exported folder, released file or preset name, as `evatool.load_clip` reads it."""
    precision: Literal["auto", "fp32", "bf16"] = "auto"
    """What it computes and keeps its weights in, whatever the student does; `auto`: bf16 on a GPU, fp32 on a CPU."""
    compile: bool = True
    """Compile its transformer blocks on a GPU, where a compiler is found; on a CPU they run as they are."""
    store: StoreSection | None = None
    """Where its features are kept; when absent the teacher runs at every step."""


class PatchTeacherSection(TeacherSection):
    """A frozen model whose patch features are learned: a CLIP, or any timm model that gives a grid of them."""

    model: str
    """As in `distill`; or `timm/` and a timm model's name."""
    weights: Path | None = None
    """State dict of the timm model, under its names or with the same tensors in the same order; random when absent."""
    layer: int | None = None
    """Of the timm model, as its `forward_intermediates` counts them, -1 the last: blocks of a transformer, stages of a
    convolutional network. The last when absent."""
    image_size: Positive | None = None
    """Input side in pixels where it differs from the teacher's own; its grid is carried to the student's."""
    store: PatchStoreSection | None = None
    """Where its patch features are kept; when absent the teacher runs at every step."""

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
