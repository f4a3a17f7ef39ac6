"""`evatool inspect`: what a source says of its model, and where. Of the weights only the scalars are read."""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from evatool.core.own_folder import expand_user
from evatool.export.model_card import open_clip_words
from evatool.formats.safetensors import dtype_of, shape_of
from evatool.inference.tokenizers import CLIP_BPE, tokenizer_facts
from evatool.model.config import ModelConfig
from evatool.model.presets import resolve_preset
from evatool.weights.load import only_config
from evatool.weights.named import named_source
from evatool.weights.source import SourceWeights, read_weights


@dataclass(frozen=True)
class SourceFact:
    """One thing that is known of a model.

    Attributes:
        where: the file that says it; "shapes" where it was told by the weights, "evatool" for what every model has.
    """

    name: str
    value: Any
    where: str


def inspect_source(source: str, weights: str | None = None) -> list[SourceFact]:
    """What `load_clip(source)` would load, for CLIP and MIM models.

    Args:
        weights: as `load_clip` takes it.
    Raises: CheckpointError, UsageError as `load_clip`.
    """
    named = named_source(source)
    path = expand_user(source) if named is None else named.weights
    if path is None or (named is None and not path.exists()):
        config = resolve_preset(source) if named is None else named.config
        assert config is not None, "a name without weights has a configuration"
        return _of_config(config, {}, "evatool" if named is None else "open_clip")
    found = read_weights(path, weights)
    config = only_config(found) if named is None or named.config is None else named.config
    told = "model_config.json" if not found.said.origins and found.kind != "released" else "shapes"
    facts = [SourceFact("source", found.source, found.kind), *_of_config(config, found.said.origins, told)]
    return [*facts, *_of_weights(found)]


def _of_config(config: ModelConfig, origins: Mapping[str, str], told: str) -> list[SourceFact]:
    said, wanted = origins.get("config", told), config.input
    pixels = origins.get("input", told if told != "shapes" else "evatool")
    activation = "QuickGELU" if config.quick_gelu else "as the architecture has it"
    facts = [
        SourceFact("model", config.name, said),
        SourceFact("task", config.task, said),
        SourceFact("architecture", _architecture(config), said),
        SourceFact("activation", activation, origins.get("quick_gelu", said)),
        SourceFact("image_size", list(config.input_size), said),
        SourceFact("mean", list(wanted.mean), pixels),
        SourceFact("std", list(wanted.std), pixels),
        SourceFact("interpolation", wanted.interpolation, pixels),
        SourceFact("resize", wanted.resize, pixels),
        SourceFact("fill", wanted.fill, pixels),
        SourceFact("exif", "ignore", "evatool"),
    ]
    if config.task == "clip":
        facts += [
            SourceFact("embed_dim", config.embed_dim, said),
            SourceFact("context_length", config.context_length, said),
            SourceFact("tokenizer", tokenizer_facts(config) or CLIP_BPE, said),
        ]
    return facts


def _architecture(config: ModelConfig) -> str:
    if config.open_clip is None:
        kind = "EVA" if config.is_eva else "ViT of OpenAI's CLIP"
        return f"{kind}, {config.depth} blocks of width {config.width}, patches of {config.patch_size}"
    return open_clip_words(config)


def _of_weights(found: SourceWeights) -> list[SourceFact]:
    state, where = found.state, Path(found.source).name
    dtypes = {str(dtype_of(state, name)).removeprefix("torch.") for name in state if len(shape_of(state, name)) > 1}
    facts = [
        SourceFact("num_parameters", sum(math.prod(shape_of(state, name)) for name in state), where),
        SourceFact("precision", ", ".join(sorted(dtypes)), where),
    ]
    scale = next((name for name in ("logit_scale", "text.logit_scale") if name in state), None)
    if scale is not None:
        facts.append(SourceFact("logit_scale", math.exp(float(state[scale].float())), where))
    if "logit_bias" in state:
        facts.append(SourceFact("logit_bias", float(state["logit_bias"].float()), where))
    if found.said.licence is not None:
        facts.append(SourceFact("licence", found.said.licence, found.said.origins.get("config", where)))
    return facts
