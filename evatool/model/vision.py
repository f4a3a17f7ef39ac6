"""EVA image towers: from a configuration to timm's `Eva`, through timm's registry so that open_clip finds them too."""

from __future__ import annotations

import hashlib
import json
from functools import partial
from typing import Any

import timm
import torch
from open_clip.transformer import TextTransformer
from timm.layers import RmsNormFp32
from timm.models import build_model_with_cfg, is_model, register_model
from timm.models.eva import Eva, EvaAttention, checkpoint_filter_fn

from evatool.core.image_input import CLIP_MEAN, CLIP_STD
from evatool.model.config import NOT_ARCHITECTURE, ModelConfig
from evatool.model.presets import PRESETS

# Entry points timm has, and ours in its style for what it lacks: their RMSNorm cannot be written in `model_args`.
TIMM_NAMES = {
    "EVA01-CLIP-g-14": "eva_giant_patch14_clip_224",
    "EVA02-CLIP-B-16": "eva02_base_patch16_clip_224",
    "EVA02-CLIP-L-14": "eva02_large_patch14_clip_224",
    "EVA02-CLIP-L-14-336": "eva02_large_patch14_clip_336",
    "EVA02-CLIP-bigE-14": "eva02_enormous_patch14_clip_224",
    "EVA-CLIP-8B": "eva_8b_patch14_clip_224",
    "EVA-CLIP-8B-448": "eva_8b_patch14_clip_448",
    "EVA-CLIP-18B": "eva_18b_patch14_clip_224",
    "EVA-CLIP-18B-336": "eva_18b_patch14_clip_336",
}

# Entry points whose every argument `timm_config` overrides: timm's own, and the one with RMSNorm that we add.
_TIMM_BASE = "eva02_base_patch16_clip_224"
_RMS_NORM_BASE = "eva_rms_norm"
# Those of TIMM_NAMES that timm itself knows.
STOCK_NAMES = frozenset(name for name in TIMM_NAMES.values() if is_model(name))


def eva_arguments(config: ModelConfig) -> dict[str, Any]:
    """Keyword arguments of timm's `Eva` for the image tower, without head; JSON-ready except for RMSNorm.

    Source: EVA-CLIP/rei/eva_clip/eva_vit_model.py (docs/reference/eva.md#image-towers), names translated to timm's.
    """
    vision = config.vision
    arguments: dict[str, Any] = {
        "img_size": vision["image_size"],
        "patch_size": vision["patch_size"],
        "embed_dim": vision["width"],
        "depth": vision["layers"],
        "num_heads": config.num_heads,
        "mlp_ratio": vision["mlp_ratio"],
        "qkv_bias": vision["qkv_bias"],
        "qkv_fused": not vision["subln"],
        "swiglu_mlp": vision["naiveswiglu"] or vision["swiglu"],
        "scale_mlp": vision["naiveswiglu"],
        "scale_attn_inner": config.has_inner_attn_norm,
        "use_rot_pos_emb": vision["rope"],
        "use_post_norm": vision["postnorm"],
        "init_values": vision["ls_init_value"],
        "global_pool": "token",
    }
    if vision["rope"]:
        reference = vision["pt_hw_seq_len"]
        arguments["ref_feat_shape"] = [reference, reference] if vision["intp_freq"] else None
    if vision["use_rms_norm"]:
        # Statistics in float32 in every precision, as the release computes them (docs/reference/eva.md#image-towers).
        arguments["norm_layer"] = partial(RmsNormFp32, eps=1e-6)
    return arguments


def has_head_bias(config: ModelConfig) -> bool:
    """True where the projection has a bias: in the release it follows the q/v bias, so 8B and 18B have none."""
    return bool(config.vision["qkv_bias"])


def _architecture(config: ModelConfig) -> dict[str, Any]:
    return {key: value for key, value in config.vision.items() if key not in NOT_ARCHITECTURE}


