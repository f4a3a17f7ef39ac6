"""A trained CLIP model of any origin, ready to encode.

import evatool
clip = evatool.load_clip("runs/demo/distill")
features = clip.encode_image(clip.preprocess(image)[None])
"""

from __future__ import annotations

import logging
from collections.abc import Callable, Mapping
from dataclasses import dataclass, field
from functools import cached_property
from pathlib import Path
from typing import Any, Literal

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from open_clip.transform import PreprocessCfg, image_transform_v2
from torch import Tensor

from evatool.core.errors import RecipeError, UsageError
from evatool.core.image_norm import normalize_images
from evatool.core.own_folder import expand_user
from evatool.data.tokenizer import Tokenizer
from evatool.formats.fingerprint import weights_fingerprint
from evatool.inference.onnx_package import OnnxClip, is_onnx_package, open_onnx_package
from evatool.inference.tokenizers import tokenizer_facts, tokenizer_key, tokenizer_of
from evatool.model.clip import build_clip, visual_tokens
from evatool.model.config import ModelConfig, fingerprint_text
from evatool.model.presets import resolve_config, resolve_preset
from evatool.model.registration import register
from evatool.model.vision import match_key_biases
from evatool.weights.fit import SCALARS
from evatool.weights.load import cast_floats, clip_only, find_clip
from evatool.weights.named import named_source
from evatool.weights.resize import PatchResize

log = logging.getLogger(__name__)

# B batch, S input side in pixels, N patches, L text tokens, E embedding

Precision = Literal["fp32", "bf16", "fp16"]
DTYPES = {"fp32": torch.float32, "bf16": torch.bfloat16, "fp16": torch.float16}


