"""Names of published weights, translated to ours: open_clip's `CustomTextCLIP`.

The image tower of an EVA model is `visual.trunk.*` (a timm `Eva`), that of an OpenAI or LAION CLIP is open_clip's own
ViT below `visual.*`; then `text.*` and `logit_scale`. A MIM model's own parts keep BAAI's names: `mask_token` and
`lm_head.*`. Tables: docs/reference/eva.md#names-in-files and #map-to-open_clip-and-timm.
"""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

import torch
from torch import Tensor

from evatool.core.errors import CheckpointError
from evatool.model.clip import PROJECTION, TOWER
from evatool.model.config import TowerKind
from evatool.model.open_clip_architecture import RECOMPUTED
from evatool.weights.key_mapping_hf import EVA_CODE_SCALE, is_transformers, transformers_origins
from evatool.weights.mapped_tensors import MappedTensors, TensorOrigin, merged_tensors
from evatool.weights.wrappers import unwrapped

MIM_PARTS = ("mask_token", "lm_head.weight", "lm_head.bias")

# BAAI -> timm inside a block. No name on the right matches a pattern on the left, so timm's names pass unchanged.
_TOWER_RENAMES = (
    ("attn.inner_attn_ln.", "attn.norm."),
    ("mlp.ffn_ln.", "mlp.norm."),
    ("mlp.w12.", "mlp.fc1."),
    ("mlp.w1.", "mlp.fc1_g."),
    ("mlp.w2.", "mlp.fc1_x."),
    ("mlp.w3.", "mlp.fc2."),
)
_EVA_PARTS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
_VIT_PARTS = {"visual.conv1.weight", "visual.class_embedding", "visual.proj"}
# OpenAI's order: the text tower stands at the root.
_ROOT_TEXT = re.compile(r"(token_embedding|positional_embedding|transformer|ln_final|text_projection)(\.|$)")
# Recomputed buffers, and the three numbers that OpenAI's archives keep as tensors.
_RECOMPUTED = re.compile(
    r"(^|\.)rope\.|\.k_bias$|(^|\.)attn_mask$|\.position_ids$|^(input_resolution|context_length|vocab_size)$"
)


def canonical_state(state: Mapping[str, Tensor], where: str = "state dict") -> MappedTensors:
    """`state` under our names; buffers that are recomputed (RoPE tables among them) are left out.

    Understands BAAI's CLIP and MIM files, open_clip's names, timm's `Eva`, our own checkpoints, OpenAI's archives and
    transformers' names of CLIP and EVA-CLIP, by the names themselves. Raises CheckpointError where it finds no image
    tower that it knows, or two sources for one name.
    """
    if isinstance(state, MappedTensors):
        return state
    state = unwrapped(state, where)
    names = {name for name in state if not _RECOMPUTED.search(name)}
    keys = [name for name in state if name in names]
    if is_transformers(names):
        if "logit_scale" not in names:  # BAAI's files of 8B and 18B: the scale stands in the code
            state = merged_tensors([state, {"logit_scale": torch.tensor(EVA_CODE_SCALE).log()}])
            keys.append("logit_scale")
        return MappedTensors(state, *transformers_origins({key: key for key in keys}))
    is_vit = names >= _VIT_PARTS
    tower: TowerKind = "clip-vit" if is_vit else "eva"
    rename: Callable[[str], str] = _shared_name if is_vit else _EvaNames(names, where)
    origins: dict[str, TensorOrigin] = {}
    for key in keys:
        ours = rename(key)
        if ours in origins:
            raise CheckpointError(
                f"{key} and {origins[ours].keys[0]} are both {ours}", where=where, expected="one tensor a parameter"
            )
        origins[ours] = TensorOrigin((key,))
    return MappedTensors(state, origins, tower)


def open_clip_state(state: Mapping[str, Tensor]) -> MappedTensors:
    """The weights of a model in open_clip's words: its names, with the text tower of a `CLIP` moved to `text`."""
    state = unwrapped(state)
    kept = [name for name in state if not (RECOMPUTED.search(name) or _RECOMPUTED.search(name))]
    return MappedTensors(state, {_shared_name(name): TensorOrigin((name,)) for name in kept}, "open_clip")


