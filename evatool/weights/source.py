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
from dataclasses import dataclass
from pathlib import Path
from typing import Any, Literal

from torch import Tensor

from evatool.checkpoint.layout import AVERAGE, EXTRA, MANIFEST, MODEL, MODEL_CONFIG, TRAIN_STATE
from evatool.checkpoint.load import latest_checkpoint, verify
from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError
from evatool.core.own_folder import expand_user
from evatool.model.config import ModelConfig
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


def read_weights(source: str | Path, weights: str | None = None) -> SourceWeights:
    """The weights of a CLIP or MIM model from anything on disk that `load_clip` reads; no tensor is read yet.

    Args:
        weights: which of several models in a file, as in `unwrapped`; of a checkpoint of ours, `raw` or `ema`.
    Raises: CheckpointError where there are none, or where they are damaged.
    """
    kind, path = locate_weights(expand_user(source))
    match kind:
        case "checkpoint":
            return _read_checkpoint(path, _checkpoint_file(path, weights), str(path))
        case "average":
            return _read_checkpoint(path.parent, AVERAGE, str(path))
        case "described":
            config = ModelConfig.from_json(_read_json(path / MODEL_CONFIG))
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
        return ("open_clip" if "evatool" in _read_json(path / OPEN_CLIP_CONFIG) else "released"), path
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
    config = ModelConfig.from_json(_read_json(folder / MODEL_CONFIG))
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
    record = _read_json(folder / OPEN_CLIP_CONFIG)["evatool"]
    if not isinstance(record, dict) or not isinstance(record.get("model"), dict):
        raise CheckpointError(
            f"our record in {OPEN_CLIP_CONFIG} is damaged", where=str(folder), fix="export the model again"
        )
    config = ModelConfig.from_json(record["model"])
    return SourceWeights(open_weights(weights), [config], str(folder))


def _read_released(path: Path, weights: str | None = None) -> SourceWeights:
    """Weights that do not say what they are: every preset of their shapes and, where something tells, activation."""
    state = open_weights(path, weights)
    configs = fitting_presets(canonical_state(state, str(path)))
    quick_gelu = tells_quick_gelu(path, state)
    if quick_gelu is not None and len(configs) > 1:
        configs = [config for config in configs if config.quick_gelu == quick_gelu]
    return SourceWeights(state, configs, str(path))


def tells_quick_gelu(path: Path, state: Mapping[str, Tensor]) -> bool | None:
    """True where a CLIP was trained with QuickGELU: its weights do not show it, but what lies beside them may.

    Returns: None where nothing tells.
    """
    if "input_resolution" in state:  # only OpenAI's own archives hold it
        return True
    folder = path if path.is_dir() else path.parent
    if (folder / OPEN_CLIP_CONFIG).is_file():
        model_cfg = _read_json(folder / OPEN_CLIP_CONFIG).get("model_cfg")
        return isinstance(model_cfg, dict) and bool(model_cfg.get("quick_gelu", False))
    if (folder / "config.json").is_file():
        text_config = _read_json(folder / "config.json").get("text_config")
        activation = text_config.get("hidden_act") if isinstance(text_config, dict) else None
        return None if activation is None else activation == "quick_gelu"
    return None


def _read_json(path: Path) -> dict[str, Any]:
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name} is no JSON object", where=str(path))
    return table
