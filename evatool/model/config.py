"""The configuration of a model, in BAAI's own vocabulary (`embed_dim`, `vision_cfg`, `text_cfg`). No torch here."""

from __future__ import annotations

import difflib
import json
from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from typing import Any, Literal

from evatool.core.errors import RecipeError
from evatool.core.image_input import ImageInput

Task = Literal["clip", "mim"]
TowerKind = Literal["eva", "clip-vit", "open_clip"]

VISION_DEFAULTS: dict[str, Any] = {
    "tower": "eva",  # ours: eva, or clip-vit for the ViT of OpenAI's and LAION's CLIP
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

# What a clip-vit tower has; every other key is EVA's.
_VIT_KEYS = frozenset({"tower", "image_size", "patch_size", "layers", "width", "head_width", "mlp_ratio"})

# Keys of BAAI's JSON files that choose a kernel or a training setting, not a model.
INERT_VISION_KEYS = frozenset(
    {"eva_model_name", "xattn", "fusedLN", "drop_path_rate", "patch_dropout", "global_average_pool"}
)
INERT_TEXT_KEYS = frozenset({"xattn", "fusedLN"})

# Constructor arguments of the released MIM models -> the keys above (docs/reference/eva.md#masked-image-models).
MIM_ARGUMENTS = {"img_size": "image_size", "embed_dim": "width", "depth": "layers"}


DEFAULT_LOGIT_BIAS = -10.0
"""First bias of SigLIP (arXiv 2303.15343), where a source has a bias and states no first value."""


@dataclass(frozen=True)
class ModelConfig:
    """One model. `vision` and `text` hold every key of their defaults, so that a stored config stays readable.

    Attributes:
        name: preset name, or the name of the file it came from.
        embed_dim: width of the shared embedding; None for a MIM model.
        vision, text: configurations of the towers; `text` is None for a MIM model.
        predict_dim: outputs of the prediction head of a MIM model.
        decoder: the decoder of an MAE-style MIM model (EVA-L): `width`, `layers`, `heads`.
        quick_gelu: x sigmoid(1.702 x) instead of the exact GELU, as OpenAI trained; only with a clip-vit tower.
        init_logit_bias: first value of the bias on similarities of a model trained with the sigmoid loss; None for a
            model without one.
        input: how its images are made from pictures.
        open_clip: a model of any other architecture, as open_clip's JSON files describe it (`model_cfg`); then the
            tower is "open_clip", and `vision` and `text` hold only its input sides, context and vocabulary.
    """

    name: str
    embed_dim: int | None
    vision: dict[str, Any]
    text: dict[str, Any] | None = None
    predict_dim: int | None = None
    decoder: dict[str, int] | None = None
    quick_gelu: bool = False
    init_logit_bias: float | None = None
    input: ImageInput = field(default_factory=ImageInput)
    open_clip: dict[str, Any] | None = None

    @property
    def task(self) -> Task:
        """`clip` or `mim`."""
        return "mim" if self.text is None else "clip"

    @property
    def is_eva(self) -> bool:
        """True for an EVA image tower, False for OpenAI's ViT."""
        return bool(self.vision["tower"] == "eva")

    @property
    def input_size(self) -> tuple[int, int]:
        """Input sides (H, W) in pixels."""
        size = self.vision["image_size"]
        return (int(size[0]), int(size[1])) if isinstance(size, list | tuple) else (int(size), int(size))

    @property
    def image_size(self) -> int:
        """Input side in pixels. Raises: RecipeError where the input is no square."""
        rows, columns = self.input_size
        if rows != columns:
            raise RecipeError(
                f"{self.name} takes images of {rows} x {columns} pixels, and what is asked for needs square ones",
                fix="load_clip, eval and embed take any sides",
            )
        return rows

    @property
    def patch_size(self) -> int:
        """Patch side in pixels."""
        return int(self._known("patch_size"))

    def _known(self, key: str) -> Any:
        """A key of the image tower that only evatool's own towers have. Raises: RecipeError for another's."""
        if key not in self.vision:
            raise RecipeError(
                f"{self.name} is described in open_clip's words; its {key} is not known to evatool",
                expected="an EVA model, or a ViT as OpenAI's and LAION's CLIP have it",
                fix="such a model can be loaded, evaluated, exported to open_clip, and teach in a distillation",
            )
        return self.vision[key]

    @property
    def grid(self) -> tuple[int, int]:
        """Patches (rows, columns)."""
        side = self.image_size // self.patch_size
        return side, side

    @property
    def width(self) -> int:
        """Width of the image tower."""
        return int(self._known("width"))

    @property
    def depth(self) -> int:
        """Blocks of the image tower."""
        return int(self._known("layers"))

    @property
    def num_heads(self) -> int:
        """Attention heads of the image tower."""
        return self.width // int(self._known("head_width"))

    @property
    def has_inner_attn_norm(self) -> bool:
        """True where a norm stands before the output projection of attention (`inner_attn_ln`; `subln` when None)."""
        inner = self.vision["inner_attn_ln"]
        return bool(self.vision["subln"] if inner is None else inner)

    @property
    def text_depth(self) -> int:
        """Blocks of the text tower; 0 without one."""
        if self.open_clip is not None:
            self._known("layers")
        return int(self.text["layers"]) if self.text else 0

    @property
    def context_length(self) -> int:
        """Text tokens a caption is padded or cut to; 0 without a text tower."""
        return int(self.text["context_length"]) if self.text else 0

    def with_image_size(self, image_size: int | None) -> ModelConfig:
        """This model for another input side; None keeps the side. Raises RecipeError if patches do not fit."""
        if image_size is None or (image_size, image_size) == self.input_size:
            return self
        if self.open_clip is not None:
            cfg = {**self.open_clip, "vision_cfg": {**self.open_clip["vision_cfg"], "image_size": image_size}}
            return open_clip_config(cfg, self.name, self.input)
        return _checked(replace(self, vision={**self.vision, "image_size": image_size}))

    def with_patch_size(self, patch_size: int | None) -> ModelConfig:
        """This model with other patches on an image of its size; None keeps them. Raises RecipeError as above."""
        if patch_size is None or patch_size == self.patch_size:
            return self
        return _checked(replace(self, vision={**self.vision, "patch_size": patch_size}))

    def with_sides(self, image_size: int | None, patch_size: int | None) -> ModelConfig:
        """This model at another input and patch side; both change at once, since either alone may not be whole patches.

        Raises: RecipeError if patches do not fit.
        """
        if patch_size is not None and image_size is not None:
            return _checked(replace(self, vision={**self.vision, "patch_size": patch_size, "image_size": image_size}))
        return self.with_image_size(image_size).with_patch_size(patch_size)

    def with_logit_bias(self, has_bias: bool) -> ModelConfig:
        """This model with a bias on its similarities, or without one; a value that it states stays."""
        if has_bias == (self.init_logit_bias is not None):
            return self
        return replace(self, init_logit_bias=DEFAULT_LOGIT_BIAS if has_bias else None)

    def with_depth(self, layers: int) -> ModelConfig:
        """This model with another number of blocks in its image tower."""
        return replace(self, vision={**self.vision, "layers": layers})

    def to_json(self) -> dict[str, Any]:
        """JSON-ready form; `from_json` reads it back equal."""
        table: dict[str, Any] = {"name": self.name, "task": self.task, "vision_cfg": dict(self.vision)}
        optional = {
            "embed_dim": self.embed_dim,
            "text_cfg": self.text and dict(self.text),
            "predict_dim": self.predict_dim,
            "decoder": self.decoder and dict(self.decoder),
            "quick_gelu": self.quick_gelu or None,
            "init_logit_bias": self.init_logit_bias,
            "input": self.input.differences or None,
            "open_clip": self.open_clip,
        }
        return table | {key: value for key, value in optional.items() if value is not None}

    @classmethod
    def from_json(cls, table: Mapping[str, Any], name: str | None = None) -> ModelConfig:
        """A configuration from our JSON or from a JSON file of BAAI's. Raises RecipeError naming every bad key."""
        if not isinstance(table, Mapping):  # it comes from a file
            raise RecipeError("a model configuration is a JSON object, and this is none", fix="see docs/models.md")
        unknown = set(table) - {"name", "task", "embed_dim", "vision_cfg", "text_cfg", "predict_dim", "decoder"}
        # open_clip's: every model of ours has the first; the scale's first value is the training recipe's
        unknown -= {"custom_text", "quick_gelu", "init_logit_bias", "init_logit_scale", "input", "open_clip"}
        problems = [f"unknown key {key!r}" for key in sorted(unknown)]
        if not isinstance(table.get("vision_cfg"), Mapping):
            problems.append("vision_cfg is missing")
            raise RecipeError("this is not a model configuration", problems=problems, fix="see docs/models.md")
        wanted = _input_of(table.get("input", {}), problems)
        if isinstance(table.get("open_clip"), Mapping) and not problems:
            return open_clip_config(table["open_clip"], name or table.get("name") or "unnamed", wanted)
        vision = _filled(table["vision_cfg"], VISION_DEFAULTS, INERT_VISION_KEYS, "vision_cfg", problems)
        text_cfg = table.get("text_cfg")
        text = None if text_cfg is None else _filled(text_cfg, TEXT_DEFAULTS, INERT_TEXT_KEYS, "text_cfg", problems)
        if text is not None and "embed_dim" not in table:
            problems.append("embed_dim is missing")
        bias = table.get("init_logit_bias")
        if bias is not None and (isinstance(bias, bool) or not isinstance(bias, int | float)):
            problems.append(f"init_logit_bias is {bias!r}, not a number")
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
                input=wanted,
                quick_gelu=bool(table.get("quick_gelu", False)),
                init_logit_bias=None if bias is None else float(bias),
            )
        )


