"""Model configurations by name, in BAAI's own vocabulary (`embed_dim`, `vision_cfg`, `text_cfg`). No torch here.

Widths, depths and ratios of the released models: eva.md 1.1, 1.3 and 1.5. The `debug` and `toy` rows are ours.
"""

from __future__ import annotations

import difflib
import json
import re
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evatool.errors import RecipeError

Task = Literal["clip", "mim"]

VISION_DEFAULTS: dict[str, Any] = {
    "image_size": 224,
    "patch_size": 16,
    "layers": 12,
    "width": 768,
    "head_width": 64,
    "mlp_ratio": 4.0,
    "ls_init_value": None,  # layer scale; off in every released model
    "qkv_bias": True,  # q and v only; the key never has one. False also means a projection without bias
    "postnorm": False,  # norm on the branch output (bigE, 18B)
    "use_rms_norm": False,  # RMSNorm instead of LayerNorm (8B, 18B)
    "rope": False,
    "pt_hw_seq_len": 16,  # grid side whose integer positions RoPE keeps when `intp_freq` rescales to another grid
    "intp_freq": False,
    "naiveswiglu": False,  # SwiGLU with its own norm, gate and value as two matrices
    "subln": False,  # separate q/k/v matrices, and a norm before the attention's output projection
    # Ours: what the released code decides elsewhere.
    "swiglu": False,  # SwiGLU in one packed matrix without norm (EVA-02 Ti and S)
    "inner_attn_ln": None,  # the norm of `subln`; as `subln` when None. EVA-02's MIM models have none
    "init": "eva-clip",  # eva-clip, eva-01 or eva-02: see model/init.py
    "init_std": 0.02,
    "head_init_scale": 0.001,  # factor on the projection's first weights; the released value
}
"""Keys of a vision configuration with EVA's defaults."""

TEXT_DEFAULTS: dict[str, Any] = {
    "context_length": 77,
    "vocab_size": 49408,
    "width": 512,
    "heads": 8,
    "layers": 12,
    "mlp_ratio": 4.0,
    "ls_init_value": None,
}
"""Keys of a text configuration with EVA's defaults."""

# Keys of BAAI's JSON files that choose a kernel or a training setting, not a model.
INERT_VISION_KEYS = frozenset(
    {"eva_model_name", "xattn", "fusedLN", "drop_path_rate", "patch_dropout", "global_average_pool"}
)
INERT_TEXT_KEYS = frozenset({"xattn", "fusedLN"})

# Constructor arguments of the released MIM models -> the keys above (eva.md 1.5).
MIM_ARGUMENTS = {"img_size": "image_size", "embed_dim": "width", "depth": "layers"}


@dataclass(frozen=True)
class ModelConfig:
    """One model. `vision` and `text` hold every key of their defaults, so that a stored config stays readable.

    Attributes:
        name: preset name, or the name of the file it came from.
        embed_dim: width of the shared embedding; None for a MIM model.
        vision, text: configurations of the towers; `text` is None for a MIM model.
        predict_dim: outputs of the prediction head of a MIM model.
        decoder: the decoder of an MAE-style MIM model (EVA-L): `width`, `layers`, `heads`.
    """

    name: str
    embed_dim: int | None
    vision: dict[str, Any]
    text: dict[str, Any] | None = None
    predict_dim: int | None = None
    decoder: dict[str, int] | None = field(default=None)

    @property
    def task(self) -> Task:
        """`clip` or `mim`."""
        return "mim" if self.text is None else "clip"

    @property
    def image_size(self) -> int:
        """Input side in pixels."""
        return self.vision["image_size"]

    @property
    def patch_size(self) -> int:
        """Patch side in pixels."""
        return self.vision["patch_size"]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def width(self) -> int:
        """Width of the image tower."""
        return self.vision["width"]

    @property
    def depth(self) -> int:
        """Blocks of the image tower."""
        return self.vision["layers"]

    @property
    def num_heads(self) -> int:
        """Attention heads of the image tower."""
        return self.width // self.vision["head_width"]

    @property
    def text_depth(self) -> int:
        """Blocks of the text tower; 0 without one."""
        return self.text["layers"] if self.text else 0

    @property
    def context_length(self) -> int:
        """Text tokens a caption is padded or cut to; 0 without a text tower."""
        return self.text["context_length"] if self.text else 0

    def with_image_size(self, image_size: int | None) -> ModelConfig:
        """The same model for another input side; None keeps the side. Raises RecipeError if patches do not fit."""
        if image_size is None or image_size == self.image_size:
            return self
        return _checked(replace(self, vision={**self.vision, "image_size": image_size}))

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form; `from_json` reads it back equal."""
        table: dict[str, Any] = {"name": self.name, "task": self.task, "vision_cfg": dict(self.vision)}
        optional = {
            "embed_dim": self.embed_dim,
            "text_cfg": self.text and dict(self.text),
            "predict_dim": self.predict_dim,
            "decoder": self.decoder and dict(self.decoder),
        }
        return table | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], name: str | None = None) -> ModelConfig:
        """A configuration from our JSON or from a JSON file of BAAI's. Raises RecipeError naming every bad key."""
        unknown = set(table) - {"name", "task", "embed_dim", "vision_cfg", "text_cfg", "predict_dim", "decoder"}
        unknown -= {"custom_text", "quick_gelu"}
        problems = [f"unknown key {key!r}" for key in sorted(unknown)]
        if not isinstance(table.get("vision_cfg"), Mapping):
            problems.append("vision_cfg is missing")
            raise RecipeError("this is not a model configuration", problems=problems, fix="see docs/models.md")
        vision = _filled(table["vision_cfg"], VISION_DEFAULTS, INERT_VISION_KEYS, "vision_cfg", problems)
        text_cfg = table.get("text_cfg")
        text = None if text_cfg is None else _filled(text_cfg, TEXT_DEFAULTS, INERT_TEXT_KEYS, "text_cfg", problems)
        if text is not None and "embed_dim" not in table:
            problems.append("embed_dim is missing")
        if table.get("quick_gelu"):
            problems.append("quick_gelu is true, but EVA's text towers use the exact GELU")
        if problems:
            raise RecipeError("this model configuration cannot be used", problems=problems, fix="see docs/models.md")
        return _checked(
            cls(
                name=name or table.get("name") or "unnamed",
                embed_dim=table.get("embed_dim"),
                vision=vision,
                text=text,
                predict_dim=table.get("predict_dim"),
                decoder=table.get("decoder"),
            )
        )


