"""A CLIP model in EVA-CLIP's own format: names, stored RoPE tables and configuration file."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.formats.safetensors import TensorMap
from evatool.model.config import TEXT_DEFAULTS, VISION_DEFAULTS, ModelConfig
from evatool.weights.key_mapping import baai_name
from evatool.weights.mapped_tensors import merged_tensors, renamed_tensors

# N patches, C head width

# Keys of ours that BAAI's files do not have.
_ALWAYS = ("image_size", "patch_size", "layers", "width", "head_width", "context_length", "vocab_size", "heads")
_OURS = ("tower", "swiglu", "inner_attn_ln", "init", "init_std", "head_init_scale")


def baai_state(tensors: Mapping[str, Tensor], config: ModelConfig) -> TensorMap:
    """Weights under our names -> EVA-CLIP's, with the RoPE tables its loader expects; their dtype is the weights'.

    Args:
        tensors: read one at a time, when they are asked for; the temperature as a scalar.

    Raises: RecipeError for a model that EVA-CLIP's code cannot build.
    """
    if not config.is_eva:
        raise RecipeError(
            f"{config.name} has OpenAI's image tower, which EVA-CLIP's format does not hold",
            where="export.format",
            fix="export it as open_clip",
        )
    if config.init_logit_bias is not None and "logit_bias" in tensors:
        raise RecipeError(
            f"{config.name} was trained with the sigmoid loss: EVA-CLIP's code has no place for its logit_bias",
            where="export.format",
            expected="a format with a bias: open_clip, safetensors, transformers or onnx",
            fix="export it as open_clip, or one tower alone (export.tower), which has none",
        )
    vision = config.vision
    swiglu = vision["naiveswiglu"] or vision["swiglu"]
    names = {baai_name(name, separate_qkv=vision["subln"], swiglu=swiglu): name for name in tensors}
    state = renamed_tensors(tensors, names)
    tables: dict[str, Tensor] = {}
    if vision["rope"] and "visual.pos_embed" in state:
        dtype = state.dtype("visual.pos_embed")
        cos, sin = (table.to(dtype) for table in rope_tables(config))
        for owner in ("visual.rope", *(f"visual.blocks.{i}.attn.rope" for i in range(config.depth))):
            tables |= {f"{owner}.freqs_cos": cos, f"{owner}.freqs_sin": sin}
    return merged_tensors([state, tables])


def rope_tables(config: ModelConfig) -> tuple[Tensor, Tensor]:
    """Cosines and sines (N, C) as EVA-CLIP stores them, float32: rows then columns, each angle twice.

    Source: EVA-CLIP/rei/eva_clip/rope.py, `VisionRotaryEmbeddingFast` (docs/reference/eva.md#rotary-positions).
    """
    side, axis_width = config.grid[0], config.vision["head_width"] // 2
    trained = config.vision["pt_hw_seq_len"]
    exponents = torch.arange(0, axis_width, 2)[: axis_width // 2].float() / axis_width
    frequencies = 1.0 / (10000**exponents)
    positions = torch.arange(side) / side * trained if config.vision["intp_freq"] else torch.arange(side)
    angles = torch.outer(positions.float(), frequencies).repeat_interleave(2, dim=-1)  # (side, C / 2)
    rows = angles[:, None, :].expand(side, side, -1)
    columns = angles[None, :, :].expand(side, side, -1)
    table = torch.cat([rows, columns], dim=-1).reshape(side * side, -1)
    return table.cos(), table.sin()


def baai_config(config: ModelConfig) -> dict[str, Any]:
    """`config` as EVA-CLIP's JSON files write it: what is not the default there, and what its loader cannot do without.

    Without `eva_model_name` that loader builds an OpenAI tower, silently; without `drop_path_rate` it fails
    (docs/reference/eva.md#names-in-files).
    """
    vision = {key: value for key, value in config.vision.items() if key not in _OURS}
    vision = {k: v for k, v in vision.items() if v != VISION_DEFAULTS[k] or k in _ALWAYS}
    vision |= {"eva_model_name": config.name.lower(), "drop_path_rate": 0}
    text = {k: v for k, v in (config.text or {}).items() if v != TEXT_DEFAULTS[k] or k in _ALWAYS}
    return {"embed_dim": config.embed_dim, "vision_cfg": vision, "text_cfg": text}