def _input_of(table: Any, problems: list[str]) -> ImageInput:
    try:
        return ImageInput.from_json(table)
    except (ValueError, TypeError, AttributeError) as error:
        problems.append(f"input: {error}")
        return ImageInput()


def open_clip_config(model_cfg: Mapping[str, Any], name: str, wanted: ImageInput | None = None) -> ModelConfig:
    """A model as open_clip's JSON files describe it (`model_cfg`): in our words where they can say it, else in its own.

    Raises: RecipeError where it lacks a part that every such description has.
    """
    vision, text = model_cfg.get("vision_cfg"), model_cfg.get("text_cfg")
    embed_dim = model_cfg.get("embed_dim")
    lacking = [key for key, part in (("vision_cfg", vision), ("text_cfg", text)) if not isinstance(part, Mapping)]
    if not isinstance(embed_dim, int) or isinstance(embed_dim, bool):
        lacking.append("embed_dim")
    if lacking:
        raise RecipeError(
            f"this description of a model lacks {', '.join(lacking)}",
            where=name,
            expected="open_clip's model_cfg: embed_dim, vision_cfg and text_cfg",
        )
    assert isinstance(vision, Mapping)
    assert isinstance(text, Mapping)
    wanted = wanted or ImageInput()
    if _is_plain_vit(model_cfg, vision, text):
        given = {"tower": "clip-vit", **{key: vision[key] for key in vision if key in _VIT_KEYS}}
        table = {"embed_dim": embed_dim, "vision_cfg": given, "text_cfg": dict(text)}
        table["init_logit_bias"] = model_cfg.get("init_logit_bias")
        plain = ModelConfig.from_json({**table, "quick_gelu": bool(model_cfg.get("quick_gelu", False))}, name=name)
        return replace(plain, input=wanted)
    size = vision.get("image_size", 224)
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= 2**15 for side in sides):
        raise RecipeError(f"image_size = {size!r} is no side or pair of sides in pixels", where=name)
    return ModelConfig(
        name=name,
        embed_dim=embed_dim,
        vision={"tower": "open_clip", "image_size": sides[0] if sides[0] == sides[1] else sides},
        text={"context_length": text.get("context_length", 77), "vocab_size": text.get("vocab_size", 49408)},
        quick_gelu=bool(model_cfg.get("quick_gelu", False)),
        init_logit_bias=model_cfg.get("init_logit_bias"),
        input=wanted,
        open_clip=json.loads(json.dumps(model_cfg)),
    )


