"""Which preset a set of weights belongs to, by shapes alone."""

from __future__ import annotations

import math
import re
from collections.abc import Mapping
from dataclasses import dataclass, replace

from torch import Tensor

from evatool.model.derived import PROJECTION, TOWER
from evatool.model.presets import PRESETS, ModelConfig
from evatool.tensorfile import shape_of


@dataclass(frozen=True)
class Signature:
    """What the shapes of a model tell; heads, norm placement and RoPE leave no trace in them."""

    width: int
    layers: int
    patch_size: int
    hidden: int
    mlp: str  # gelu, packed (SwiGLU in one matrix) or subln (SwiGLU with a norm)
    separate_qkv: bool
    qkv_bias: bool
    inner_norm: bool
    rms_norm: bool
    embed_dim: int | None = None
    text: tuple[int, int, int, int] | None = None  # width, layers, context, vocabulary


def signature_of(config: ModelConfig) -> Signature:
    """The signature that `config`'s weights have."""
    vision, text = config.vision, config.text
    inner = vision["subln"] if vision["inner_attn_ln"] is None else vision["inner_attn_ln"]
    return Signature(
        width=config.width,
        layers=config.depth,
        patch_size=config.patch_size,
        hidden=int(config.width * vision["mlp_ratio"]),
        mlp="subln" if vision["naiveswiglu"] else "packed" if vision["swiglu"] else "gelu",
        separate_qkv=vision["subln"],
        qkv_bias=vision["qkv_bias"],
        inner_norm=inner,
        rms_norm=vision["use_rms_norm"],
        embed_dim=config.embed_dim,
        text=(text["width"], text["layers"], text["context_length"], text["vocab_size"]) if text else None,
    )


def signature_in(state: Mapping[str, Tensor]) -> tuple[Signature, int]:
    """The signature of weights under our names, and the side of their patch grid."""
    block = f"{TOWER}blocks.0."
    has = state.__contains__
    mlp_width = lambda name: shape_of(state, f"{block}mlp.{name}.weight")  # noqa: E731
    if has(f"{block}mlp.fc1_g.weight"):
        mlp, hidden = "subln", mlp_width("fc1_g")[0]
    else:
        hidden = mlp_width("fc2")[1]
        mlp = "packed" if mlp_width("fc1")[0] == 2 * hidden else "gelu"
    projection = next((name for name in (PROJECTION, f"{TOWER}head.weight") if has(name)), None)
    signature = Signature(
        width=shape_of(state, f"{TOWER}cls_token")[-1],
        layers=_num_blocks(state, rf"{re.escape(TOWER)}blocks\.(\d+)\."),
        patch_size=shape_of(state, f"{TOWER}patch_embed.proj.weight")[-1],
        hidden=hidden,
        mlp=mlp,
        separate_qkv=has(f"{block}attn.q_proj.weight"),
        qkv_bias=has(f"{block}attn.q_bias") or has(f"{block}attn.q_proj.bias"),
        inner_norm=has(f"{block}attn.norm.weight"),
        rms_norm=not has(f"{block}norm1.bias"),
        embed_dim=shape_of(state, projection)[0] if projection and has("text.positional_embedding") else None,
        text=_text_signature(state),
    )
    return signature, math.isqrt(shape_of(state, f"{TOWER}pos_embed")[1] - 1)


def fitting_preset(state: Mapping[str, Tensor]) -> ModelConfig | None:
    """The preset that these weights (under our names) belong to, at their own image size; None if there is none."""
    signature, side = signature_in(state)
    fits = [config for config in PRESETS.values() if config.decoder is None and signature_of(config) == signature]
    if not fits:
        return None
    exact = [config for config in fits if config.grid[0] == side]
    config = exact[0] if exact else fits[0].with_image_size(side * fits[0].patch_size)
    if config.task == "mim" and "lm_head.weight" in state:
        return replace(config, predict_dim=shape_of(state, "lm_head.weight")[0])
    return config


def _text_signature(state: Mapping[str, Tensor]) -> tuple[int, int, int, int] | None:
    if "text.positional_embedding" not in state:
        return None
    context, width = shape_of(state, "text.positional_embedding")
    layers = _num_blocks(state, r"text\.transformer\.resblocks\.(\d+)\.")
    return width, layers, context, shape_of(state, "text.token_embedding.weight")[0]


def _num_blocks(state: Mapping[str, Tensor], pattern: str) -> int:
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)
