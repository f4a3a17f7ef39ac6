"""Models as evaluation needs them: whatever `load_clip` reads, stock open_clip names, whole or divided over ranks."""

from __future__ import annotations

import json
import logging
from collections.abc import Callable
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

from evatool.core.errors import UsageError
from evatool.core.own_folder import expand_user
from evatool.data.image.eval_transforms import EvalTransform
from evatool.distributed.engines.shard_weights import call_with_full_weights, shard_weights, whole_state
from evatool.distributed.world import World
from evatool.eval.cache import FingerprintCache
from evatool.eval.results import ModelRecord
from evatool.formats.fingerprint import weights_fingerprint
from evatool.inference.loaded_clip import DTYPES, LoadedClip, load_clip
from evatool.inference.onnx_package import OnnxClip, is_onnx_package
from evatool.inference.tokenizers import tokenizer_of
from evatool.model.clip import build_clip
from evatool.model.config import fingerprint_text
from evatool.model.text import encode_cut_tokens, is_trimmable
from evatool.model.vision import match_key_biases, restore_buffers
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.training_recipes import recipe_of
from evatool.weights.load import UnloadedClip, find_clip

log = logging.getLogger(__name__)

_SHARE_OF_GPU = 0.8  # weights beyond this share of a GPU's memory leave no room for activations


@dataclass
class EvalModel:
    """A model in eval mode with all that an evaluation asks of it.

    Attributes:
        device: as a string, "cpu" or "cuda:0".
        trims_text: texts may be cut after their end.
        lockstep: the weights are divided over the ranks, so every rank must run every batch.
        tokenizer_key: changes with what the tokenizer gives.
        origin: what features depend on besides the image or text: weights, arithmetic.
        transform: an encoded picture to the model's input, uint8.
        patch_tokens: (B, 3, S, S) -> projected patch tokens (B, N, E), or None where the tower has none.
    """

    record: ModelRecord
    device: str
    tokenizer: Callable[[list[str]], Tensor]
    tokenizer_key: str
    trims_text: bool
    lockstep: bool
    origin: str
    transform: EvalTransform
    encode_image: Callable[[Tensor], Tensor]
    encode_text: Callable[[Tensor], Tensor]
    patch_tokens: Callable[[Tensor], Tensor] | None

    @property
    def transform_facts(self) -> list[str]:
        """What of the transform is not that of every EVA model; empty for those."""
        made = self.transform
        is_usual = (made.interpolation, made.fill) == ("bicubic", 0)
        return [] if is_usual else [made.interpolation, str(made.fill)]


def load_eval_model(name: str, source: str, section: EvalSection, world: World, cache: Path | None) -> EvalModel:
    """The model that `source` names, on this rank's device.

    Args:
        name: in the report.
        cache: folder of remembered fingerprints; None to compute them anew.
    Raises: EvatoolError as `load_clip`; UsageError for an unknown open_clip name.
    """
    with torch.random.fork_rng(devices=[]):
        torch.manual_seed(section.seed)  # a preset's random weights are the same ones every time and on every rank
        clip, lockstep = _load(name, source, section, world)
    fingerprint = _fingerprint(clip, section.precision, cache, section.model_weights.get(name))
    record = ModelRecord(
        name=name,
        source=source,
        fingerprint=fingerprint,
        image_size=max(clip.input_size),
        num_parameters=sum(p.numel() for p in clip.model.parameters()),
        preset=clip.config.name,
        weights=clip.source,
        precision=section.precision,
        **recipe_of(clip.source),
    )
    return EvalModel(
        record=record,
        device=str(clip.device),
        tokenizer=clip.tokenizer,
        tokenizer_key=clip.tokenizer_key,
        trims_text=is_trimmable(clip.model.text),
        lockstep=lockstep,
        origin=json.dumps([fingerprint, section.precision]),
        transform=EvalTransform.of(clip.config.input, clip.input_size, resize=section.resize, decode=section.decode),
        encode_image=clip.encode_image,
        encode_text=lambda tokens: _encode_text(clip, tokens),
        patch_tokens=_patch_tokens(clip, lockstep),
    )


