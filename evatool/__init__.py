"""evatool: the EVA training pipeline, from image-text data to a released model.

The names listed here are the public face; docs/api.md says what each is and what may change. `import evatool` is free
of torch: a name is imported on first use.

    import evatool
    clip = evatool.load_clip("runs/demo/distill")
    features = clip.encode_image(clip.preprocess(image)[None])
"""

from __future__ import annotations

import sys

# `python -m evatool` puts the working folder first on the path, where a `typing.py` or `json.py` may lie that nobody
# means to run. While Python looks for the module, `sys.argv[0]` is "-m"; what stands before the arguments names it.
# In every other process the path is its owner's.
if sys.argv[:1] == ["-m"] and not getattr(sys.flags, "safe_path", False):
    _module = sys.orig_argv[len(sys.orig_argv) - len(sys.argv)]
    if (_module.partition("m")[2] if _module[:1] == "-" else _module).partition(".")[0] == "evatool":
        del sys.path[0]

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:  # what type checkers and editors see; `_HOMES` below is the same list
    from evatool.core.batch import Batch
    from evatool.core.errors import EvatoolError
    from evatool.core.step import StepContext
    from evatool.data.eval.eval_set import open_eval_set
    from evatool.data.image.eval_transforms import EvalTransform
    from evatool.data.sources.base import SequentialSource, Source
    from evatool.data.tokenizer import build_tokenizer
    from evatool.data.train.loader import build_train_loader
    from evatool.data.train.masking import MaskSpec
    from evatool.distributed.engines.base import Engine
    from evatool.distributed.engines.build import build_engine
    from evatool.distributed.world import init_world
    from evatool.eval.evaluate import evaluate
    from evatool.eval.tasks.base import EvalTask
    from evatool.export.base import Exporter
    from evatool.inference.loaded_clip import LoadedClip, load_clip
    from evatool.model.clip import build_clip
    from evatool.model.config import ModelConfig
    from evatool.model.mim import build_mim
    from evatool.model.presets import PRESETS, resolve_preset
    from evatool.model.registration import register
    from evatool.model.vision import eva_arguments
    from evatool.objective.base import Objective, SumObjective
    from evatool.objective.clip import ClipObjective
    from evatool.objective.mim import MimObjective
    from evatool.objective.terms.base import LossTerm
    from evatool.objective.terms.contrastive import InfoNceTerm
    from evatool.optim.build import build_optimizer
    from evatool.optim.param_groups import build_param_groups
    from evatool.optim.schedules import build_schedule
    from evatool.train.control import TrainerConfig
    from evatool.train.hooks.base import Hook
    from evatool.train.trainer import Trainer
    from evatool.weights.key_mapping import canonical_state
    from evatool.weights.load import load_clip_weights, load_mim_weights
    from evatool.weights.open import open_weights

__version__ = "0.1.0"
__all__ = [
    "PRESETS",
    "Batch",
    "ClipObjective",
    "Engine",
    "EvalTask",
    "EvalTransform",
    "EvatoolError",
    "Exporter",
    "Hook",
    "InfoNceTerm",
    "LoadedClip",
    "LossTerm",
    "MaskSpec",
    "MimObjective",
    "ModelConfig",
    "Objective",
    "SequentialSource",
    "Source",
    "StepContext",
    "SumObjective",
    "Trainer",
    "TrainerConfig",
    "__version__",
    "build_clip",
    "build_engine",
    "build_mim",
    "build_optimizer",
    "build_param_groups",
    "build_schedule",
    "build_tokenizer",
    "build_train_loader",
    "canonical_state",
    "eva_arguments",
    "evaluate",
    "init_world",
    "load_clip",
    "load_clip_weights",
    "load_mim_weights",
    "open_eval_set",
    "open_weights",
    "register",
    "resolve_preset",
]

# The module below `evatool` that each public name lives in.
_HOMES = {
    "core.batch": "Batch",
    "core.errors": "EvatoolError",
    "core.step": "StepContext",
    "data.eval.eval_set": "open_eval_set",
    "data.image.eval_transforms": "EvalTransform",
    "data.sources.base": "SequentialSource Source",
    "data.tokenizer": "build_tokenizer",
    "data.train.loader": "build_train_loader",
    "data.train.masking": "MaskSpec",
    "distributed.engines.base": "Engine",
    "distributed.engines.build": "build_engine",
    "distributed.world": "init_world",
    "eval.evaluate": "evaluate",
    "eval.tasks.base": "EvalTask",
    "export.base": "Exporter",
    "inference.loaded_clip": "LoadedClip load_clip",
    "model.clip": "build_clip",
    "model.config": "ModelConfig",
    "model.mim": "build_mim",
    "model.presets": "PRESETS resolve_preset",
    "model.registration": "register",
    "model.vision": "eva_arguments",
    "objective.base": "Objective SumObjective",
    "objective.clip": "ClipObjective",
    "objective.mim": "MimObjective",
    "objective.terms.base": "LossTerm",
    "objective.terms.contrastive": "InfoNceTerm",
    "optim.build": "build_optimizer",
    "optim.param_groups": "build_param_groups",
    "optim.schedules": "build_schedule",
    "train.control": "TrainerConfig",
    "train.hooks.base": "Hook",
    "train.trainer": "Trainer",
    "weights.key_mapping": "canonical_state",
    "weights.load": "load_clip_weights load_mim_weights",
    "weights.open": "open_weights",
}


def __getattr__(name: str) -> Any:
    from importlib import import_module

    for module, names in _HOMES.items():
        if name in names.split():
            return getattr(import_module(f"evatool.{module}"), name)
    raise AttributeError(f"module 'evatool' has no attribute {name!r}")


def __dir__() -> list[str]:
    return sorted({*globals(), *__all__})
