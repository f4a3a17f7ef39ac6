"""From a loaded model to the files of each format: which tensors, under which names, with which configuration."""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

import torch
from torch import Tensor

import evatool
from evatool.core.errors import RecipeError
from evatool.core.image_norm import CLIP_MEAN, CLIP_STD
from evatool.export.baai import baai_config, baai_state
from evatool.export.folder import Exported, Target
from evatool.export.graph import export_onnx, export_torch
from evatool.export.model_card import CardFacts
from evatool.export.open_clip import OpenClipDescription, export_open_clip
from evatool.export.tensors import export_baai, export_safetensors
from evatool.export.timm import export_timm
from evatool.formats.safetensors import TensorMap, shape_of
from evatool.inference.loaded_clip import LoadedClip, load_clip
from evatool.model.clip import TOWER, open_clip_model_config
from evatool.model.config import ModelConfig
from evatool.model.vision import STOCK_NAMES, has_head_bias, timm_config
from evatool.recipe.schema.export import ExportSection
from evatool.weights.fit import SCALARS


class CastMap(TensorMap):
    """A model's tensors in the dtype they are written in, each cast when it is asked for.

    The temperature keeps its value: it stays float32 where `dtype` cannot hold it. It is a scalar here, as published
    files have it; in training it is (1,), so that every engine can shard it.
    """

    def __init__(self, tensors: Mapping[str, Tensor], dtype: torch.dtype) -> None:
        self._tensors, self._dtype = tensors, dtype

    def __getitem__(self, name: str) -> Tensor:
        tensor = self._tensors[name].detach()
        return tensor.to(self.dtype(name)).reshape(self.shape(name))

    def __iter__(self) -> Iterator[str]:
        return iter(self._tensors)

    def __len__(self) -> int:
        return len(self._tensors)

    def shape(self, name: str) -> tuple[int, ...]:
        """Shape as written."""
        shape = shape_of(self._tensors, name)
        return () if name in SCALARS else shape

    def dtype(self, name: str) -> torch.dtype:
        """Dtype as written."""
        if name not in SCALARS:
            return self._dtype
        tensor = self._tensors[name]
        if not torch.equal(tensor.to(self._dtype).to(tensor.dtype), tensor):
            return tensor.dtype
        return self._dtype


def export_model(clip: LoadedClip, section: ExportSection, facts: CardFacts, target: Target) -> Exported:
    """Write and verify `clip` in the section's format. Raises: as the format's writer."""
    tower, config = section.tower, clip.config
    towers = [tower] if tower else ["image", "text"]
    tensors = written_tensors(clip, tower)
    match section.format:
        case "open_clip":
            return export_open_clip(clip, open_clip_description(config), tensors, facts, target)
        case "baai":
            return export_baai(clip, baai_state(tensors, config), baai_config(config), facts, target)
        case "timm":
            return _export_timm(clip, facts, target)
        case "safetensors":
            reopen = None if tower else load_written
            return export_safetensors(clip, tensors, config.to_json(), facts, target, reopen=reopen)
        case "onnx":
            return export_onnx(clip, towers, config.to_json(), facts, target, opset=section.opset)
        case "torch-export":
            return export_torch(clip, towers, config.to_json(), facts, target)
        case "deepspeed":
            raise AssertionError("a training checkpoint, not a model: export_deepspeed writes it")


def load_written(folder: Path) -> LoadedClip:
    """The model in a folder of the `safetensors` format."""
    return load_clip(folder)


def written_tensors(clip: LoadedClip, tower: str | None = None) -> CastMap:
    """The tensors to write under our names, in the dtype that `round_weights` gave them; one tower or all."""
    prefix = {"image": "visual.", "text": "text.", None: ""}[tower]
    state = {name: tensor for name, tensor in clip.model.state_dict().items() if name.startswith(prefix)}
    return CastMap(state, clip.stored_dtype)


def round_weights(clip: LoadedClip, dtype: torch.dtype) -> None:
    """Round the float32 model to what `dtype` can hold, so that it is what a reader of the export will have."""
    for name, parameter in clip.model.named_parameters():
        if name not in SCALARS:
            parameter.data.copy_(parameter.data.to(dtype))
    clip.stored_dtype = dtype


def open_clip_description(model: ModelConfig) -> OpenClipDescription:
    """How open_clip is told to build `model`."""
    model_cfg = open_clip_model_config(model)
    name = model_cfg["vision_cfg"].get("timm_model_name")  # None: open_clip's own ViT
    is_stock = name is None or name in STOCK_NAMES
    config = None if is_stock else timm_config(model)
    return OpenClipDescription(
        model_cfg=model_cfg,
        timm_config=config if config is not None and config["model_args"] else None,
        needs_evatool=config is not None and _needs_evatool(config),
        preprocess_cfg={"mean": CLIP_MEAN, "std": CLIP_STD, "interpolation": "bicubic", "resize_mode": "shortest"},
        evatool={"version": evatool.__version__, "model": model.to_json()},
    )


def _needs_evatool(timm_config: Mapping[str, Any]) -> bool:
    return timm_config["architecture"] not in STOCK_NAMES


def _export_timm(clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
    if not clip.config.is_eva:
        raise RecipeError(
            f"{clip.config.name} has OpenAI's image tower, which open_clip builds without timm",
            where="export.format",
            fix="export it as open_clip",
        )
    outputs = clip.embed_dim if has_head_bias(clip.config) else 0
    config = timm_config(clip.config, outputs)
    tower = {name: t for name, t in clip.model.state_dict().items() if name.startswith(TOWER)}
    tensors = CastMap({name.removeprefix(TOWER): t for name, t in tower.items()}, clip.stored_dtype)
    return export_timm(clip, config, tensors, facts, target, needs_evatool=_needs_evatool(config))
