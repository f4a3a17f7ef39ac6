"""Contrastive objective: InfoNCE over the global batch, plain or with equal captions as positives.

Source: CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389), EVA-CLIP/rei/training/loss.py. Each rank holds the rows
of its own samples against all gathered columns; the engine's mean over ranks of the rank means is the global loss.
"""

# B this rank's batch, G global batch, L text tokens, E embedding

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from evatool.distributed.collectives import all_gather_rows, all_gather_with_grad, rank
from evatool.pixels import normalize_images
from evatool.recipe.schema import InfoNceObjective
from evatool.types import Batch, LossDict

PARAMETER_BOUNDS = {"model.logit_scale": (0.0, math.log(100))}
"""The logarithm of the temperature after every optimiser step (eva.md 3.8); the engine holds it there."""


class ClipObjective(nn.Module):
    """Two towers and the contrastive loss between their features.

    Args:
        model: an open_clip `CustomTextCLIP`-like module with `encode_image`, `encode_text`, `text` and `logit_scale`
            (the logarithm, shape (1,) or ()).
        section: the recipe's `[objective]`.
    """

    parameter_bounds = PARAMETER_BOUNDS

    def __init__(self, model: nn.Module, section: InfoNceObjective) -> None:
        super().__init__()
        self.model = model
        self.section = section

    def forward(self, batch: Batch) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss` with gradient; `i2t_top1`, `t2i_top1` (accuracy within the batch) and `logit_scale`
            (exponentiated) for the log. Batches must be of equal size on all ranks.
        """
        image_features, text_features = encode_pair(self.model, batch)
        scale = logit_scale(self.model)
        is_positive = positives(batch, self.section.positives)
        logits = pair_logits(image_features, text_features, scale)
        loss = contrastive_loss(logits, is_positive)
        return {"loss": loss, **accuracies(logits, is_positive), "logit_scale": scale.detach()}


# ------------------------------------------------------------------------------------------------------- features


def encode_pair(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit-length image and text features (B, E) of one batch, float32 or wider; the text is trimmed (exactly)."""
    assert batch.tokens is not None, "a contrastive objective needs tokens in its batches"
    image_features = model.encode_image(normalize_images(batch.image, dtype=_input_dtype(model)))  # type: ignore[operator]
    text_features = encode_text(model, batch.tokens)
    return unit(image_features), unit(text_features)


def encode_text(model: nn.Module, tokens: Tensor) -> Tensor:
    """Text features (B, E), not normalised, without work on padding.

    A causal tower that pools at the end-of-text token never looks at what stands behind it, so dropping the columns
    after the longest caption changes nothing. Other towers get all columns.

    Args:
        tokens: (B, L) int64, zero-padded after the end-of-text token, which is the largest id.
    """
    tower = model.text
    if not is_trimmable(tower):
        return model.encode_text(tokens)  # type: ignore[operator]
    tokens = trim_tokens(tokens)
    length = tokens.shape[1]
    # open_clip slices the position table to the text but not the causal mask, so the mask is handed in sliced.
    return functional_call(tower, {"attn_mask": tower.attn_mask[:length, :length]}, (tokens,))  # type: ignore[union-attr,index,arg-type]


def is_trimmable(tower: nn.Module | Tensor) -> bool:
    """Whether a text tower is causal and pools at the largest id, as open_clip's `TextTransformer` does by default."""
    return (
        getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "pool_type", None) == "argmax"
        and getattr(tower, "cls_emb", None) is None
    )


def trim_tokens(tokens: Tensor) -> Tensor:
    """The columns of (B, L) tokens up to the last end-of-text token of the batch (the largest id of each row)."""
    return tokens[:, : int(tokens.argmax(dim=-1).max()) + 1]


def unit(features: Tensor) -> Tensor:
    """Features at unit length; half precision becomes float32 first, wider types stay."""
    return F.normalize(features.to(torch.promote_types(features.dtype, torch.float32)), dim=-1)


def logit_scale(model: nn.Module) -> Tensor:
    """The exponentiated temperature as a scalar with gradient, float32 or wider."""
    log_scale = model.logit_scale
    assert isinstance(log_scale, Tensor)
    return log_scale.to(torch.promote_types(log_scale.dtype, torch.float32)).exp().squeeze()


def _input_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype


# ----------------------------------------------------------------------------------------------------------- loss

Logits = tuple[Tensor, Tensor]
"""This rank's rows, image against all texts and text against all images, each (B, G) float32 or wider."""


def pair_logits(image_features: Tensor, text_features: Tensor, scale: Tensor | float) -> Logits:
    """Scaled similarities of this rank's samples against the global batch; gradients reach every rank's features.

    Args:
        image_features, text_features: (B, E) unit length; the same B on every rank. All ranks must call this.
        scale: exponentiated temperature.
    """
    # Not under autocast: bf16 logits at scale 100 would be off by about 0.4.
    with torch.autocast(image_features.device.type, enabled=False):
        per_image = scale * image_features @ all_gather_with_grad(text_features).T
        per_text = scale * text_features @ all_gather_with_grad(image_features).T
    return per_image, per_text


def positives(batch: Batch, kind: str) -> Tensor | None:
    """Which of the global batch's captions fit this rank's samples: (B, G) bool, or None if only the own one does."""
    if kind == "pair":
        return None
    assert batch.caption_id is not None, "positives = 'equal-captions' needs caption ids in its batches"
    return batch.caption_id[:, None] == all_gather_rows(batch.caption_id)[None, :]


def contrastive_loss(logits: Logits, is_positive: Tensor | None = None) -> Tensor:
    """InfoNCE, both directions averaged: this rank's mean over its rows of the cross-entropy against the targets.

    Args:
        logits: from `pair_logits`.
        is_positive: (B, G) bool from `positives`; a row's target is uniform over its positives. It serves both
            directions, since captions being equal is symmetric. None: the target is the own partner.
    Returns: scalar, ln G where all logits are equal.
    """
    per_image, per_text = logits
    targets = own_columns(per_image) if is_positive is None else _uniform(is_positive, per_image.dtype)
    return (F.cross_entropy(per_image, targets) + F.cross_entropy(per_text, targets)) / 2


def own_columns(logits: Tensor) -> Tensor:
    """(B,) int64: the column of each row's own partner in the rank-ordered global batch."""
    size = logits.shape[0]
    return torch.arange(size, device=logits.device) + rank() * size


def _uniform(is_positive: Tensor, dtype: torch.dtype) -> Tensor:
    """Rows of probabilities, equal over the positives and 0 elsewhere."""
    return is_positive.to(dtype) / is_positive.sum(dim=1, keepdim=True)


@torch.no_grad()
def accuracies(logits: Logits, is_positive: Tensor | None) -> dict[str, Tensor]:
    """Share of this rank's rows whose best column is a positive, image to text and text to image."""

    def share(rows: Tensor) -> Tensor:
        best = rows.argmax(dim=1)
        is_hit = best == own_columns(rows) if is_positive is None else is_positive.gather(1, best[:, None])
        return is_hit.float().mean()

    return {"i2t_top1": share(logits[0]), "t2i_top1": share(logits[1])}