def _is_plain_vit(model_cfg: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any]) -> bool:
    """True for the ViT and text transformer of OpenAI's and LAION's CLIP, with nothing else about them."""
    only_tables = set(model_cfg) - {"init_logit_scale", "init_logit_bias"} <= {
        *("embed_dim", "vision_cfg", "text_cfg", "quick_gelu", "custom_text")
    }
    is_vit = set(vision) <= _VIT_KEYS - {"tower"} and isinstance(vision.get("layers"), int) and "patch_size" in vision
    is_square = isinstance(vision.get("image_size", 224), int) and isinstance(vision.get("patch_size"), int)
    return only_tables and is_vit and is_square and set(text) <= set(TEXT_DEFAULTS)


def from_mim_arguments(arguments: Mapping[str, Any], name: str = "unnamed") -> ModelConfig:
    """A MIM configuration from the constructor arguments of EVA's `modeling_pretrain.py`
    (docs/reference/eva.md#masked-image-models).

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

    EVA-02's MIM models have no norm inside the attention although their CLIP forms do
    (docs/reference/eva.md#masked-image-models), so that norm
    starts fresh when a CLIP model is initialised from the result.
    """
    if config.task == "mim":
        return replace(config, predict_dim=predict_dim or config.predict_dim)
    if not config.is_eva:
        raise RecipeError(
            f"{config.name} has OpenAI's image tower; masked image modelling trains EVA towers",
            fix="name an EVA preset as the student; this model can be its teacher",
        )
    vision = {**config.vision, "inner_attn_ln": False, "init": "eva-02" if config.vision["rope"] else "eva-01"}
    return ModelConfig(
        name=config.name, embed_dim=None, vision=vision, text=None, predict_dim=predict_dim, input=config.input
    )


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
    vision = config.vision
    problems = _tower_problems(config)
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