@dataclass(eq=False)
class LoadedClip:
    """A CLIP model in eval mode, without gradients."""

    model: CustomTextCLIP | OnnxClip
    config: ModelConfig
    source: str
    """Where the weights came from; `random weights of <preset>` for a preset."""
    preprocess: Callable[[Any], Tensor]
    """Picture (PIL) -> (3, H, W) float, resized, cropped and normalised as the model's `config.input` says."""
    tokenizer: Tokenizer
    """Captions -> (B, L) int64."""
    device: torch.device = field(default_factory=lambda: torch.device("cpu"))
    stored_dtype: torch.dtype = torch.float32
    """Dtype of the weights where they were read."""

    @property
    def image_size(self) -> int:
        """Input side in pixels. Raises: RecipeError where the input is no square; then see `input_size`."""
        return self.config.image_size

    @property
    def input_size(self) -> tuple[int, int]:
        """Input sides (H, W) in pixels."""
        return self.config.input_size

    @property
    def tokenizer_key(self) -> str:
        """Equal for two models if and only if the same captions give them the same ids."""
        return tokenizer_key(self.config)

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

    @cached_property
    def logit_bias(self) -> float | None:
        """The bias on scaled similarities of a model trained with the sigmoid loss; None for any other."""
        bias = getattr(self.model, "logit_bias", None)
        return None if bias is None else float(bias.float())

    @torch.no_grad()
    def logits(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Scaled similarities (B images, N texts) of features of any length, with a sigmoid model's bias added."""
        cosines = _unit(image_features, True) @ _unit(text_features, True).T
        return self.logit_scale * cosines + (self.logit_bias or 0.0)

    @torch.no_grad()
    def probabilities(self, image_features: Tensor, text_features: Tensor) -> Tensor:
        """Probabilities (B images, N texts) as the model was trained to give them.

        Of a sigmoid model each is that of one pair by itself; of any other those of an image add up to 1 over the
        texts.
        """
        logits = self.logits(image_features, text_features)
        return logits.softmax(dim=-1) if self.logit_bias is None else logits.sigmoid()

    @torch.no_grad()
    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """Image features (B, E) in float32.

        Args:
            image: (B, 3, H, W) uint8, or float that `preprocess` has normalised; any device.
            normalize: to unit length.
        Raises: UsageError for another shape or dtype, or no image.
        """
        return _unit(self.model.encode_image(self._pixels(image), normalize=False), normalize)

    @torch.no_grad()
    def encode_text(self, tokens: Tensor, normalize: bool = False) -> Tensor:
        """Text features (B, E) in float32.

        Args:
            tokens: (B, L) int64, L at most the context length; shorter rows are padded with zeros, which only CLIP's
                own tokenizer does.
            normalize: to unit length.
        Raises: UsageError for longer rows, which may hold the end-of-text token where it is cut off, for ids outside
            the vocabulary, another dtype, or no row.
        """
        vocab_size = getattr(self.model.text, "vocab_size", None)  # of transformers' towers the tokenizer knows it
        check_tokens(tokens, self.context_length, vocab_size, may_be_short=not tokenizer_facts(self.config))
        tokens = F.pad(tokens, (0, self.context_length - tokens.shape[1])).to(self.device)
        return _unit(self.model.encode_text(tokens, normalize=False), normalize)

    @torch.no_grad()
    def visual_tokens(self, image: Tensor) -> Tensor:
        """Projected patch tokens (B, N, E) in float32, class token dropped; `image` as in `encode_image`.

        Raises: UsageError for an ONNX package, whose graphs give features alone.
        """
        if isinstance(self.model, OnnxClip):
            raise UsageError("an ONNX package gives no patch tokens", where=self.source, fix="load the model itself")
        return visual_tokens(self.model, self._pixels(image)).float()

    @cached_property
    def fingerprint(self) -> str:
        """SHA-256 of the configuration and all weights: equal if and only if two models are the same."""
        return weights_fingerprint(fingerprint_text(self.config), sorted(self.model.state_dict().items()))

    def _pixels(self, image: Tensor) -> Tensor:
        check_images(image, self.input_size)
        dtype = next(self.model.visual.parameters()).dtype
        return normalize_images(image.to(self.device), self.config.input.mean, self.config.input.std, dtype)


def load_clip(
    source: str | Path,
    model_config: ModelConfig | Mapping[str, Any] | str | Path | None = None,
    precision: Precision = "fp32",
    device: torch.device | str = "cpu",
    *,
    image_size: int | None = None,
    patch_size: int | None = None,
    patch_resize: PatchResize = "bicubic",
    weights: str | None = None,
) -> LoadedClip:
    """A CLIP model from what `source` names, in eval mode.

    Args:
        source: a run folder (its newest whole checkpoint), a checkpoint folder, an exported open_clip folder, a weight
            file or folder of BAAI, open_clip, OpenAI, DeepSpeed or the Hugging Face hub (docs/models.md), or a preset
            name (random weights, with a warning). `open_clip:NAME/TAG` is a model of open_clip's tables (random weights
            without a tag), `hf-hub:OWNER/NAME` one of the Hugging Face hub, `local-dir:PATH` a folder.
        model_config: the model of a file that does not say it: a preset name, or a configuration in BAAI's vocabulary
            (mapping or JSON file). By default the preset whose shapes the file has.
        precision: arithmetic and storage of the weights; temperature, RoPE and RMSNorm stay float32.
        image_size, patch_size: sides in pixels where they differ from the model's; positions and the patch kernel are
            resized on loading (`patch_resize`: as EVA's scripts do, or FlexiViT's pseudo-inverse).
        weights: which of several models in one source: `raw`, `ema` for the moving average, or the prefix of its names.
            By default the raw weights of a checkpoint of ours, and elsewhere the average, as timm takes it, with a
            warning; two models that are no such pair are an error that names both.

    Raises: CheckpointError if the weights are missing, damaged or of another model; UsageError if `source` is neither
    a path nor a preset.
    """
    if is_onnx_package(expand_user(source)):
        chosen = {"model_config": model_config, "image_size": image_size, "patch_size": patch_size, "weights": weights}
        return _load_package(expand_user(source), chosen | {"precision": None if precision == "fp32" else precision})
    named = named_source(source)
    path = expand_user(source) if named is None else named.weights
    if named is not None and named.config is not None:
        model_config = model_config or named.config
    if path is not None and (named is not None or path.exists()):
        found = find_clip(
            path, model_config, image_size=image_size, patch_size=patch_size, patch_resize=patch_resize, weights=weights
        )
        clip, config = found.load(DTYPES[precision]), found.config
        origin, stored_dtype = found.source, found.stored_dtype
    else:
        given = _preset_or_usage_error(str(source)) if model_config is None else resolve_config(model_config)
        config = clip_only(given.with_sides(image_size, patch_size), str(source))
        clip, stored_dtype = _random_clip(config, DTYPES[precision]), torch.float32
        origin = f"random weights of {config.name}"
        log.warning("%s is a name without weights: they are random", source)
    match_key_biases(clip)
    clip = clip.to(device).eval().requires_grad_(False)
    return LoadedClip(
        model=clip,
        config=config,
        source=origin,
        preprocess=preprocess_of(config),
        tokenizer=tokenizer_of(config),
        device=torch.device(device),
        stored_dtype=stored_dtype,
    )


def _load_package(folder: Path, chosen: Mapping[str, Any]) -> LoadedClip:
    """An exported ONNX package, on the CPU. Raises: UsageError for what was chosen and its graphs do not leave open."""
    without_effect = [name for name, value in chosen.items() if value is not None]
    if without_effect:
        raise UsageError(
            f"{', '.join(without_effect)} cannot be chosen for an ONNX package: its graphs are as they were exported",
            where=str(folder),
            fix="leave them out, or export the model again with what you need",
        )
    clip, config = open_onnx_package(folder)
    return LoadedClip(
        model=clip.eval(),
        config=config,
        source=str(folder),
        preprocess=preprocess_of(config),
        tokenizer=tokenizer_of(config),
    )


def preprocess_of(config: ModelConfig) -> Callable[[Any], Tensor]:
    """Picture (PIL) -> (3, H, W) float, by open_clip's own transform."""
    wanted = config.input
    rows, columns = config.input_size
    described = PreprocessCfg(
        size=rows if rows == columns else (rows, columns),
        mean=wanted.mean,
        std=wanted.std,
        interpolation=wanted.interpolation,
        resize_mode=wanted.resize,
        fill_color=wanted.fill,
    )
    transform: Callable[[Any], Tensor] = image_transform_v2(described, is_train=False)
    return transform


def _preset_or_usage_error(source: str) -> ModelConfig:
    try:
        return resolve_preset(source)
    except RecipeError as error:
        raise UsageError(
            f"{source!r} is neither a file or folder nor a model preset",
            expected="a run folder, an exported folder, a weight file or a preset name",
            fix=error.fix,
        ) from error


def _random_clip(config: ModelConfig, dtype: torch.dtype) -> CustomTextCLIP:
    """A model with the first weights of a training, in `dtype`; the temperature and buffers (RoPE) stay float32."""
    register()
    clip = build_clip(config)
    if config.open_clip is not None:
        cast_floats(clip, dtype)
    elif dtype != torch.float32:
        for name, parameter in clip.named_parameters():
            if name not in SCALARS:
                parameter.data = parameter.data.to(dtype)
    return clip


def check_images(image: Tensor, sides: tuple[int, int]) -> None:
    """Raises: UsageError unless `image` is (B, 3, H, W), uint8 or floating point, with at least one image."""
    wanted = f"(B, 3, {sides[0]}, {sides[1]}), uint8 in 0..255, or floating point as clip.preprocess gives it"
    is_known = image.dtype == torch.uint8 or image.is_floating_point()
    if image.ndim != 4 or tuple(image.shape[1:]) != (3, *sides) or not is_known:
        raise UsageError(
            f"images of shape {tuple(image.shape)} and dtype {_dtype_name(image)} are no input of this model",
            where="encode_image",
            expected=wanted,
            fix="use clip.preprocess(picture)[None], or resize and convert them first",
        )
    if len(image) == 0:
        raise UsageError(
            "the batch holds no image", where="encode_image", expected=wanted, fix="leave out empty batches"
        )


def check_tokens(
    tokens: Tensor, context_length: int, vocab_size: int | None = None, *, may_be_short: bool = True
) -> None:
    """Raises: UsageError unless `tokens` is (B, L) of whole numbers below `vocab_size`, B > 0, L <= context.

    Args:
        may_be_short: rows may be shorter than the context; else L is the context length.
    """
    ids = "" if vocab_size is None else f" and ids from 0 to {vocab_size - 1}"
    wanted = f"(B, L) int64 with L {'from 1 to' if may_be_short else '='} {context_length}{ids}"
    problem, fix = None, "use clip.tokenizer, which cuts longer captions and keeps the end-of-text token"
    if tokens.ndim != 2 or tokens.dtype not in (torch.int64, torch.int32):
        problem = f"tokens of shape {tuple(tokens.shape)} and dtype {_dtype_name(tokens)} are no input of this model"
    elif tokens.numel() == 0:
        problem, fix = "the batch holds no token", "leave out empty batches"
    elif tokens.shape[1] > context_length:
        problem = f"token rows of {tokens.shape[1]} are longer than the context of {context_length}"
    elif tokens.shape[1] < context_length and not may_be_short:
        problem = f"token rows of {tokens.shape[1]} are shorter than the context of {context_length}"
        fix = "use clip.tokenizer, which pads them with a token of its own"
    elif int(tokens.min()) < 0 or (vocab_size is not None and int(tokens.max()) >= vocab_size):
        problem = f"token ids from {int(tokens.min())} to {int(tokens.max())} are not all in the vocabulary"
    if problem is not None:
        raise UsageError(problem, where="encode_text", expected=wanted, fix=fix)


def _dtype_name(tensor: Tensor) -> str:
    return str(tensor.dtype).removeprefix("torch.")


def _unit(features: Tensor, normalize: bool) -> Tensor:
    features = features.float()
    return F.normalize(features, dim=-1) if normalize else features
