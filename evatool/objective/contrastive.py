"""Contrastive objective: two towers, and a softmax or sigmoid loss between their features over the global batch.

Source: CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389), SigLIP (arXiv 2303.15343).
"""

# B this rank's batch, L text tokens, E embedding

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.func import functional_call

from evatool.objective.infonce import infonce_loss
from evatool.objective.sigmoid import sigmoid_loss
from evatool.pixels import normalize_images
from evatool.recipe.schema import FixedTemperature, InfoNceObjective, SigmoidObjective
from evatool.types import Batch, LossDict

PARAMETER_BOUNDS = {"model.logit_scale": (0.0, math.log(100))}
"""The logarithm of the temperature after every optimiser step (eva.md 3.8); the engine holds it there."""


class ClipObjective(nn.Module):
    """Two towers and the contrastive loss between their features.

    Args:
        model: an open_clip `CustomTextCLIP`-like module with `encode_image`, `encode_text`, `text` and `logit_scale`
            (the logarithm, shape (1,) or ()). Its temperature is set, and frozen, where the section says so.
        section: the recipe's `[objective]`.
    """

    def __init__(self, model: nn.Module, section: InfoNceObjective | SigmoidObjective) -> None:
        super().__init__()
        self.model = model
        self.section = section
        self.parameter_bounds = PARAMETER_BOUNDS
        match section:
            case SigmoidObjective():
                set_logit_scale(model, section.initial_scale)
                # The objective's, not the model's: ranking captions needs none, so models stay what they are.
                self.logit_bias = nn.Parameter(torch.full((1,), section.initial_bias))
            case InfoNceObjective(temperature=FixedTemperature(value=value)):
                set_logit_scale(model, 1 / value).requires_grad_(False)
                self.parameter_bounds = {}

    def forward(self, batch: Batch) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss` with gradient; for the log `i2t_top1`, `t2i_top1` (accuracy within the batch), `logit_scale`
            (exponentiated) and, of a sigmoid loss, `logit_bias`. Batches must be of equal size on all ranks.
        """
        image_features, text_features = encode_pair(self.model, batch)
        scale = logit_scale(self.model)
        caption_id = positive_ids(batch, self.section.positives)
        match self.section:
            case InfoNceObjective():
                loss, logs = infonce_loss(image_features, text_features, scale, caption_id)
            case SigmoidObjective():
                bias = self.logit_bias.squeeze()
                loss, logs = sigmoid_loss(image_features, text_features, scale, bias, caption_id)
                logs["logit_bias"] = bias.detach().clone()  # read after the step, which changes it in place
        return {"loss": loss, **logs, "logit_scale": scale.detach()}


def positive_ids(batch: Batch, kind: str) -> Tensor | None:
    """What tells equal captions apart, or None where only the own caption is right."""
    if kind == "pair":
        return None
    assert batch.caption_id is not None, "positives = 'equal-captions' needs caption ids in its batches"
    return batch.caption_id


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


def set_logit_scale(model: nn.Module, scale: float) -> Tensor:
    """Set the temperature to the inverse of `scale`; returns its parameter, the logarithm of `scale`."""
    log_scale = model.logit_scale
    assert isinstance(log_scale, Tensor)
    nn.init.constant_(log_scale, math.log(scale))
    return log_scale


def _input_dtype(model: nn.Module) -> torch.dtype:
    return next(model.parameters()).dtype
