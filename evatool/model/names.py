"""Names of published weights, translated to ours: open_clip's `visual.trunk.*` (a timm `Eva`), `text.*`, `logit_scale`.

A MIM model's own parts keep BAAI's names: `mask_token` and `lm_head.*`. Tables: eva.md 5.2 and 5.3.
"""

from __future__ import annotations

import re
from collections.abc import Iterable, Iterator, Mapping

import torch
from torch import Tensor

from evatool.errors import CheckpointError
from evatool.tensorfile import TensorMap, dtype_of, shape_of

TOWER = "visual.trunk."
PROJECTION = "visual.head.proj.weight"  # without bias it is open_clip's linear projection, not timm's head
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
_TOWER_PARTS = ("cls_token", "pos_embed", "patch_embed.proj.weight", "blocks.0.norm1.weight")
# OpenAI's order: the text tower stands at the root.
_ROOT_TEXT = re.compile(r"(token_embedding|positional_embedding|transformer|ln_final|text_projection)(\.|$)")
_RECOMPUTED = re.compile(r"(^|\.)rope\.|\.k_bias$|(^|\.)attn_mask$|\.position_ids$")


class RenamedMap(TensorMap):
    """Other tensors under our names, read from there one at a time, when asked for."""

    def __init__(self, base: Mapping[str, Tensor], source_by_name: Mapping[str, str]) -> None:
        self._base, self._source = base, dict(source_by_name)

    def __getitem__(self, name: str) -> Tensor:
        return self._base[self._source[name]]

    def __iter__(self) -> Iterator[str]:
        return iter(self._source)

    def __len__(self) -> int:
        return len(self._source)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape at the source."""
        return shape_of(self._base, self._source[name])

    def dtype(self, name: str) -> torch.dtype:
        """Dtype at the source."""
        return dtype_of(self._base, self._source[name])


def canonical_state(state: Mapping[str, Tensor], where: str = "state dict") -> RenamedMap:
    """`state` under our names; buffers that are recomputed (RoPE tables among them) are left out.

    Understands BAAI's CLIP and MIM files, open_clip's names, timm's `Eva` and our own MIM checkpoints, by the names
    themselves. Raises CheckpointError where it finds no EVA image tower, or two sources for one name.
    """
    rename = _renamer((_without_wrapper(key) for key in state), where)
    translated: dict[str, str] = {}
    for key in state:
        name = _without_wrapper(key)
        if _RECOMPUTED.search(name):
            continue
        ours = rename(name)
        if ours in translated:
            raise CheckpointError(
                f"{key} and {translated[ours]} are both {ours}", where=where, expected="one tensor a parameter"
            )
        translated[ours] = key
    return RenamedMap(state, translated)


def _without_wrapper(key: str) -> str:
    """Without the prefixes that DataParallel and torch.compile add."""
    return re.sub(r"^(module\.|_orig_mod\.)+", "", key)


class _renamer:
    """Name -> our name, with what depends on the whole set of names decided once."""

    def __init__(self, names: Iterable[str], where: str) -> None:
        names = set(names)
        for prefix in (TOWER, "visual.", ""):
            if {f"{prefix}{part}" for part in _TOWER_PARTS} <= names:
                self.prefix = prefix
                break
        else:
            raise CheckpointError(
                "no EVA image tower was found among the names",
                where=where,
                expected="cls_token and patch_embed under visual.trunk. (open_clip), visual. (BAAI) or no prefix",
                fix=f"the file has {', '.join(sorted(names)[:4])} ...",
            )
        self.separate = f"{self.prefix}blocks.0.attn.q_proj.weight" in names
        self.norm_after_pooling = f"{self.prefix}fc_norm.weight" in names and f"{self.prefix}norm.weight" not in names
        self.head_has_bias = f"{self.prefix}head.bias" in names

    def __call__(self, name: str) -> str:
        if name in MIM_PARTS or name == PROJECTION:
            return name
        if name.removeprefix("text.") in ("logit_scale", "logit_bias"):
            return name.removeprefix("text.")  # EVA-01's CLIP file keeps it inside the text tower
        if name.startswith("text."):
            return name
        if _ROOT_TEXT.match(name):
            return f"text.{name}"
        if not name.startswith(self.prefix):
            return name
        return self._tower(name.removeprefix(self.prefix))

    def _tower(self, name: str) -> str:
        if name == "head.weight" and not self.head_has_bias:
            return PROJECTION
        for theirs, ours in _TOWER_RENAMES:
            name = name.replace(theirs, ours)
        if self.separate:
            name = re.sub(r"attn\.([qv])_bias$", r"attn.\1_proj.bias", name)
        if self.norm_after_pooling:
            name = name.replace("fc_norm.", "norm.")
        return TOWER + name


def baai_name(name: str, *, separate_qkv: bool, swiglu: bool) -> str:
    """Our name -> BAAI's, for a CLIP model; `swiglu` for packed or separate SwiGLU, told apart by the name."""
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
