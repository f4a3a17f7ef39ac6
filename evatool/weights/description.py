"""What a source says of its model, read from what lies beside the weights: a `ModelDescription`.

    file                                        says
    open_clip_config.json                       architecture, activation, input, tokenizer
    config.json of transformers                 architecture, activation
    preprocessor_config.json, processor_config.json    input
    a tag of open_clip (`open_clip:NAME/TAG`)   architecture, activation, input

What is said is believed, and held against the weights by whoever loads them. Guessing by shapes
(`weights/detect_preset.py`) is for sources that say nothing. What cannot be honoured is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError, RecipeError
from evatool.core.image_input import ImageInput
from evatool.model.config import ModelConfig, open_clip_config

OPEN_CLIP_CONFIG = "open_clip_config.json"
TRANSFORMERS_CONFIG = "config.json"
PROCESSOR_FILES = ("preprocessor_config.json", "processor_config.json")
TOKENIZER_FILES = ("tokenizer.json", "tokenizer_config.json", "spiece.model", "tokenizer.model", "vocab.json")

# What transformers' CLIPConfig stands for where a file leaves a value out.
_VISION_DEFAULTS = {"hidden_size": 768, "intermediate_size": 3072, "num_hidden_layers": 12, "num_attention_heads": 12}
_VISION_DEFAULTS |= {"image_size": 224, "patch_size": 32}
_TEXT_DEFAULTS = {"hidden_size": 512, "intermediate_size": 2048, "num_hidden_layers": 12, "num_attention_heads": 8}
_TEXT_DEFAULTS |= {"max_position_embeddings": 77, "vocab_size": 49408}
_CLIP_ACTIVATION = "quick_gelu"
_RESAMPLE = {2: "bilinear", 3: "bicubic", "bilinear": "bilinear", "bicubic": "bicubic"}


@dataclass(frozen=True)
class ModelDescription:
    """What a source says of its model; None for what it does not say.

    Attributes:
        config: the architecture, with the input where that is said as well.
        quick_gelu: the activation, where the architecture is not said or is told by the shapes better.
        input: how images are made.
        input_sides: sides (H, W) of the input in pixels that the description of the images names.
        licence: as the file names it.
        origins: the file that says it, by the name of an attribute.
    """

    config: ModelConfig | None = None
    quick_gelu: bool | None = None
    input: ImageInput | None = None
    input_sides: tuple[int, int] | None = None
    licence: str | None = None
    origins: Mapping[str, str] = field(default_factory=dict)

    def applied_to(self, config: ModelConfig, where: str) -> ModelConfig:
        """`config`, of these shapes, with the activation and input that are said here.

        Raises: CheckpointError where both say different things of the same model.
        """
        if self.quick_gelu is not None and self.quick_gelu != config.quick_gelu:
            if config.is_eva:
                raise CheckpointError(
                    f"{self.origins['quick_gelu']} says QuickGELU, and the weights are those of {config.name}, "
                    "which has the exact GELU",
                    where=where,
                    expected="an activation that the model was trained with",
                    fix="correct the file, or name the model: model_config = a preset",
                )
            config = replace(config, quick_gelu=self.quick_gelu)
        if self.input_sides is not None and self.input_sides != config.input_size:
            raise CheckpointError(
                f"{self.origins['input_sides']} says images of {_sides(self.input_sides)}, and the model takes "
                f"{_sides(config.input_size)}",
                where=where,
                expected="one size in both",
                fix="correct the file that is wrong; image_size resizes a model on purpose",
            )
        return config if self.input is None else replace(config, input=self.input)


def describe_model(path: Path) -> ModelDescription:
    """What lies beside the weights at `path`, a file or a folder, says of them.

    Raises: CheckpointError where a description cannot be read, or asks for what evatool cannot do.
    """
    folder = path if path.is_dir() else path.parent
    if (folder / OPEN_CLIP_CONFIG).is_file():
        return _of_open_clip(folder / OPEN_CLIP_CONFIG)
    found = ModelDescription()
    if (folder / TRANSFORMERS_CONFIG).is_file():
        found = _of_transformers(folder / TRANSFORMERS_CONFIG)
    if found.config is None and found.quick_gelu is None:
        return found  # somebody else's folder: a file in it need not be about these weights
    for name in PROCESSOR_FILES:
        table = read_object(folder / name) if (folder / name).is_file() else {}
        table = table.get("image_processor", {}) if name == PROCESSOR_FILES[1] else table
        if table:
            return _with_input(found, processor_input(table, folder / name), folder / name)
    return found


def read_object(path: Path) -> dict[str, Any]:
    """A JSON file that holds an object. Raises: CheckpointError."""
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name} is no JSON object", where=str(path))
    return table


# ------------------------------------------------------------------------------------------------------- open_clip


def _of_open_clip(path: Path) -> ModelDescription:
    table = read_object(path)
    model_cfg = table.get("model_cfg")
    if not isinstance(model_cfg, Mapping):
        raise CheckpointError("model_cfg is missing", where=str(path), expected="open_clip's description of a model")
    try:
        config = open_clip_config(with_own_tokenizer(model_cfg, path.parent), path.parent.name)
    except RecipeError as error:
        raise CheckpointError(str(error), where=str(path)) from error
    found = ModelDescription(
        config=config,
        quick_gelu=config.quick_gelu,
        licence=_text_or_none(table.get("license")),
        origins={"config": path.name, "quick_gelu": path.name},
    )
    preprocess = table.get("preprocess_cfg")
    return found if preprocess is None else _with_input(found, open_clip_input(preprocess, path), path)


def with_own_tokenizer(model_cfg: Mapping[str, Any], folder: Path) -> dict[str, Any]:
    """`model_cfg` with its tokenizer of transformers taken from `folder`, where that holds one, as open_clip does."""
    text = model_cfg.get("text_cfg")
    has_files = any((folder / name).is_file() for name in TOKENIZER_FILES)
    if not isinstance(text, Mapping) or not text.get("hf_tokenizer_name") or not has_files:
        return dict(model_cfg)
    return {**model_cfg, "text_cfg": {**text, "hf_tokenizer_name": str(folder.resolve())}}


def open_clip_input(preprocess: Any, path: Path) -> tuple[ImageInput, tuple[int, int] | None]:
    """The input that open_clip's `preprocess_cfg` describes, and its sides where they are said.

    Raises: CheckpointError for what evatool cannot do.
    """
    if not isinstance(preprocess, Mapping):
        raise CheckpointError("preprocess_cfg is no object", where=str(path))
    if preprocess.get("mode", "RGB") != "RGB":
        raise CheckpointError(f"preprocess_cfg.mode is {preprocess['mode']!r}", where=str(path), expected="RGB")
    names = {"mean": "mean", "std": "std", "interpolation": "interpolation", "resize_mode": "resize"}
    names["fill_color"] = "fill"
    table = {ours: preprocess[theirs] for theirs, ours in names.items() if preprocess.get(theirs) is not None}
    if table.get("interpolation") == "random":
        table["interpolation"] = "bicubic"  # open_clip's own reading of it outside training
    return _input_of(table, path), _pair(preprocess.get("size"), path)


# ---------------------------------------------------------------------------------------------------- transformers


def _of_transformers(path: Path) -> ModelDescription:
    """Of a CLIP of transformers: the file names no other kind, or its towers say what they are."""
    table = read_object(path)
    vision, text = table.get("vision_config"), table.get("text_config")
    if not isinstance(vision, Mapping) or not isinstance(text, Mapping):
        return ModelDescription()
    kind = table.get("model_type", "clip")
    if kind != "clip":
        return ModelDescription(licence=_text_or_none(table.get("license")))
    # BAAI's EVA-CLIP comes with code of its own, whose default is the exact GELU.
    default = "gelu" if "auto_map" in table else _CLIP_ACTIVATION
    activations = [tower.get("hidden_act", default) for tower in (vision, text)]
    if activations[0] != activations[1]:
        raise CheckpointError(
            f"the image tower has {activations[0]} and the text tower {activations[1]}",
            where=str(path),
            expected="one activation in both towers",
        )
    if activations[0] not in ("gelu", "quick_gelu"):
        raise CheckpointError(f"the activation {activations[0]!r} is not known", where=str(path), expected="gelu")
    origins = {"config": path.name, "quick_gelu": path.name}
    quick_gelu = activations[0] == "quick_gelu"
    config = _plain_clip(table, {**_VISION_DEFAULTS, **vision}, {**_TEXT_DEFAULTS, **text}, quick_gelu, path)
    return ModelDescription(config, quick_gelu, licence=_text_or_none(table.get("license")), origins=origins)


def _plain_clip(
    table: Mapping[str, Any], vision: Mapping[str, Any], text: Mapping[str, Any], quick_gelu: bool, path: Path
) -> ModelConfig | None:
    """The configuration in our words; None where the file is of a model with code of its own (BAAI's)."""
    if "auto_map" in table:
        return None
    try:
        return ModelConfig.from_json(
            {
                "embed_dim": table.get("projection_dim", 512),
                "vision_cfg": {
                    "tower": "clip-vit",
                    "image_size": vision["image_size"],
                    "patch_size": vision["patch_size"],
                    "layers": vision["num_hidden_layers"],
                    "width": vision["hidden_size"],
                    "head_width": vision["hidden_size"] // vision["num_attention_heads"],
                    "mlp_ratio": vision["intermediate_size"] / vision["hidden_size"],
                },
                "text_cfg": {
                    "context_length": text["max_position_embeddings"],
                    "vocab_size": text["vocab_size"],
                    "width": text["hidden_size"],
                    "heads": text["num_attention_heads"],
                    "layers": text["num_hidden_layers"],
                    "mlp_ratio": text["intermediate_size"] / text["hidden_size"],
                },
                "quick_gelu": quick_gelu,
            },
            name=path.parent.name,
        )
    except (RecipeError, TypeError, ZeroDivisionError) as error:
        raise CheckpointError(f"{path.name} describes no model: {error}", where=str(path)) from error


def processor_input(table: Mapping[str, Any], path: Path) -> tuple[ImageInput, tuple[int, int] | None]:
    """The input that an image processor of transformers makes, and its sides.

    Raises: CheckpointError for what evatool cannot do.
    """
    if not table.get("do_resize", True) or not table.get("do_rescale", True):
        raise CheckpointError("images that are not resized or not rescaled cannot be made", where=str(path))
    factor = table.get("rescale_factor", 1 / 255)
    if not isinstance(factor, int | float) or abs(factor * 255 - 1) > 1e-6:
        raise CheckpointError(f"rescale_factor is {factor!r}", where=str(path), expected="1/255")
    given: dict[str, Any] = {}
    if not table.get("do_normalize", True):
        given |= {"mean": [0.0] * 3, "std": [1.0] * 3}
    else:
        given |= {ours: table[f"image_{ours}"] for ours in ("mean", "std") if table.get(f"image_{ours}") is not None}
    if table.get("resample") is not None:
        resample = table["resample"]
        if resample not in _RESAMPLE:
            raise CheckpointError(f"resample is {resample!r}", where=str(path), expected="2 (bilinear) or 3 (bicubic)")
        given["interpolation"] = _RESAMPLE[resample]
    sides = _processor_sides(table, path)
    given["resize"] = "squash" if _is_pair(table.get("size")) and not table.get("do_center_crop") else "shortest"
    return _input_of(given, path), sides


def _is_pair(size: Any) -> bool:
    return isinstance(size, Mapping) and "height" in size


def _processor_sides(table: Mapping[str, Any], path: Path) -> tuple[int, int] | None:
    size, crop = table.get("size"), table.get("crop_size") if table.get("do_center_crop") else None
    sides = _processor_size(size, path)
    cropped = sides if crop is None else _processor_size(crop, path)
    if sides is not None and cropped is not None and sides != cropped:
        raise CheckpointError(
            f"images are resized to {_sides(sides)} and cropped to {_sides(cropped)}",
            where=str(path),
            expected="the size of the crop in both",
            fix="set size and crop_size to the model's input",
        )
    return cropped or sides


def _processor_size(size: Any, path: Path) -> tuple[int, int] | None:
    if isinstance(size, Mapping):
        size = size.get("shortest_edge") or [size.get("height"), size.get("width")]
    return _pair(size, path)


# ------------------------------------------------------------------------------------------------------------ parts


def _with_input(
    found: ModelDescription, read: tuple[ImageInput, tuple[int, int] | None], path: Path
) -> ModelDescription:
    wanted, sides = read
    origins = {**found.origins, "input": path.name} | ({} if sides is None else {"input_sides": path.name})
    return replace(found, input=wanted, input_sides=sides, origins=origins)


def _input_of(table: Mapping[str, Any], path: Path) -> ImageInput:
    try:
        return ImageInput.from_json(table)
    except ValueError as error:
        raise CheckpointError(f"{path.name} describes no input: {error}", where=str(path)) from error


def _pair(size: Any, path: Path) -> tuple[int, int] | None:
    if size is None:
        return None
    sides = list(size) if isinstance(size, list | tuple) else [size, size]
    if len(sides) != 2 or not all(isinstance(side, int) and 0 < side <= 2**15 for side in sides):
        raise CheckpointError(f"{size!r} is no size of an image", where=str(path), expected="a side in pixels, or two")
    return sides[0], sides[1]


def _sides(sides: tuple[int, int]) -> str:
    return f"{sides[0]} x {sides[1]} pixels"


def _text_or_none(value: Any) -> str | None:
    return value if isinstance(value, str) else None