def from_mim_arguments(arguments: Mapping[str, Any], name: str = "unnamed") -> ModelConfig:
    """A MIM configuration from the constructor arguments of EVA's `modeling_pretrain.py` (eva.md 1.5).

    RoPE positions there are integers on the training grid, so `pt_hw_seq_len` is the grid's side.
    """
    table = {MIM_ARGUMENTS.get(key, key): value for key, value in arguments.items()}
    predict_dim = table.pop("predict_feature_dim", None)
    table["head_width"] = table["width"] // table.pop("num_heads")
    table["init"] = "eva-02" if table.pop("xavier_normal_init", False) else "eva-01"
    table["pt_hw_seq_len"] = table.get("image_size", 224) // table.get("patch_size", 16)
    table["inner_attn_ln"] = False
    return ModelConfig.from_json({"vision_cfg": table, "predict_dim": predict_dim}, name=name)


def mim_config(config: ModelConfig, predict_dim: int | None = None) -> ModelConfig:
    """The MIM form of `config`: its image tower without projection, with EVA-02's rules where it has RoPE.

    EVA-02's MIM models have no norm inside the attention although their CLIP forms do (eva.md 1.5), so that norm
    starts fresh when a CLIP model is initialised from the result.
    """
    if config.task == "mim":
        return replace(config, predict_dim=predict_dim or config.predict_dim)
    vision = {**config.vision, "inner_attn_ln": False, "init": "eva-02" if config.vision["rope"] else "eva-01"}
    return ModelConfig(name=config.name, embed_dim=None, vision=vision, text=None, predict_dim=predict_dim)


def _filled(
    given: Mapping[str, Any], defaults: dict[str, Any], inert: frozenset[str], where: str, problems: list[str]
) -> dict[str, Any]:
    """`given` over `defaults`; what no model of ours has goes to `problems`."""
    for key in given:
        if key not in defaults and key not in inert:
            near = difflib.get_close_matches(key, defaults, n=1)
            problems.append(f"{where}.{key} is unknown" + (f"; did you mean {near[0]!r}?" if near else ""))
    if given.get("global_average_pool"):
        problems.append(f"{where}.global_average_pool is true, but EVA-CLIP pools the class token")
    return defaults | {key: value for key, value in given.items() if key in defaults}


