"""What other people's Python imports: a trained model of any origin, ready to encode.

import evatool
clip = evatool.load_clip("runs/demo/distill")
features = clip.encode_image(clip.preprocess(picture)[None])
"""

from __future__ import annotations

import hashlib
import json
import logging
from collections.abc import Callable, Iterator, Mapping
from contextlib import contextmanager
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from evatool.checkpoint import load as checkpoints
from evatool.checkpoint.layout import AVERAGE
from evatool.core.errors import CheckpointError, RecipeError, UsageError
from evatool.core.image_norm import CLIP_MEAN, CLIP_STD, normalize_images
from evatool.data.tokenizer import Tokenizer, build_tokenizer
from evatool.export.open_clip import CONFIG as OPEN_CLIP_CONFIG
from evatool.export.open_clip import WEIGHTS as OPEN_CLIP_WEIGHTS
from evatool.formats.safetensors import dtype_of, shape_of
from evatool.model.clip import build_clip, visual_tokens
from evatool.model.config import ModelConfig, fingerprint_text
from evatool.model.presets import resolve_preset
from evatool.model.registration import register
from evatool.model.vision import match_key_biases
from evatool.weights.detect_preset import fitting_presets
from evatool.weights.key_mapping import canonical_state
from evatool.weights.load import SCALARS, FittedMap, fitted_clip_weights, load_clip_weights
from evatool.weights.open import NO_WEIGHTS, open_weights
from evatool.weights.resize import PatchResize

__all__ = ["LoadedClip", "Weights", "load_clip", "read_weights", "register"]

log = logging.getLogger(__name__)

# B batch, S input side in pixels, N patches, L text tokens, E embedding

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass
class Weights:
    """Weights as they were found, and what is known about their model."""

    state: Mapping[str, Tensor]
    configs: list[ModelConfig]  # what the source says it is, else every preset of its shapes: none, one or more
    source: str  # the file or folder that was read