def _load(name: str, source: str, section: EvalSection, world: World) -> tuple[LoadedClip, bool]:
    """The model, and whether its weights are divided over the ranks."""
    model_config, weights = section.model_configs.get(name), section.model_weights.get(name)
    on_disk = expand_user(source).exists() and not is_onnx_package(expand_user(source))
    if world.world_size > 1 and on_disk and section.shard_model != "never":
        unloaded = find_clip(source, model_config, weights=weights)
        if unloaded.config.open_clip is not None:
            return load_clip(source, model_config, section.precision, world.device, weights=weights), False
        shapes = (unloaded.tensors.shape(key) for key in unloaded.tensors)
        size = sum(torch.Size(shape).numel() for shape in shapes) * DTYPES[section.precision].itemsize
        if section.shard_model == "always" or not _fits(size, world.device):
            return _sharded(unloaded, section, world), True
    elif section.shard_model == "always":
        raise UsageError(
            'eval.shard_model = "always" divides weights on disk over several ranks',
            where=f"eval.models: {source}, {world.world_size} rank(s)",
            fix="start several ranks (eval.processes, or torchrun), or leave eval.shard_model out",
        )
    return load_clip(source, model_config, section.precision, world.device, weights=weights), False


def _fits(size: int, device: torch.device) -> bool:
    if device.type != "cuda":
        return True
    return size <= _SHARE_OF_GPU * torch.cuda.get_device_properties(device).total_memory


def _sharded(unloaded: UnloadedClip, section: EvalSection, world: World) -> LoadedClip:
    """Each rank holds its part of every weight; one tensor of the file is whole in memory at a time."""
    with torch.device("meta"):
        clip = build_clip(unloaded.config)
    restore_buffers(clip)
    shard_weights(clip, (clip.visual, clip.text), unloaded.tensors, world, DTYPES[section.precision])
    match_key_biases(clip)
    log.info("%s: weights divided over %d ranks", unloaded.source, world.world_size)
    config = unloaded.config
    return LoadedClip(
        model=clip.eval().requires_grad_(False),
        config=config,
        source=unloaded.source,
        preprocess=_no_preprocess,
        tokenizer=tokenizer_of(config),
        device=world.device,
        stored_dtype=unloaded.stored_dtype,
    )


def _no_preprocess(image: Any) -> Tensor:
    raise RuntimeError("a model that is divided over ranks is given decoded pictures")


def _fingerprint(clip: LoadedClip, precision: str, cache: Path | None, weights: str | None = None) -> str:
    """`LoadedClip.fingerprint`, remembered by path, size and time of the files it was read from."""
    about = (fingerprint_text(clip.config), precision, *(() if weights is None else (weights,)))
    files = _files(clip.source)
    remembered = FingerprintCache(cache) if cache is not None and files else None
    found = remembered.get(files, *about) if remembered else None
    if found is None:
        found = _digest(clip)
        if remembered and (not torch.distributed.is_initialized() or torch.distributed.get_rank() == 0):
            remembered.put(found, files, *about)
    return found


def _digest(clip: LoadedClip) -> str:
    """The value of `LoadedClip.fingerprint`, also of divided weights; every rank must call it then."""
    return weights_fingerprint(fingerprint_text(clip.config), whole_state(clip.model))


def _encode_text(clip: LoadedClip, tokens: Tensor) -> Tensor:
    """Text features of tokens (B, L) of any L up to the context, through the tower's own call: divided weights come
    together there."""
    tower = clip.model.text
    if is_trimmable(tower):
        return encode_cut_tokens(tower, tokens.to(clip.device))
    return clip.encode_text(tokens)


def _patch_tokens(clip: LoadedClip, lockstep: bool) -> Callable[[Tensor], Tensor] | None:
    if clip.config.open_clip is not None or isinstance(clip.model, OnnxClip):
        return None
    return call_with_full_weights(clip.model.visual, clip.visual_tokens) if lockstep else clip.visual_tokens


def _files(source: str) -> list[Path]:
    """Files of weights at a path; none for random weights."""
    path = Path(source)
    if path.is_file():
        return [path]
    suffixes = (".onnx", ".onnx.data", ".safetensors", ".bin", ".pt", ".pth", ".ckpt", ".index.json")
    found = path.rglob("*") if path.is_dir() else ()
    return sorted(p for p in found if p.is_file() and p.name.endswith(suffixes))
