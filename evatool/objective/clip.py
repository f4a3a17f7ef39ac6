"""Contrastive objective: two towers, and a softmax or sigmoid loss between their features over the global batch.

Source: CLIP (arXiv 2103.00020), EVA-CLIP (arXiv 2303.15389), SigLIP (arXiv 2303.15343).
"""

# B this rank's batch, L text tokens, E embedding

from __future__ import annotations

import math

import torch
from torch import Tensor, nn

from evatool.core.batch import Batch, LossDict
from evatool.core.image_norm import normalize_images
from evatool.core.step import StepContext
from evatool.model.features import l2_normalize
from evatool.model.text import encode_text
from evatool.objective.base import START, FeatureObjective, Features
from evatool.objective.tiled.infonce import infonce_loss
from evatool.objective.tiled.sigmoid import sigmoid_loss
from evatool.recipe.schema import FixedTemperature, InfoNceObjective, SigmoidObjective

PARAMETER_BOUNDS = {"model.logit_scale": (0.0, math.log(100))}
"""The logarithm of the temperature after every optimiser step (docs/reference/eva.md#contrastive-loss); the engine
holds it there.
"""


class ClipObjective(FeatureObjective):
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
        self.chance_loss = "loss" if isinstance(section, InfoNceObjective) else None
        match section:
            case SigmoidObjective():
                set_logit_scale(model, section.initial_scale)
                # The objective's, not the model's: ranking captions needs none, so models stay what they are.
                self.logit_bias = nn.Parameter(torch.full((1,), section.initial_bias))
            case InfoNceObjective(temperature=FixedTemperature(value=value)):
                set_logit_scale(model, 1 / value).requires_grad_(False)
                self.parameter_bounds = {}

    def encode(self, batch: Batch) -> Features:
        image_features, text_features = encode_pair(self.model, batch)
        features = {"image": image_features, "text": text_features, "scale": logit_scale(self.model)}
        if isinstance(self.section, SigmoidObjective):
            features["bias"] = self.logit_bias.squeeze()
        return features

    def losses(self, features: Features, batch: Batch, step: StepContext = START) -> LossDict:
        """Losses of this rank's samples against the global batch; all ranks must call it together.

        Returns: `loss` with gradient; for the log `i2t_top1`, `t2i_top1` (accuracy within the batch), `logit_scale`
            (exponentiated) and, of a sigmoid loss, `logit_bias`. Batches must be of equal size on all ranks.
        """
        image, text, scale = features["image"], features["text"], features["scale"]
        caption_id = positive_ids(batch, self.section.positives)
        match self.section:
            case InfoNceObjective():
                loss, logs = infonce_loss(image, text, scale, caption_id)
            case SigmoidObjective():
                loss, logs = sigmoid_loss(image, text, scale, features["bias"], caption_id)
                # A copy: it is read after the step, which changes the parameter in place.
                logs["logit_bias"] = features["bias"].detach().clone()
        return {"loss": loss, **logs, "logit_scale": scale.detach()}


def positive_ids(batch: Batch, kind: str) -> Tensor | None:
    """What tells equal captions apart, or None where only the own caption is right."""
    if kind == "pair":
        return None
    assert batch.caption_id is not None, "positives = 'equal-captions' needs caption ids in its batches"
    return batch.caption_id


# ------------------------------------------------------------------------------------------------------- features


def encode_pair(model: nn.Module, batch: Batch) -> tuple[Tensor, Tensor]:
    """Unit-length image and text features (B, E) of one batch, float32 or wider; no work goes into padding."""
    assert batch.tokens is not None, "a contrastive objective needs tokens in its batches"
    # type: ignore[operator]
    image_features = model.encode_image(normalize_images(batch.image, dtype=_input_dtype(model)))
    text_features = encode_text(model, batch.tokens, batch.text_lengths)
    return l2_normalize(image_features), l2_normalize(text_features)


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
