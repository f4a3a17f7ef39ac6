"""The names that transformers gives to CLIP (OpenAI's and LAION's) and that BAAI's remote code gives to EVA-CLIP."""

from __future__ import annotations

import re
from collections.abc import Callable, Mapping

from torch import Tensor

from evatool.model.clip import PROJECTION, TOWER
from evatool.model.config import TowerKind
from evatool.weights.mapped_tensors import TensorOrigin

_LAYER = re.compile(r"(vision|text)_model\.encoder\.layers\.(\d+)\.(.+)")
_IN_BLOCK = {"layer_norm1": "ln_1", "layer_norm2": "ln_2", "self_attn.out_proj": "attn.out_proj"}
_IN_BLOCK |= {"mlp.fc1": "mlp.c_fc", "mlp.fc2": "mlp.c_proj"}
_IN_EVA_BLOCK = {"layer_norm1": "norm1", "layer_norm2": "norm2", "self_attn.out_proj": "attn.proj"}
_IN_EVA_BLOCK |= {"mlp.fc1": "mlp.fc1", "mlp.fc2": "mlp.fc2"}

_TEXT = {
    "text_model.embeddings.token_embedding.weight": "text.token_embedding.weight",
    "text_model.embeddings.position_embedding.weight": "text.positional_embedding",
    "text_model.final_layer_norm.weight": "text.ln_final.weight",
    "text_model.final_layer_norm.bias": "text.ln_final.bias",
    "logit_scale": "logit_scale",
}
_VISION = "vision_model."
_VIT = {
    "embeddings.class_embedding": "visual.class_embedding",
    "embeddings.patch_embedding.weight": "visual.conv1.weight",
    "embeddings.position_embedding.weight": "visual.positional_embedding",
    "pre_layrnorm.weight": "visual.ln_pre.weight",  # transformers' own spelling
    "pre_layrnorm.bias": "visual.ln_pre.bias",
    "post_layernorm.weight": "visual.ln_post.weight",
    "post_layernorm.bias": "visual.ln_post.bias",
}
_EVA = {
    "embeddings.patch_embedding.weight": f"{TOWER}patch_embed.proj.weight",
    "embeddings.patch_embedding.bias": f"{TOWER}patch_embed.proj.bias",
    "post_layernorm.weight": f"{TOWER}norm.weight",
    "post_layernorm.bias": f"{TOWER}norm.bias",
}


def is_transformers(names: set[str]) -> bool:
    """True for the names that transformers gives to a model with a CLIP image tower."""
    return f"{_VISION}embeddings.patch_embedding.weight" in names


def transformers_origins(keys: Mapping[str, str]) -> tuple[dict[str, TensorOrigin], TowerKind]:
    """Our names -> where their tensors come from, and the kind of image tower.

    OpenAI's ViT has a norm before its blocks, EVA's has none. Attention's three matrices are one in our models.

    Args:
        keys: name without wrappers -> key in the file.
    """
    is_vit = f"{_VISION}pre_layrnorm.weight" in keys
    vision = _VIT if is_vit else _EVA
    origins: dict[str, TensorOrigin] = {}
    for name, key in keys.items():
        layer = _LAYER.fullmatch(name)
        if layer:
            ours = _layer_name(*layer.groups(), is_vit=is_vit)
            origins[ours] = TensorOrigin((*origins.get(ours, TensorOrigin(())).keys, key))
        elif name == "text_projection.weight":
            origins["text.text_projection"] = TensorOrigin((key,), transposed=True)
        elif name == "visual_projection.weight":
            origins["visual.proj" if is_vit else PROJECTION] = TensorOrigin((key,), transposed=is_vit)
        elif name in _TEXT:
            origins[_TEXT[name]] = TensorOrigin((key,))
        elif name.startswith(_VISION) and name.removeprefix(_VISION) in vision:
            origins[vision[name.removeprefix(_VISION)]] = TensorOrigin((key,))
        elif not is_vit and name == f"{_VISION}embeddings.class_embedding":
            origins[f"{TOWER}cls_token"] = TensorOrigin((key,), lead=2)
        elif not is_vit and name == f"{_VISION}embeddings.position_embedding.weight":
            origins[f"{TOWER}pos_embed"] = TensorOrigin((key,), lead=1)
        else:
            origins[name] = TensorOrigin((key,))  # has no place in the model: named when it is loaded
    return _in_qkv_order(origins), "clip-vit" if is_vit else "eva"


