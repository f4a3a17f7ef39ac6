"""Teachers of a distillation: what a loss needs of them, and their embeddings of a batch."""

# B this rank's batch, L text tokens, T teacher's embedding, S side of a picture

from __future__ import annotations

from dataclasses import dataclass
from typing import Protocol

import torch
from torch import Tensor, nn

from evatool.objective.contrastive import unit
from evatool.objective.distill_logits import Pair
from evatool.objective.text import encode_text, fit_tokens
from evatool.types import Batch


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
    """

    clip: ClipTeacher
    width: int
    name: str = ""
    weight: float = 1.0
    scale: float | None = None
    bias: float | None = None

    @property
    def logit_scale(self) -> float:
        """What its cosines are multiplied by."""
        return self.clip.logit_scale if self.scale is None else self.scale

    def key(self, name: str) -> str:
        """`name` as this teacher has it: `logit_loss`, and `logit_loss/big` among several."""
        return f"{name}/{self.name}" if self.name else name


@torch.no_grad()
def teacher_features(teacher: ClipTeacher, batch: Batch) -> Pair:
    """The teacher's unit-length image and text features (B, T) of the same samples, without gradient."""
    assert batch.tokens is not None, "distillation needs tokens in its batches"
    assert batch.text_lengths is not None
    image = batch.image if batch.teacher_image is None else batch.teacher_image
    tokens = fit_tokens(batch.tokens, teacher.context_length)
    lengths = batch.text_lengths.clamp(max=teacher.context_length)
    return unit(teacher.encode_image(image)), unit(encode_text(teacher.model, tokens, lengths))
