"""The presets that a set of weights may belong to, found by shapes alone."""

from __future__ import annotations

import math
import re
from dataclasses import dataclass, replace

from evatool.model.clip import PROJECTION, TOWER
from evatool.model.config import ModelConfig, TowerKind
from evatool.model.presets import PRESETS
from evatool.weights.mapped_tensors import MappedTensors


@dataclass(frozen=True)
class Signature:
    """The facts that a model's shapes tell; heads, norm placement and RoPE leave no trace in them."""

    tower: TowerKind
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
    return Signature(
        tower=vision["tower"],
        width=config.width,
        layers=config.depth,
        patch_size=config.patch_size,
        hidden=int(config.width * vision["mlp_ratio"]),
        mlp="subln" if vision["naiveswiglu"] else "packed" if vision["swiglu"] else "gelu",
        separate_qkv=vision["subln"],
        qkv_bias=vision["qkv_bias"],
        inner_norm=config.has_inner_attn_norm,
        rms_norm=vision["use_rms_norm"],
        embed_dim=config.embed_dim,
        text=(text["width"], text["layers"], text["context_length"], text["vocab_size"]) if text else None,
    )


def signature_in(state: MappedTensors) -> tuple[Signature, int]:
    """The signature of weights under our names, and the side of their patch grid."""
    return _vit_signature(state) if state.tower == "clip-vit" else _eva_signature(state)


def _eva_signature(state: MappedTensors) -> tuple[Signature, int]:
    block = f"{TOWER}blocks.0."
    has = state.__contains__

    def mlp_shape(name: str) -> tuple[int, ...]:
        return state.shape(f"{block}mlp.{name}.weight")

    if has(f"{block}mlp.fc1_g.weight"):
        mlp, hidden = "subln", mlp_shape("fc1_g")[0]
    else:
        hidden = mlp_shape("fc2")[1]
        mlp = "packed" if mlp_shape("fc1")[0] == 2 * hidden else "gelu"
    projection = next((name for name in (PROJECTION, f"{TOWER}head.weight") if has(name)), None)
    signature = Signature(
        tower="eva",
        width=state.shape(f"{TOWER}cls_token")[-1],
        layers=_num_blocks(state, rf"{re.escape(TOWER)}blocks\.(\d+)\."),
        patch_size=state.shape(f"{TOWER}patch_embed.proj.weight")[-1],
        hidden=hidden,
        mlp=mlp,
        separate_qkv=has(f"{block}attn.q_proj.weight"),
        qkv_bias=has(f"{block}attn.q_bias") or has(f"{block}attn.q_proj.bias"),
        inner_norm=has(f"{block}attn.norm.weight"),
        rms_norm=not has(f"{block}norm1.bias"),
        embed_dim=state.shape(projection)[0] if projection and has("text.positional_embedding") else None,
        text=_text_signature(state),
    )
    return signature, math.isqrt(state.shape(f"{TOWER}pos_embed")[1] - 1)


def _vit_signature(state: MappedTensors) -> tuple[Signature, int]:
    kernel, projection = state.shape("visual.conv1.weight"), state.shape("visual.proj")
    signature = Signature(
        tower="clip-vit",
        width=kernel[0],
        layers=_num_blocks(state, r"visual\.transformer\.resblocks\.(\d+)\."),
        patch_size=kernel[-1],
        hidden=state.shape("visual.transformer.resblocks.0.mlp.c_fc.weight")[0],
        mlp="gelu",
        separate_qkv=False,
        qkv_bias=True,
        inner_norm=False,
        rms_norm=False,
        embed_dim=projection[1],
        text=_text_signature(state),
    )
    return signature, math.isqrt(state.shape("visual.positional_embedding")[0] - 1)


def fitting_presets(state: MappedTensors) -> list[ModelConfig]:
    """The presets that these weights belong to, at the weights' own image size.

    More than one only where they differ in something that leaves no trace in the weights: QuickGELU or not. None if a
    preset of this shape does not exist.
    """
    signature, side = signature_in(state)
    fits = [config for config in PRESETS.values() if config.decoder is None and signature_of(config) == signature]
    exact = [config for config in fits if config.grid[0] == side]
    if not exact and signature.tower == "eva":
        exact = [config.with_image_size(side * config.patch_size) for config in fits[:1]]
    if "lm_head.weight" in state:
        exact = [replace(c, predict_dim=state.shape("lm_head.weight")[0]) for c in exact if c.task == "mim"]
    return exact


def _text_signature(state: MappedTensors) -> tuple[int, int, int, int] | None:
    if "text.positional_embedding" not in state:
        return None
    context, width = state.shape("text.positional_embedding")
    layers = _num_blocks(state, r"text\.transformer\.resblocks\.(\d+)\.")
    return width, layers, context, state.shape("text.token_embedding.weight")[0]


def _num_blocks(state: MappedTensors, pattern: str) -> int:
    found = (re.match(pattern, name) for name in state)
    return 1 + max((int(match.group(1)) for match in found if match), default=-1)