def timm_name(config: ModelConfig) -> str:
    """The timm entry point of this tower, registered on first use; released towers go by timm's own names."""
    same = (n for preset, n in TIMM_NAMES.items() if _architecture(PRESETS[preset]) == _architecture(config))
    name = next(same, None)
    if name is None:
        text = json.dumps(config.vision, sort_keys=True)
        name = f"eva_custom_{hashlib.sha256(text.encode()).hexdigest()[:12]}"
    if not is_model(name):
        _register(name, config)
    return name


def register_rms_norm_base() -> str:
    """Add the entry point with RMSNorm that other arguments turn into a tower of any size; returns its name."""
    if not is_model(_RMS_NORM_BASE):
        _register(_RMS_NORM_BASE, PRESETS["EVA-CLIP-8B"])
    return _RMS_NORM_BASE


def _register(name: str, config: ModelConfig) -> None:
    arguments = eva_arguments(config) | {"head_init_scale": config.vision["head_init_scale"]}
    side = config.image_size
    pretrained_cfg = {
        "url": "",
        "num_classes": 0,
        "input_size": (3, side, side),
        "fixed_input_size": True,
        "mean": CLIP_MEAN,
        "std": CLIP_STD,
        "interpolation": "bicubic",
        "crop_pct": 1.0,
        "first_conv": "patch_embed.proj",
        "classifier": "head",
    }

    def entry(pretrained: bool = False, **kwargs: Any) -> Eva:
        kwargs["pretrained_cfg"] = kwargs.get("pretrained_cfg") or pretrained_cfg
        return build_model_with_cfg(
            Eva, name, pretrained, pretrained_filter_fn=checkpoint_filter_fn, **(arguments | kwargs)
        )

    entry.__name__ = name
    register_model(entry)


def timm_config(config: ModelConfig, num_classes: int = 0) -> dict[str, Any]:
    """A timm `config.json` that makes timm build this tower.

    Stock timm does, from the arguments alone. Only RMSNorm cannot be written in JSON: such a tower needs
    `evatool.register()`, and goes by a preset's name or by its arguments to an entry point of ours.
    """
    side = config.image_size
    name, arguments = _TIMM_BASE, eva_arguments(config)
    if arguments.pop("norm_layer", None) is not None:
        name = timm_name(config)
        if name in TIMM_NAMES.values():
            arguments = {}
        else:
            name = register_rms_norm_base()
    return {
        "architecture": name,
        "num_classes": num_classes,
        "num_features": config.width,
        "global_pool": "token",
        "pretrained_cfg": {
            "input_size": [3, side, side],
            "fixed_input_size": True,
            "mean": list(CLIP_MEAN),
            "std": list(CLIP_STD),
            "interpolation": "bicubic",
            "crop_pct": 1.0,
            "first_conv": "patch_embed.proj",
            "classifier": "head",
        },
        "model_args": arguments,
    }


def build_trunk(config: ModelConfig, *, drop_path_rate: float = 0.0) -> Eva:
    """The image tower alone, without projection: what MIM trains. Weights are timm's initialisation."""
    return timm.create_model(timm_name(config), num_classes=0, global_pool="token", drop_path_rate=drop_path_rate)


def match_key_biases(module: torch.nn.Module) -> None:
    """Give attention's zero key bias, a buffer, the dtype of its query bias: they are joined into one vector."""
    for part in module.modules():
        if isinstance(part, EvaAttention) and part.k_bias is not None:
            part.k_bias = part.k_bias.to(part.q_bias.dtype)


def restore_buffers(module: torch.nn.Module, device: torch.device | str = "cpu") -> None:
    """Recompute, on `device`, the buffers that no checkpoint holds (RoPE tables, zero key bias, causal mask).

    For a model that was built on the meta device and then given its weights.
    """
    for part in module.modules():
        stale = {name: buffer for name, buffer in part._buffers.items() if buffer is not None and buffer.is_meta}
        for name, buffer in stale.items():
            part._buffers[name] = torch.empty_like(buffer, device=device)
        if not stale:
            continue
        if isinstance(part, TextTransformer):
            part.attn_mask = part.build_causal_mask().to(device)
        else:
            recompute = getattr(part, "init_non_persistent_buffers", None)
            assert recompute is not None, f"{type(part).__name__} has buffers {list(stale)} that nothing recomputes"
            recompute()
