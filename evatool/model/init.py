"""First weights of the MIM models, as released. CLIP towers keep timm's and open_clip's, which equal the release."""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from typing import Any

import torch
from timm.layers import SwiGLU, trunc_normal_
from timm.models.eva import Eva
from torch import Tensor, nn


def init_mim(trunk: Eva, head: nn.Linear, mask_token: Tensor, vision: Mapping[str, Any]) -> None:
    """Overwrite the weights of a MIM model with its family's first weights (docs/reference/eva.md#first-weights).

    `eva-02`: Xavier everywhere, and sub-LN's rescaling by sqrt(ln(2 depth)) where the MLP has its own norm.
    `eva-01` (also `eva-clip`): truncated normal, each block's outputs divided by sqrt(2 i).

    Args:
        trunk, head, mask_token: the parts of the model: image tower, prediction head, mask token.
        vision: the model's vision configuration, of which `init`, `init_std` and `naiveswiglu` count.
    """
    if vision["init"] == "eva-02":
        _init_eva02(trunk, head, rescale=vision["naiveswiglu"])
    else:
        _init_eva01(trunk, head, vision["init_std"])
    for token in (mask_token, trunk.cls_token, trunk.pos_embed):
        trunc_normal_(token, std=vision["init_std"])


def _init_eva01(trunk: Eva, head: nn.Linear, std: float) -> None:
    """Source: EVA-01/eva/modeling_pretrain.py."""
    _init_linears(trunk, head, lambda weight: trunc_normal_(weight, std=std))
    trunk.fix_init_weight()


def _init_eva02(trunk: Eva, head: nn.Linear, rescale: bool) -> None:
    """Source: EVA-02/asuka/modeling_pretrain.py, `xavier_normal_init`; the 1/sqrt(2 i) rescaling is not used there."""
    _init_linears(trunk, head, nn.init.xavier_normal_)
    patch_weight = trunk.patch_embed.proj.weight
    nn.init.xavier_uniform_(patch_weight.view(patch_weight.shape[0], -1))
    if rescale:
        _rescale_for_sub_ln(trunk)


@torch.no_grad()
def _rescale_for_sub_ln(trunk: Eva) -> None:
    factor = math.sqrt(math.log(2 * len(trunk.blocks)))
    for block in trunk.blocks:
        assert isinstance(block.mlp, SwiGLU), "sub-LN initialisation is defined for EVA-02's SwiGLU with a norm"
        for layer in (block.mlp.fc1_g, block.mlp.fc1_x, block.mlp.fc2, block.attn.proj, block.attn.v_proj):
            layer.weight.mul_(factor)


def _init_linears(trunk: Eva, head: nn.Linear, fill: Callable[[Tensor], object]) -> None:
    for part in (*trunk.modules(), head):
        if isinstance(part, nn.Linear):
            fill(part.weight)
            if part.bias is not None:
                nn.init.zeros_(part.bias)
