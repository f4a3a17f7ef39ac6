"""Teachers of a distillation: what a loss needs of them, and their embeddings of a batch."""

# B this rank's batch, L text tokens, T teacher's embedding, S side of a picture

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch
from evatool.distributed.engines.amp import own_precision
from evatool.model.features import FeaturePair, l2_normalize
from evatool.model.text import encode_text, fit_tokens


class ClipTeacher(Protocol):
    """A frozen CLIP model in eval mode, on the device of the batch, that keeps its own pixel statistics."""

    @property
    def model(self) -> nn.Module:
        """The towers, for the text side."""
        ...

    @property
    def context_length(self) -> int:
        """Text tokens of a caption."""
        ...

    @property
    def logit_scale(self) -> float:
        """The temperature, exponentiated."""
        ...

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, T)."""
        ...


class EmbeddingStore(Protocol):
    """Where a teacher's embeddings are kept (`data.feature_store.FeatureStore`), rows of (2, T)."""

    def rows(self, batch: Batch) -> Tensor | None:
        """The batch's rows (B, 2, T); None where any is missing."""
        ...

    def keep(self, batch: Batch, features: Tensor) -> Tensor:
        """Write features (B, 2, T), and hand back their rows."""
        ...


class PatchTeacher(Protocol):
    """A frozen model in eval mode, on the device of the batch, that keeps its own pixel statistics."""

    def visual_tokens(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) uint8 -> (B, N, T): patch tokens after final norm and projection, without the class token."""
        ...


class PatchStore(Protocol):
    """Where a teacher's patch features are kept (`data.feature_store.FeatureStore`)."""

    def rows(self, batch: Batch) -> Tensor | None:
        """The batch's rows; None where any is missing."""
        ...

    def keep(self, batch: Batch, features: Tensor) -> Tensor:
        """Write features (B, N, T), and hand back their rows."""
        ...

    def at_masked(self, rows: Tensor, mask: Tensor) -> Tensor:
        """Features (M, T) at the masked patches."""
        ...


@dataclass(frozen=True)
class Teacher:
    """One teacher, and what it counts for.

    Attributes:
        clip: the model. No module of the objective: its weights are neither trained nor saved.
        width: T.
        name: in logs and parameters; empty for the only one.
        weight: factor on the weights of all that is learned from it.
        scale: exponentiated temperature; the model's own where it is None.
        bias: added to its scaled similarities, for a sigmoid loss.
        image_size: side of its pictures, of which a batch may hold several; the teachers' view where it is None.
        store: what it has said before; it then runs only where a batch has samples that are not in there.
    """

    clip: ClipTeacher
    width: int
    name: str = ""
    weight: float = 1.0
    scale: float | None = None
    bias: float | None = None
    image_size: int | None = None
    store: EmbeddingStore | None = None

    @property
    def logit_scale(self) -> float:
        """What its cosines are multiplied by."""
        return self.clip.logit_scale if self.scale is None else self.scale

    def key(self, name: str) -> str:
        """`name` as this teacher has it: `logit_loss`, and `logit_loss/big` among several."""
        return f"{name}/{self.name}" if self.name else name

    def image(self, batch: Batch) -> Tensor:
        """(B, 3, S, S) of the batch's views, the one for this teacher."""
        views = [view for view in (batch.teacher_image, batch.image, *(batch.teacher_images or [])) if view is not None]
        fitting = [view for view in views if self.image_size in (None, view.shape[-1])]
        assert fitting, f"no view of {self.image_size} pixels among {[view.shape[-1] for view in views]}"
        return fitting[0]

    @torch.no_grad()
    def features(self, batch: Batch) -> FeaturePair:
        """Its unit-length image and text features (B, T) of the same samples, from the store where it has them all."""
        if self.store is None:
            return teacher_features(self, batch)
        rows = self.store.rows(batch)
        if rows is None:
            rows = self.store.keep(batch, torch.stack(teacher_features(self, batch), dim=1))
        # float16 keeps a length to 5e-4
        return l2_normalize(rows[:, 0]), l2_normalize(rows[:, 1])


@torch.no_grad()
def teacher_features(teacher: Teacher, batch: Batch) -> FeaturePair:
    """The teacher's unit-length image and text features (B, T) of the same samples, computed now, without gradient."""
    assert batch.tokens is not None, "distillation needs tokens in its batches"
    assert batch.text_lengths is not None
    clip = teacher.clip
    tokens = fit_tokens(batch.tokens, clip.context_length)
    lengths = batch.text_lengths.clamp(max=clip.context_length)
    with own_precision(tokens):
        image, text = clip.encode_image(teacher.image(batch)), encode_text(clip.model, tokens, lengths)
        return l2_normalize(image), l2_normalize(text.to(torch.promote_types(text.dtype, torch.float32)))
