"""CLIP models: open_clip's `CustomTextCLIP` around a timm `Eva`, from a configuration in BAAI's vocabulary."""

from __future__ import annotations

import copy
from typing import Any

import torch
from open_clip import CustomTextCLIP
from open_clip.transformer import VisionTransformer
from timm.layers import trunc_normal_
from torch import Tensor, nn

from evatool.core.errors import RecipeError
from evatool.model.config import ModelConfig
from evatool.model.open_clip_architecture import build_open_clip
from evatool.model.vision import has_head_bias, timm_name

# B batch, S input side in pixels, N patches, E embedding

TOWER = "visual.trunk."
"""Prefix of an EVA image tower's parameters."""
PROJECTION = "visual.head.proj.weight"
"""The image projection where it has no bias: open_clip's linear layer then, and timm's head otherwise."""


def open_clip_model_config(config: ModelConfig) -> dict[str, Any]:
    """`config` in open_clip's vocabulary, as its JSON files and `local-dir:` folders hold it.

    `timm_model_name` is a timm entry point, registered here where timm has none.
    """
    assert config.text is not None, f"{config.name} is a MIM model; it has no text tower"
    if config.open_clip is not None:
        return copy.deepcopy(config.open_clip)
    text = {key: value for key, value in config.text.items() if value is not None}
    if config.is_eva:
        vision = {
            "image_size": config.image_size,
            "timm_model_name": timm_name(config),
            "timm_model_pretrained": False,
            "timm_pool": "token",
            # timm's own head always has a bias; open_clip's linear projection has none
            "timm_proj": None if has_head_bias(config) else "linear",
        }
    else:
        vision = {key: config.vision[key] for key in ("image_size", "patch_size", "layers", "width", "head_width")}
        vision["mlp_ratio"] = config.vision["mlp_ratio"]
    table = {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text, "custom_text": True}
    table |= {"quick_gelu": True} if config.quick_gelu else {}
    return table | ({} if config.init_logit_bias is None else {"init_logit_bias": config.init_logit_bias})


def build_clip(config: ModelConfig, *, patch_dropout: float = 0.0, drop_path_rate: float = 0.0) -> CustomTextCLIP:
    """A CLIP model with the released initialisation, on the current default device (also `meta`).

    Parameters are named as open_clip names them: `visual.trunk.*`, `text.*`, `logit_scale` of shape (1,), which every
    engine can shard, and `logit_bias` of that shape where `config` has one. `visual(image (B, 3, S, S)) -> (B, E)`,
    `text(tokens (B, L)) -> (B, E)`; neither output is normalised.

    Args:
        patch_dropout: share of patches dropped in training mode; the class token always stays.
        drop_path_rate: stochastic depth of the last block in training mode, linear from 0 at the first.

    Raises: RecipeError for stochastic depth in a tower that has none.
    Source: EVA-CLIP/rei/eva_clip/{model,eva_vit_model}.py. Parity: tests/parity/test_golden_clip.py.
    """
    if config.open_clip is not None:
        if patch_dropout > 0 or drop_path_rate > 0:
            raise RecipeError(
                f"patch dropout and stochastic depth of {config.name} are not evatool's to set",
                fix="set both to 0, or write them into open_clip's description of the model",
            )
        clip = build_open_clip(config)
        clip.image_input = config.input
        return clip
    arguments = open_clip_model_config(config)
    arguments.pop("custom_text")
    arguments["vision_cfg"]["patch_dropout"] = patch_dropout
    if config.is_eva:
        arguments["vision_cfg"]["timm_drop_path"] = drop_path_rate
    elif drop_path_rate > 0:
        raise RecipeError(
            f"drop_path_rate = {drop_path_rate} has no effect: open_clip's ViT, which {config.name} has, knows none",
            fix="set model.drop_path_rate = 0",
        )
    clip = CustomTextCLIP(**arguments, nonscalar_logit_scale=True)
    clip.image_input = config.input  # for `normalize_for`
    if config.is_eva:
        # timm and open_clip initialise everything else as the release does (docs/reference/eva.md#first-weights)
        _init_projection(image_projection(clip), config.vision["head_init_scale"])
    return clip


def _init_projection(projection: nn.Linear, scale: float) -> None:
    with torch.no_grad():
        trunc_normal_(projection.weight, std=0.02)
        projection.weight.mul_(scale)
        if projection.bias is not None:
            projection.bias.zero_()


def image_projection(clip: CustomTextCLIP) -> nn.Linear:
    """The linear layer from an EVA tower's width to the embedding; where it lives depends on its bias."""
    trunk_head = clip.visual.trunk.head
    return trunk_head if isinstance(trunk_head, nn.Linear) else clip.visual.head.proj


def visual_tokens(clip: CustomTextCLIP, image: Tensor) -> Tensor:
    """Projected patch tokens: what a MIM student learns to predict.

    Args:
        image: (B, 3, S, S) float, normalised.
    Returns: (B, N, E), every patch token after the final norm and the projection; the class token is dropped.
    Source: EVA-01/eva/clip_wrapper.py and EVA-02/asuka/clip_wrapper.py, for OpenAI's and EVA's towers
    (docs/reference/eva.md#mim-targets).
    """
    if isinstance(clip.visual, VisionTransformer):
        last = clip.visual.forward_intermediates(
            image, indices=1, normalize_intermediates=True, intermediates_only=True, output_fmt="NLC"
        )
        projected: Tensor = last["image_intermediates"][-1] @ clip.visual.proj
        return projected
    tokens = clip.visual.trunk.forward_features(image)
    patches: Tensor = image_projection(clip)(tokens)[:, clip.visual.trunk.num_prefix_tokens :]
    return patches