def _tower_problems(config: ModelConfig) -> list[str]:
    """Settings that the kind of tower does not have."""
    vision = config.vision
    if vision["tower"] == "open_clip":
        return ["tower = 'open_clip' needs open_clip's own description of the model under open_clip"]
    if vision["tower"] not in ("eva", "clip-vit"):
        return [f"tower = {vision['tower']!r} is neither 'eva' nor 'clip-vit'"]
    if config.is_eva:
        return (
            ["quick_gelu is true, but EVA towers and their text towers use the exact GELU"] if config.quick_gelu else []
        )
    extra = [key for key in vision if key not in _VIT_KEYS and vision[key] != VISION_DEFAULTS[key]]
    return [f"{key} = {vision[key]} is a setting of EVA towers, not of clip-vit" for key in extra]


NOT_ARCHITECTURE = frozenset({"init", "init_std", "head_init_scale"})
"""Vision keys that decide about first weights only."""


def fingerprint_text(config: ModelConfig) -> str:
    """A canonical text of what `config` builds, without its name and its first weights."""
    table = config.to_json()
    table.pop("name")
    if config.init_logit_bias is not None:
        table["init_logit_bias"] = True  # its value is among the weights
    table["vision_cfg"] = {k: v for k, v in config.vision.items() if k not in NOT_ARCHITECTURE}
    return json.dumps(table, sort_keys=True)
