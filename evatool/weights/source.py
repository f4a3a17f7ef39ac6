"""The weights at a path and what is known of their model, whatever library wrote them: a `SourceWeights`.

kind         what is there                                              what says which model it is
checkpoint   a checkpoint of ours; a run folder means its newest whole  model_config.json
average      the moving average in a checkpoint, named by its file      model_config.json beside it
described    weights with our configuration beside them (our exports)   model_config.json
open_clip    an open_clip folder that we exported                       our record in open_clip_config.json
released     a weight file, a folder of the Hugging Face hub (open_clip,  shapes; the activation by what lies
             transformers, BAAI), a DeepSpeed checkpoint                beside the weights
"""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Literal

from torch import Tensor

from evatool.checkpoint.layout import AVERAGE, EXTRA, MANIFEST, MODEL, MODEL_CONFIG, TRAIN_STATE
from evatool.checkpoint.load import latest_checkpoint, verify
from evatool.core.errors import CheckpointError
from evatool.core.own_folder import expand_user
from evatool.model.clip import open_clip_model_config
from evatool.model.config import TEXT_DEFAULTS, ModelConfig
from evatool.weights.description import ModelDescription, describe_model, open_clip_input, read_object
from evatool.weights.detect_preset import fitting_presets
from evatool.weights.key_mapping import canonical_state
from evatool.weights.mapped_tensors import MergedMap
from evatool.weights.open import open_weights, weights_in

OPEN_CLIP_WEIGHTS, OPEN_CLIP_CONFIG = "open_clip_model.safetensors", "open_clip_config.json"
"""The files that open_clip's `local-dir:` reads."""

SourceKind = Literal["checkpoint", "average", "described", "open_clip", "released"]


@dataclass
class SourceWeights:
    """Weights as they were found, and what is known about their model."""

    state: Mapping[str, Tensor]
    """Lazy, under the names of the file."""
    configs: list[ModelConfig]
    """The configuration that the source states, else every preset of its shapes: none, one or more."""
    source: str
    """The file or folder that was read."""
    kind: SourceKind = "released"
    """What was found there."""
    said: ModelDescription = field(default_factory=ModelDescription)
    """What lies beside the weights says, where another library wrote them."""


def read_weights(source: str | Path, weights: str | None = None) -> SourceWeights:
    """The weights of a CLIP or MIM model from anything on disk that `load_clip` reads; no tensor is read yet.

    Args:
        weights: which of several models in a file, as in `unwrapped`; of a checkpoint of ours, `raw` or `ema`.
    Raises: CheckpointError where there are none, or where they are damaged.
    """
    kind, path = locate_weights(expand_user(source))
    return replace(_read(kind, path, weights), kind=kind)


def _read(kind: SourceKind, path: Path, weights: str | None) -> SourceWeights:
    match kind:
        case "checkpoint":
            return _read_checkpoint(path, _checkpoint_file(path, weights), str(path))
        case "average":
            return _read_checkpoint(path.parent, AVERAGE, str(path))
        case "described":
            config = ModelConfig.from_json(read_object(path / MODEL_CONFIG))
            return SourceWeights(open_weights(path, weights), [config], str(path))
        case "open_clip":
            return _read_open_clip(path)
        case "released":
            return _read_released(path, weights)


def locate_weights(path: Path) -> tuple[SourceKind, Path]:
    """The kind of source at `path`, and the file or folder to read there: of a run folder its newest whole checkpoint.

    Raises: CheckpointError where nothing is there that holds a model.
    """
    if not path.exists():
        raise CheckpointError("there is no such file or folder", where=str(path))
    if path.is_file():
        is_average = path.name == AVERAGE and path.with_name(MODEL_CONFIG).is_file()
        return ("average" if is_average else "released"), path
    if (path / OPEN_CLIP_CONFIG).is_file():
        return ("open_clip" if "evatool" in read_object(path / OPEN_CLIP_CONFIG) else "released"), path
    if (path / MODEL_CONFIG).is_file():
        is_checkpoint = (path / TRAIN_STATE).is_file() or (path / MANIFEST).is_file()
        return ("checkpoint" if is_checkpoint else "described"), path
    newest = latest_checkpoint(path)
    if newest is not None:
        return "checkpoint", newest
    if weights_in(path) is not None:
        return "released", path
    raise CheckpointError(
        "this folder holds no model",
        where=str(path),
        expected="a run folder with checkpoints, a checkpoint (ours or DeepSpeed's), an exported open_clip folder, or "
        "a folder as the Hugging Face hub has them",
        fix="if its run was interrupted before the first checkpoint, run it again with --resume",
    )


