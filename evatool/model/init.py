"""First weights of the MIM models, as released. CLIP towers keep timm's and open_clip's, which equal the release."""

from __future__ import annotations

import math
from typing import TYPE_CHECKING

import torch
from timm.layers import SwiGLU, trunc_normal_
from timm.models.eva import Eva
from torch import nn

if TYPE_CHECKING:
    from evatool.model.mim import MimModel


def init_mim(model: MimModel) -> None:
    """Overwrite the weights of a MIM model with its family's first weights (docs/reference/eva.md#first-weights).

    `eva-02`: Xavier everywhere, and sub-LN's rescaling by sqrt(ln(2 depth)) where the MLP has its own norm.
    `eva-01` (also `eva-clip`): truncated normal, each block's outputs divided by sqrt(2 i).
    """
    vision = model.config.vision
    if vision["init"] == "eva-02":
        _init_eva02(model, rescale=vision["naiveswiglu"])
    else:
        _init_eva01(model, vision["init_std"])
    for token in (model.mask_token, model.visual.cls_token, model.visual.pos_embed):
        trunc_normal_(token, std=vision["init_std"])


def _init_eva01(model: MimModel, std: float) -> None:
    """Source: EVA-01/eva/modeling_pretrain.py."""
    _init_linears(model, lambda weight: trunc_normal_(weight, std=std))
    model.visual.fix_init_weight()


def _init_eva02(model: MimModel, rescale: bool) -> None:
    """Source: EVA-02/asuka/modeling_pretrain.py, `xavier_normal_init`; the 1/sqrt(2 i) rescaling is not used there."""
    _init_linears(model, nn.init.xavier_normal_)
    patch_weight = model.visual.patch_embed.proj.weight
    nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
    if rescale:
        _rescale_for_sub_ln(model.visual)


@torch.no_grad()
def _rescale_for_sub_ln(trunk: Eva) -> None:
    factor = math.sqrt(math.log(2 * len(trunk.blocks)))
    for block in trunk.blocks:
        assert isinstance(block.mlp, SwiGLU), "sub-LN initialisation is defined for EVA-02's SwiGLU with a norm"
        for layer in (block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2, block.attn.proj, block.attn.v_proj):
            layer.weight.mul_(factor)


def _init_linears(model: MimModel, fill: object) -> None:
    assert callable(fill)
    for part in model.modules():
        if isinstance(part, nn.Linear):
            fill(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