def _layer_name(tower: str, number: str, rest: str, *, is_vit: bool) -> str:
    part, leaf = rest.rsplit(".", 1)
    is_eva = tower == "vision" and not is_vit
    prefix = f"{TOWER}blocks.{number}." if is_eva else f"{_PREFIX[tower]}transformer.resblocks.{number}."
    if part in ("self_attn.q_proj", "self_attn.k_proj", "self_attn.v_proj"):
        return f"{prefix}attn.qkv.{leaf}" if is_eva else f"{prefix}attn.in_proj_{leaf}"
    return f"{prefix}{(_IN_EVA_BLOCK if is_eva else _IN_BLOCK).get(part, part)}.{leaf}"


_PREFIX = {"vision": "visual.", "text": "text."}


def _in_qkv_order(origins: dict[str, TensorOrigin]) -> dict[str, TensorOrigin]:
    """Files hold the three matrices in any order (transformers writes k, v, q)."""
    order: Callable[[str], int] = lambda key: next(i for i, part in enumerate("qkv") if f".{part}_proj." in key)  # noqa: E731
    return {
        name: TensorOrigin(tuple(sorted(origin.keys, key=order))) if len(origin.keys) > 1 else origin
        for name, origin in origins.items()
    }


# ----------------------------------------------------------------------------------------------------- our names back

EVA_CODE_SCALE = 100.0
"""The scale of similarities in BAAI's code for transformers, whose files of 8B and 18B hold none."""

_ROOTS = {
    "text.token_embedding.weight": "text_model.embeddings.token_embedding.weight",
    "text.positional_embedding": "text_model.embeddings.position_embedding.weight",
    "text.ln_final.weight": "text_model.final_layer_norm.weight",
    "text.ln_final.bias": "text_model.final_layer_norm.bias",
}
_BLOCK = re.compile(r"(visual\.trunk\.blocks|visual\.transformer\.resblocks|text\.transformer\.resblocks)\.(\d+)\.(.+)")


def transformers_state(tensors: Mapping[str, Tensor], *, is_vit: bool) -> dict[str, Tensor]:
    """A CLIP's weights under transformers' names, or with an EVA tower under BAAI's for it; the way back of
    `transformers_origins`. Attention's one matrix becomes three."""
    vision = {ours: f"{_VISION}{theirs}" for theirs, ours in (_VIT if is_vit else _EVA).items()}
    vision |= {} if is_vit else {f"{TOWER}cls_token": f"{_VISION}embeddings.class_embedding"}
    vision |= {} if is_vit else {f"{TOWER}pos_embed": f"{_VISION}embeddings.position_embedding.weight"}
    state: dict[str, Tensor] = {}
    for name in tensors:
        tensor = tensors[name]
        block = _BLOCK.fullmatch(name)
        if block:
            state |= _block_state(block[1], block[2], block[3], tensor)
        elif name == "text.text_projection":
            state["text_projection.weight"] = tensor.T.contiguous()
        elif name in ("visual.proj", PROJECTION):
            state["visual_projection.weight"] = tensor.T.contiguous() if is_vit else tensor
        elif name == "logit_scale":
            state |= {name: tensor} if is_vit else {}
        elif name == f"{TOWER}cls_token":
            state[vision[name]] = tensor.reshape(-1)
        elif name == f"{TOWER}pos_embed":
            state[vision[name]] = tensor[0].contiguous()
        else:
            state[vision[name] if name in vision else _ROOTS[name]] = tensor
    return state


def _block_state(blocks: str, number: str, rest: str, tensor: Tensor) -> dict[str, Tensor]:
    part, leaf = rest.rsplit(".", 1)
    root = f"{'text' if blocks.startswith('text') else 'vision'}_model.encoder.layers.{number}"
    if rest.startswith(("attn.in_proj_", "attn.qkv.")):
        leaf = leaf.removeprefix("in_proj_")
        parts = zip("qkv", tensor.chunk(3), strict=True)
        return {f"{root}.self_attn.{one}_proj.{leaf}": part.contiguous() for one, part in parts}
    names = {ours: theirs for theirs, ours in (_IN_EVA_BLOCK if "trunk" in blocks else _IN_BLOCK).items()}
    return {f"{root}.{names[part]}.{leaf}": tensor}