@dataclass(eq=False)
class LoadedClip:
    """A CLIP model in eval mode, without gradients."""

    model: CustomTextCLIP
    config: ModelConfig
    source: str
    """Where the weights came from; `random weights of <preset>` for a preset."""
    preprocess: Callable[[Any], Tensor]
    """Picture (PIL) -> (3, S, S) float, resized by its shortest side, centre-cropped and normalised."""
    tokenizer: Tokenizer
    """Captions -> (B, L) int64."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stored_dtype: torch.dtype = torch.float32
    """Dtype of the weights where they were read."""

    @property
    def image_size(self) -> int:
        """Input side in pixels."""
        return self.config.image_size

    @property
    def context_length(self) -> int:
        """Text tokens of a caption, padding included."""
        return self.config.context_length

    @property
    def embed_dim(self) -> int:
        """Width of the features."""
        assert self.config.embed_dim is not None
        return self.config.embed_dim

    @cached_property
    def logit_scale(self) -> float:
        """The temperature's inverse, exponentiated."""
        return float(self.model.logit_scale.float().exp())

    @torch.no_grad()
    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image features (B, E) in float32.

        Args:
            image: (B, 3, S, S) uint8, or float that `preprocess` or `normalize_images` has normalised; any device.
            normalize: to unit length.
        """
        return _unit(self.model.encode_image(self._pixels(image)), normalize)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Text features (B, E) in float32.

        Args:
            tokens: (B, L) int64, L at most the context length; shorter rows are padded with zeros.
            normalize: to unit length.
        """
        tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1])).to(self.device)
        return _unit(self.model.encode_text(tokens), normalize)

    @torch.no_grad()
    def visual_tokens(self, image: Tensor) -> Tensor:
        """Projected patch tokens (B, N, E) in float32, class token dropped; `image` as in `encode_image`."""
        return visual_tokens(self.model, self._pixels(image)).float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and all weights: equal if and only if two models are the same."""
        digest = hashlib.sha256(fingerprint_text(self.config).encode())
        for name, tensor in sorted(self.model.state_dict().items()):
            digest.update(f"{name} {tuple(tensor.shape)} {tensor.dtype}".encode())
            flat = tensor.detach().cpu().contiguous().reshape(-1)
            digest.update(flat.view(torch.uint8).numpy().data)
        return digest.hexdigest()

    def _pixels(self, image: Tensor) -> Tensor:
        dtype = next(self.model.visual.parameters()).dtype
        return normalize_images(image.to(self.device), dtype=dtype)


def load_clip(
    source: str | Path,
    model_config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    patch_resize: PatchResize = "bicubic",
) -> LoadedClip:
    """A CLIP model from what `source` names, in eval mode.

    Args:
        source: a run folder (its newest whole checkpoint), a checkpoint folder, an exported open_clip folder, a weight
            file or folder of BAAI, open_clip, OpenAI, DeepSpeed or the Hugging Face hub (docs/models.md), or a preset
            name (random weights, with a warning).
        model_config: the model of a file that does not say it: a preset name, or a configuration in BAAI's vocabulary
            (mapping or JSON file). By default the preset whose shapes the file has.
        precision: arithmetic and storage of the weights; temperature, RoPE and RMSNorm stay float32.
        image_size, patch_size: sides in pixels where they differ from the model's; positions and the patch kernel are
            resized on loading (`patch_resize`: as EVA's scripts do, or FlexiViT's pseudo-inverse).

    Raises: CheckpointError if the weights are missing, damaged or of another model; UsageError if `source` is neither
    a path nor a preset.
    """
    register()
    config = None if model_config is None else _as_config(model_config)
    path = Path(source).expanduser()
    stored_dtype = torch.float32
    if path.exists():
        weights = read_weights(path)
        config = _resized(config or _only_config(weights), image_size, patch_size)
        clip = _build_loaded(weights, config, patch_resize, DTYPES[precision])
        stored_dtype = _stored_dtype(weights)
        origin = weights.source
    else:
        config = _resized(config or _preset_or_usage_error(str(source)), image_size, patch_size)
        clip = _cast(build_clip(_clip_only(config, str(source))), DTYPES[precision])
        origin = f"random weights of {config.name}"
        log.warning("%s is a preset: its weights are random", source)
    match_key_biases(clip)
    clip = clip.to(device).eval().requires_grad_(False)
    preprocess = PreprocessCfg(size=config.image_size, mean=CLIP_MEAN, std=CLIP_STD)
    return LoadedClip(
        model=clip,
        config=config,
        source=origin,
        preprocess=image_transform_v2(preprocess, is_train=False),
        tokenizer=build_tokenizer(config.context_length),
        device=torch.device(device),
        stored_dtype=stored_dtype,
    )


def _resized(config: ModelConfig, image_size: int | None, patch_size: int | None) -> ModelConfig:
    """Both at once: either alone may not be whole patches."""
    if patch_size is not None and image_size is not None:
        vision = {**config.vision, "patch_size": patch_size, "image_size": image_size}
        return ModelConfig.from_json(config.to_json() | {"vision_cfg": vision})
    return config.with_image_size(image_size).with_patch_size(patch_size)


@dataclass
class UnloadedClip:
    """A CLIP model on disk whose tensors are read one at a time: for conversions of models larger than the memory."""

    tensors: FittedMap  # under our names, resized where asked for
    config: ModelConfig
    source: str
    stored_dtype: torch.dtype


def find_clip(
    source: str | Path,
    model_config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    patch_resize: PatchResize = "bicubic",
) -> UnloadedClip:
    """As `load_clip`, for what is on disk, without loading it. Raises: CheckpointError as `load_clip`."""
    register()
    weights = read_weights(source)
    config = _only_config(weights) if model_config is None else _as_config(model_config)
    config = _clip_only(_resized(config, image_size, patch_size), weights.source)
    with torch.device("meta"):
        clip = build_clip(config)
    with _suggesting_presets(weights, config):
        tensors = fitted_clip_weights(clip, weights.state, where=weights.source, patch_resize=patch_resize)
    return UnloadedClip(tensors, config, weights.source, _stored_dtype(weights))


def _stored_dtype(weights: Weights) -> torch.dtype:
    """The dtype of the matrices: the temperature, and some norms, may be kept in a wider one."""
    matrix = next(name for name in weights.state if len(shape_of(weights.state, name)) > 1)
    return dtype_of(weights.state, matrix)


def read_weights(source: str | Path) -> Weights:
    """The weights of a CLIP or MIM model from anything on disk that `load_clip` reads, by content.

    Raises: CheckpointError where there are none, or where they are damaged.
    """
    path = Path(source).expanduser()
    if not path.exists():
        raise CheckpointError("there is no such file or folder", where=str(path))
    if path.is_file():
        # A checkpoint's moving average has the configuration of the model beside it.
        is_average = path.name == AVERAGE and path.with_name("model_config.json").is_file()
        return _read_checkpoint(path.parent, AVERAGE) if is_average else _read_foreign(path)
    if (path / OPEN_CLIP_CONFIG).is_file():
        return _read_open_clip_folder(path)
    if (path / "model_config.json").is_file():
        is_checkpoint = (path / "train_state.json").is_file() or (path / "MANIFEST.json").is_file()
        return _read_checkpoint(path) if is_checkpoint else _read_described(path)
    checkpoint = checkpoints.latest_checkpoint(path)
    if checkpoint is not None:
        return _read_checkpoint(checkpoint)
    try:
        return _read_foreign(path)
    except CheckpointError as error:
        if error.what != NO_WEIGHTS:
            raise
    raise CheckpointError(
        "this folder holds no model",
        where=str(path),
        expected="a run folder with checkpoints, a checkpoint (ours or DeepSpeed's), an exported open_clip folder, or "
        "a folder as the Hugging Face hub has them",
        fix="if its run was interrupted before the first checkpoint, run it again with --resume",
    )


def _read_checkpoint(path: Path, name: str = "model.safetensors") -> Weights:
    checkpoints.verify(path)
    config = ModelConfig.from_json(_read_json(path / "model_config.json"))
    return Weights(open_weights(path / name), [config], str(path if name == "model.safetensors" else path / name))


def _read_described(path: Path) -> Weights:
    """A weight file with its configuration beside it, as our exports in BAAI's and our own names are."""
    config = ModelConfig.from_json(_read_json(path / "model_config.json"))
    return Weights(open_weights(path), [config], str(path))


