"""Masked image modelling: an EVA image tower, a mask token and a linear prediction head."""

from __future__ import annotations

import torch
from timm.layers import trunc_normal_
from timm.models import checkpoint
from timm.models.eva import Eva
from torch import Tensor, nn

from evatool.model.config import ModelConfig, mim_config
from evatool.model.init import init_mim
from evatool.model.mae import MaeModel
from evatool.model.vision import build_trunk

# B batch, S input side in pixels, N patches, M masked patches of the batch, D width, T teacher features


class MimModel(nn.Module):
    """Predicts a teacher's patch features at masked places.

    Source: EVA-02/asuka/modeling_pretrain.py (docs/reference/eva.md#mim-student). Parity:
    tests/parity/test_golden_mim.py.
    """

    def __init__(self, trunk: Eva, config: ModelConfig, predict_dim: int, patch_embed_grad_scale: float) -> None:
        super().__init__()
        self.config = config
        self.patch_embed_grad_scale = patch_embed_grad_scale
        self.visual = trunk
        self.mask_token = nn.Parameter(torch.zeros(1, 1, config.width))
        self.lm_head = nn.Linear(config.width, predict_dim)
        trunc_normal_(self.mask_token, std=config.vision["init_std"])

    def forward(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted features at the masked patches.

        Args:
            image: (B, 3, S, S) float, normalised.
            mask: (B, N) bool, True where the patch is hidden; the count may differ between samples.
        Returns: (M, T), row by row over the batch: the order of `teacher_features[mask]`.
        """
        predicted: Tensor = self.lm_head(self.encode(image, mask)[:, 1:][mask])
        return predicted

    def predict_all(self, image: Tensor, mask: Tensor) -> Tensor:
        """Predicted features (B, N, T) at all patches, for looking at."""
        predicted: Tensor = self.lm_head(self.encode(image, mask)[:, 1:])
        return predicted

    def encode(self, image: Tensor, mask: Tensor) -> Tensor:
        """All tokens after the final norm: (B, 1 + N, D), the class token first."""
        return masked_tokens(self.visual, image, mask, self.mask_token, self.patch_embed_grad_scale)

    def set_grad_checkpointing(self, enable: bool = True) -> None:
        """Recompute activations in the backward pass instead of keeping them."""
        self.visual.set_grad_checkpointing(enable)


def masked_tokens(
    trunk: Eva, image: Tensor, mask: Tensor, mask_token: Tensor, patch_embed_grad_scale: float = 1.0
) -> Tensor:
    """All tokens (B, 1 + N, D) of images with a mask token at hidden places, after the final norm.

    Args:
        trunk: an EVA tower that drops no patches.
        image: (B, 3, S, S) float, normalised.
        mask: (B, N) bool, True where the patch is hidden.
        mask_token: (1, 1, D), or a shape that broadcasts to the patches.
        patch_embed_grad_scale: factor on the patch embedding's gradient; the values stay.
    """
    assert trunk.patch_drop is None, "a tower that drops patches cannot say what is at each place"
    x = trunk.patch_embed(image)  # (B, N, D): every patch is embedded, hidden ones too
    # Forward: x. Backward: scale * dx, since the detached part has no gradient.
    scale = patch_embed_grad_scale
    if scale != 1.0:
        x = x.detach() * (1.0 - scale) + x * scale
    x = torch.where(mask.unsqueeze(-1), mask_token.to(x.dtype), x)
    x, rope = trunk._pos_embed(x)  # prepends the class token, adds positions
    x = trunk.norm_pre(x)
    for block in trunk.blocks:
        x = checkpoint(block, x, rope=rope) if trunk.grad_checkpointing else block(x, rope=rope)
    normed: Tensor = trunk.norm(x)
    return normed


def build_mim(
    config: ModelConfig, *, predict_dim: int, drop_path_rate: float = 0.0, patch_embed_grad_scale: float = 0.1
) -> MimModel | MaeModel:
    """A MIM model of `config`'s image tower with the released initialisation, on the current default device.

    A CLIP configuration is taken in its MIM form: no projection, and none of the norms that EVA-02 adds inside the
    attention only for CLIP. Parameters are `visual.*` (timm's names), `mask_token` and `lm_head.*`.

    Args:
        predict_dim: width of the teacher's features.
        drop_path_rate: stochastic depth of the last block in training mode, linear from 0 at the first.
        patch_embed_grad_scale: factor on the patch embedding's gradient: 0.1 in EVA-02, 1 in EVA-01. EVA-L, a masked
            autoencoder, has no such factor.
    """
    config = mim_config(config, predict_dim)
    if config.decoder is not None:
        return MaeModel(config, predict_dim, drop_path_rate)
    model = MimModel(build_trunk(config, drop_path_rate=drop_path_rate), config, predict_dim, patch_embed_grad_scale)
    init_mim(model.visual, model.lm_head, model.mask_token, config.vision)
    return model