def _read_checkpoint(folder: Path, file: str, source: str) -> SourceWeights:
    verify(folder)
    config = ModelConfig.from_json(read_object(folder / MODEL_CONFIG))
    state = open_weights(folder / file)
    # The bias of a model trained with the sigmoid loss lies among what the objective keeps.
    extra = open_weights(folder / EXTRA) if config.task == "clip" and (folder / EXTRA).is_file() else {}
    bias = {name: extra for name in extra if name == "logit_bias"}
    if bias:
        state = MergedMap(dict.fromkeys(state, state) | bias)
    return SourceWeights(state, [config], source)


def _checkpoint_file(folder: Path, weights: str | None) -> str:
    """The file of a checkpoint of ours that `weights` names: the raw weights when None."""
    if weights not in (None, "raw", "ema"):
        raise CheckpointError(
            f"weights = {weights!r}", where=str(folder), expected="'raw' or 'ema'", fix="a checkpoint has no other"
        )
    if weights != "ema":
        return MODEL
    if not (folder / AVERAGE).is_file():
        raise CheckpointError(
            "weights = 'ema', but the run of this checkpoint kept no average",
            where=str(folder),
            fix="leave weights out, or train with train.ema",
        )
    return AVERAGE


def _read_open_clip(folder: Path) -> SourceWeights:
    weights = folder / OPEN_CLIP_WEIGHTS
    if not weights.is_file():
        raise CheckpointError(f"{OPEN_CLIP_WEIGHTS} is missing", where=str(folder), fix="export the model again")
    table = read_object(folder / OPEN_CLIP_CONFIG)
    record = table["evatool"]
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise CheckpointError(
            f"our record in {OPEN_CLIP_CONFIG} is damaged", where=str(folder), fix="export the model again"
        )
    config = ModelConfig.from_json(record["model"])
    preprocess = table.get("preprocess_cfg")
    if preprocess is not None:
        said, _ = open_clip_input(preprocess, folder / OPEN_CLIP_CONFIG)
        if said != config.input:
            raise CheckpointError(
                f"preprocess_cfg and our record in {OPEN_CLIP_CONFIG} describe different images: "
                f"{said.differences or 'the defaults'} and {config.input.differences or 'the defaults'}",
                where=str(folder),
                expected="the same in both",
                fix="export the model again, or correct evatool.model.input in the file",
            )
    return SourceWeights(open_weights(weights), [config], str(folder))


def _read_released(path: Path, weights: str | None = None) -> SourceWeights:
    """Weights of another library: what is said beside them, and where nothing is said every preset of their shapes."""
    state = open_weights(path, weights)
    said = describe_model(path)
    if "input_resolution" in state:  # only OpenAI's own archives hold it, and all of them have QuickGELU
        said = replace(said, quick_gelu=True, origins={**said.origins, "quick_gelu": "the file"})
    presets = _presets_of(state, str(path), is_described=said.config is not None)
    told = [config for config in presets if config.quick_gelu == said.quick_gelu]
    if said.config is not None and not (told and told[0].is_eva and _is_described_by(told[0], said.config)):
        return SourceWeights(state, [said.applied_to(said.config, str(path))], str(path), said=said)
    # Presets of one shape differ in the activation alone.
    presets = told or (presets if said.quick_gelu is None else presets[:1])
    return SourceWeights(state, [said.applied_to(config, str(path)) for config in presets], str(path), said=said)


def _presets_of(state: Mapping[str, Tensor], where: str, *, is_described: bool) -> list[ModelConfig]:
    """The presets of these shapes; none where the towers are of another kind and a description says which."""
    try:
        return fitting_presets(canonical_state(state, where))
    except CheckpointError:
        if is_described:
            return []
        raise


def _is_described_by(preset: ModelConfig, described: ModelConfig) -> bool:
    """True where open_clip's description is of this EVA preset: the same timm tower, which is known better by us."""
    if described.open_clip is None:
        return False
    theirs, ours = described.open_clip, open_clip_model_config(preset)
    names = [str(cfg["vision_cfg"].get("timm_model_name", "")).partition(".")[0] for cfg in (theirs, ours)]
    is_same_text = all(theirs["text_cfg"].get(key, value) == value for key, value in ours["text_cfg"].items())
    is_plain_text = set(theirs["text_cfg"]) <= set(TEXT_DEFAULTS)
    return names[0] == names[1] and is_same_text and is_plain_text and preset.input_size == described.input_size