def _read_open_clip_folder(path: Path) -> Weights:
    table = _read_json(path / OPEN_CLIP_CONFIG)
    if "evatool" not in table:
        return _read_foreign(path)
    weights = path / OPEN_CLIP_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{OPEN_CLIP_WEIGHTS} is missing", where=str(path), fix="export the model again")
    return Weights(open_weights(weights), [ModelConfig.from_json(table["evatool"]["model"])], str(path))


def _read_foreign(path: Path) -> Weights:
    """Weights that do not say what they are: every preset of their shapes and, where something tells, activation."""
    state = open_weights(path)
    configs = fitting_presets(canonical_state(state, str(path)))
    quick_gelu = _tells_quick_gelu(path, state)
    if quick_gelu is not None and len(configs) > 1:
        configs = [config for config in configs if config.quick_gelu == quick_gelu]
    return Weights(state, configs, str(path))


def _tells_quick_gelu(path: Path, state: Mapping[str, Tensor]) -> bool | None:
    """Whether a CLIP was trained with QuickGELU: its weights do not show it, what lies beside them may."""
    if "input_resolution" in state:  # only OpenAI's own archives hold it
        return True
    folder = path if path.is_dir() else path.parent
    if (folder / OPEN_CLIP_CONFIG).is_file():
        model_cfg = _read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg", {})
        return bool(model_cfg.get("quick_gelu", False))
    if (folder / "config.json").is_file():
        activation = _read_json(folder / "config.json").get("text_config", {}).get("hidden_act")
        return None if activation is None else activation == "quick_gelu"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name} is no JSON object", where=str(path))
    return table


def _only_config(weights: Weights) -> ModelConfig:
    if not weights.configs:
        raise CheckpointError(
            "no preset has the shapes of these weights",
            where=weights.source,
            fix="name the model: model_config = a JSON file with embed_dim, vision_cfg and text_cfg, or a preset",
        )
    if len(weights.configs) > 1:
        raise CheckpointError(
            f"{len(weights.configs)} presets have the shapes of these weights, and nothing beside them tells which",
            where=weights.source,
            fix="name one: model_config = "
            + " or ".join(f"{c.name} ({'QuickGELU' if c.quick_gelu else 'GELU'})" for c in weights.configs),
        )
    return weights.configs[0]


def _build_loaded(
    weights: Weights, config: ModelConfig, patch_resize: PatchResize, dtype: torch.dtype
) -> CustomTextCLIP:
    with torch.device("meta"):
        clip = build_clip(_clip_only(config, weights.source))
    with _suggesting_presets(weights, config):
        report = load_clip_weights(clip, weights.state, where=weights.source, patch_resize=patch_resize, dtype=dtype)
    log.log(logging.INFO if report.resized else logging.DEBUG, "%s: %s", weights.source, report)
    return clip


@contextmanager
def _suggesting_presets(weights: Weights, config: ModelConfig) -> Iterator[None]:
    """A refusal of the weights also says which presets they would fit."""
    try:
        yield
    except CheckpointError as error:
        if weights.configs and config not in weights.configs:
            error.fix = f"these weights fit the preset {' or '.join(c.name for c in weights.configs)}"
        raise


def _clip_only(config: ModelConfig, where: str) -> ModelConfig:
    if config.task != "clip":
        raise CheckpointError(
            f"{config.name} is a MIM model: it has an image tower and no text tower",
            where=where,
            expected="a CLIP model",
            fix="train a CLIP model from it: evatool train-clip with model.init.kind = 'image-tower'",
        )
    return config


def _as_config(given: ModelConfig | Mapping[str, Any] | str | Path) -> ModelConfig:
    if isinstance(given, ModelConfig):
        return given
    if isinstance(given, Mapping):
        return ModelConfig.from_json(given)
    path = Path(given)
    if path.suffix != ".json":
        return resolve_preset(str(given))
    try:
        table = json.loads(path.read_text(encoding="utf-8"))
    except (OSError, ValueError) as error:
        raise RecipeError(f"the model configuration cannot be read: {error}", where=str(path)) from error
    return ModelConfig.from_json(table, name=path.stem)


def _preset_or_usage_error(source: str) -> ModelConfig:
    try:
        return resolve_preset(source)
    except RecipeError as error:
        raise UsageError(
            f"{source!r} is neither a file or folder nor a model preset",
            expected="a run folder, an exported folder, a weight file or a preset name",
            fix=error.fix,
        ) from error


def _cast(clip: CustomTextCLIP, dtype: torch.dtype) -> CustomTextCLIP:
    """Weights in `dtype`, except the temperature; buffers (RoPE tables) stay as they are."""
    if dtype == torch.float32:
        return clip
    for name, parameter in clip.named_parameters():
        if name not in SCALARS:
            parameter.data = parameter.data.to(dtype)
    return clip


def _unit(features: Tensor, normalize: bool) -> Tensor:
    features = features.float()
    return F.normalize(features, dim=-1) if normalize else features