def has_vit_names(state: Mapping[str, Tensor]) -> bool:
    """True for the image tower of OpenAI's and LAION's CLIP under open_clip's names."""
    return set(unwrapped(state)) >= _VIT_PARTS


def mae_state(state: Mapping[str, Tensor]) -> MappedTensors:
    """EVA-L's weights under our names, from BAAI's file (MAE's names) or our checkpoint, without fixed positions."""
    origins = {}
    state = unwrapped(state)
    for key in state:
        name = key
        if name in ("pos_embed", "decoder_pos_embed"):
            continue
        name = name.replace("decoder_pred.", "lm_head.")
        is_shared = name == "mask_token" or name.startswith(("decoder_", "lm_head.", "visual."))
        origins[name if is_shared else f"visual.{name}"] = TensorOrigin((key,))
    return MappedTensors(state, origins)


def _shared_name(name: str) -> str:
    """Our name of a part of the text tower or of the temperature, from any layout of BAAI, open_clip and OpenAI."""
    if name.removeprefix("text.") in ("logit_scale", "logit_bias"):
        return name.removeprefix("text.")  # EVA-01's CLIP file keeps it inside the text tower
    return f"text.{name}" if _ROOT_TEXT.match(name) else name


class _EvaNames:
    """Name -> our name for a model with an EVA tower, with what depends on the whole set of names decided once."""

    def __init__(self, names: set[str], where: str) -> None:
        for prefix in (TOWER, "visual.", ""):
            if {f"{prefix}{part}" for part in _EVA_PARTS} <= names:
                self.prefix = prefix
                break
        else:
            raise CheckpointError(
                "no image tower that evatool knows was found among the names",
                where=where,
                expected="an EVA tower under visual.trunk. (open_clip), visual. (BAAI) or no prefix, or a CLIP ViT",
                fix=f"the file has {', '.join(sorted(names)[:4])} ...",
            )
        self.separate = f"{self.prefix}blocks.0.attn.q_proj.weight" in names
        self.norm_after_pooling = f"{self.prefix}fc_norm.weight" in names and f"{self.prefix}norm.weight" not in names
        self.head_has_bias = f"{self.prefix}head.bias" in names

    def __call__(self, name: str) -> str:
        if name in MIM_PARTS or name == PROJECTION:
            return name
        shared = _shared_name(name)
        if shared != name or name.startswith("text.") or not name.startswith(self.prefix):
            return shared
        return self._tower(name.removeprefix(self.prefix))

    def _tower(self, name: str) -> str:
        if name == "head.weight" and not self.head_has_bias:
            return PROJECTION
        if name in ("logit_scale", "logit_bias"):
            return name
        for theirs, ours in _TOWER_RENAMES:
            name = name.replace(theirs, ours)
        if self.separate:
            name = re.sub(r"attn\.([qv])_bias$", r"attn.\1_proj.bias", name)
        if self.norm_after_pooling:
            name = name.replace("fc_norm.", "norm.")
        return TOWER + name


def baai_name(name: str, *, separate_qkv: bool, swiglu: bool) -> str:
    """Our name -> BAAI's; `swiglu` for packed or separate SwiGLU, told apart by the name."""
    if name == PROJECTION:
        return "visual.head.weight"
    if not name.startswith(TOWER):
        return name
    name = name.removeprefix(TOWER)
    if separate_qkv:
        name = re.sub(r"attn\.([qv])_proj\.bias$", r"attn.\1_bias", name)
    if swiglu:
        name = re.sub(r"mlp\.fc1\.", "mlp.w12.", name)
        for theirs, ours in _TOWER_RENAMES[3:]:
            name = name.replace(ours, theirs)
    for theirs, ours in _TOWER_RENAMES[:2]:
        name = name.replace(ours, theirs)
    return f"visual.{name}"