def _checked(config: ModelConfig) -> ModelConfig:
    vision, problems = config.vision, []
    if vision["image_size"] % vision["patch_size"]:
        side, patch = vision["image_size"], vision["patch_size"]
        near = sorted({side // patch * patch, -(-side // patch) * patch} - {0})
        problems.append(
            f"image_size = {side} is no multiple of patch_size = {patch}; nearest that are: "
            + ", ".join(str(value) for value in near)
        )
    if vision["width"] % vision["head_width"]:
        problems.append(f"width = {vision['width']} is no multiple of head_width = {vision['head_width']}")
    if vision["rope"] and vision["head_width"] % 4:
        problems.append(f"head_width = {vision['head_width']} with rope must be a multiple of 4")
    if vision["rope"] and not vision["intp_freq"] and vision["pt_hw_seq_len"] != config.grid[0]:
        problems.append(
            f"pt_hw_seq_len = {vision['pt_hw_seq_len']} differs from the grid side {config.grid[0]}: set intp_freq"
        )
    if config.text and config.text["width"] % config.text["heads"]:
        problems.append(f"text width = {config.text['width']} is no multiple of heads = {config.text['heads']}")
    if problems:
        raise RecipeError(f"model {config.name!r} cannot be built", problems=problems)
    return config


# ------------------------------------------------------------------------------------------------------ the tables

_EVA01 = {"patch_size": 14, "layers": 40, "width": 1408, "head_width": 88, "mlp_ratio": 4.3637}
_EVA02 = {
    "head_width": 64,
    "mlp_ratio": 2.6667,
    "rope": True,
    "pt_hw_seq_len": 16,
    "intp_freq": True,
    "naiveswiglu": True,
    "subln": True,
}
_BIG_E = {
    "patch_size": 14,
    "layers": 64,
    "width": 1792,
    "head_width": 112,
    "mlp_ratio": 8.571428571428571,
    "postnorm": True,
}
_EVA_8B = {
    "patch_size": 14,
    "layers": 32,
    "width": 4096,
    "head_width": 128,
    "mlp_ratio": 5.0,
    "qkv_bias": False,
    "use_rms_norm": True,
}
_EVA_18B = {**_EVA_8B, "layers": 48, "width": 5120, "postnorm": True}
_B = {**_EVA02, "patch_size": 16, "layers": 12, "width": 768}
_L = {**_EVA02, "patch_size": 14, "layers": 24, "width": 1024}

# name: embed_dim, vision, text (width, heads, layers)
_CLIP: dict[str, tuple[int, dict[str, Any], tuple[int, int, int]]] = {
    "EVA01-CLIP-g-14": (1024, _EVA01, (768, 12, 12)),
    "EVA01-CLIP-g-14-plus": (1024, _EVA01, (1024, 16, 24)),
    "EVA02-CLIP-B-16": (512, _B, (512, 8, 12)),
    "EVA02-CLIP-L-14": (768, _L, (768, 12, 12)),
    "EVA02-CLIP-L-14-336": (768, {**_L, "image_size": 336}, (768, 12, 12)),
    "EVA02-CLIP-bigE-14": (1024, _BIG_E, (1024, 16, 24)),
    "EVA02-CLIP-bigE-14-plus": (1024, _BIG_E, (1280, 20, 32)),
    "EVA-CLIP-8B": (1280, _EVA_8B, (1280, 20, 32)),
    "EVA-CLIP-8B-448": (1280, {**_EVA_8B, "image_size": 448}, (1280, 20, 32)),
    "EVA-CLIP-18B": (1536, _EVA_18B, (1280, 20, 32)),
    "EVA-CLIP-18B-336": (1536, {**_EVA_18B, "image_size": 336}, (1280, 20, 32)),  # as the paper says; no release
}

# Ours, small enough for a CPU. Head scale 1: with the released 0.001 a toy model at a learning rate that suits it
# was seen to stay at ln(batch), because the projection starts a thousand times too small to be found in time.
_TOY = {**_EVA02, "image_size": 48, "patch_size": 12, "head_init_scale": 1.0}
_TOYS: dict[str, tuple[int, dict[str, Any], dict[str, int]]] = {
    "EVA02-CLIP-toy": (
        128,
        {**_TOY, "layers": 4, "width": 128},
        {"context_length": 16, "width": 128, "heads": 2, "layers": 2},
    ),
    "EVA02-CLIP-toy-small": (
        128,
        {**_TOY, "layers": 4, "width": 96, "head_width": 32},
        {"context_length": 16, "width": 96, "heads": 3, "layers": 2},
    ),
    "EVA02-CLIP-debug": (
        32,
        {**_TOY, "image_size": 32, "patch_size": 8, "layers": 2, "width": 64, "head_width": 32},
        {"context_length": 16, "width": 64, "heads": 2, "layers": 1},
    ),
}

_MIM_02 = {**_EVA02, "patch_size": 14, "mlp_ratio": 8 / 3, "inner_attn_ln": False, "init": "eva-02"}
_MIM_02_PLAIN = {**_MIM_02, "naiveswiglu": False, "subln": False, "swiglu": True}

# name: outputs of the prediction head (the teacher's embedding), vision
_MIM: dict[str, tuple[int, dict[str, Any]]] = {
    "EVA-01-g": (768, {**_EVA01, "init": "eva-01", "init_std": 0.015}),
    "EVA-02-Ti": (1024, {**_MIM_02_PLAIN, "layers": 12, "width": 192}),
    "EVA-02-S": (1024, {**_MIM_02_PLAIN, "layers": 12, "width": 384}),
    "EVA-02-B": (1024, {**_MIM_02, "layers": 12, "width": 768}),
    "EVA-02-L": (1024, {**_MIM_02, "layers": 24, "width": 1024}),
    # No recipe was released for these three; initialised as EVA-01, the family whose block they share.
    "EVA-02-E": (1024, {**_BIG_E, "init": "eva-01"}),
    "EVA-8B": (1024, {**_EVA_8B, "init": "eva-01"}),
    "EVA-18B": (1024, {**_EVA_18B, "init": "eva-01"}),
}


# A masked autoencoder: plain blocks with q, k and v biases and fixed positions, and a decoder of its own.
_EVA_L = {"patch_size": 14, "layers": 24, "width": 1024, "mlp_ratio": 4.0}


def _build_presets() -> dict[str, ModelConfig]:
    tables: dict[str, dict[str, Any]] = {}
    for name, (embed_dim, vision, (width, heads, layers)) in _CLIP.items():
        text: dict[str, Any] = {"width": width, "heads": heads, "layers": layers}
        tables[name] = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    for name, (embed_dim, vision, text) in _TOYS.items():
        tables[name] = {"embed_dim": embed_dim, "vision_cfg": vision, "text_cfg": text}
    for name, (predict_dim, vision) in _MIM.items():
        tables[name] = {"predict_dim": predict_dim, "vision_cfg": vision}
    tables["EVA-L"] = {"predict_dim": 1024, "vision_cfg": _EVA_L, "decoder": {"width": 512, "layers": 4, "heads": 16}}
    return {name: ModelConfig.from_json(table, name=name) for name, table in tables.items()}


PRESETS: dict[str, ModelConfig] = _build_presets()
"""Every preset by its own name."""

# Other spellings: open_clip's, BAAI's file stems and the papers'.
_ALIASES = {
    "EVA01-g-14": "EVA01-CLIP-g-14",
    "EVA01-g-14-plus": "EVA01-CLIP-g-14-plus",
    "EVA02-B-16": "EVA02-CLIP-B-16",
    "EVA02-L-14": "EVA02-CLIP-L-14",
    "EVA02-L-14-336": "EVA02-CLIP-L-14-336",
    "EVA02-E-14": "EVA02-CLIP-bigE-14",
    "EVA02-E-14-plus": "EVA02-CLIP-bigE-14-plus",
    "EVA02-CLIP-E-14": "EVA02-CLIP-bigE-14",
    "EVA02-CLIP-E-14-plus": "EVA02-CLIP-bigE-14-plus",
    "EVA02-CLIP-toy-8": "EVA02-CLIP-toy",
    "EVA02-CLIP-toy-8-small": "EVA02-CLIP-toy-small",
    "EVA-CLIP-8B-plus": "EVA-CLIP-8B-448",
    "EVA-CLIP-18B-plus": "EVA-CLIP-18B-336",
}


def _plain(name: str) -> str:
    """The spelling that decides: case, separators and the hyphens of `EVA-02` and `336px` do not matter."""
    text = re.sub(r"[\s_/+]+", "-", name.strip().replace("+", "-plus")).lower()
    text = re.sub(r"\beva-?0([12])", r"eva0\1", text)
    text = re.sub(r"-(psz|patch)?(\d+)(px)?(?=-|$)", r"-\2", text)
    return re.sub(r"-+", "-", text).strip("-")


_BY_SPELLING = {_plain(name): name for name in PRESETS} | {_plain(a): name for a, name in _ALIASES.items()}


def resolve_preset(name: str) -> ModelConfig:
    """The preset called `name`, in our, BAAI's or open_clip's spelling. Raises RecipeError with the nearest names."""
    found = _BY_SPELLING.get(_plain(name))
    if found is not None:
        return PRESETS[found]
    near = difflib.get_close_matches(_plain(name), _BY_SPELLING, n=3, cutoff=0.6)
    suggestions = list(dict.fromkeys(_BY_SPELLING[spelling] for spelling in near))
    raise RecipeError(
        f"no model preset is called {name!r}",
        expected="one of " + ", ".join(PRESETS),
        fix=f"did you mean {' or '.join(suggestions)}?" if suggestions else "see docs/models.md for the names",
    )


def fingerprint_text(config: ModelConfig) -> str:
    """A canonical text of what `config` builds, without its name."""
    table = config.to_json()
    table.pop("name")
    return json.dumps(table, sort_keys=True)
