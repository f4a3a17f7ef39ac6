"""Models of any architecture that open_clip builds, from open_clip's own description of them."""

from __future__ import annotations

import copy
import re
from collections.abc import Iterator
from typing import Any

from open_clip import CustomTextCLIP
from open_clip.coca_model import CoCa
from torch import Tensor, nn

from evatool.core.errors import DependencyError, RecipeError
from evatool.model.config import ModelConfig

RECOMPUTED = re.compile(r"(^|\.)(attn_mask|position_ids|rope\..*|relative_position_index)$")
"""Buffers that follow from the configuration, whether or not a file holds them."""


def build_open_clip(config: ModelConfig) -> CustomTextCLIP | CoCa:
    """A model with random weights, its towers at `visual` and `text` whichever class open_clip would choose.

    Nothing is downloaded: a text tower of transformers is built from its configuration, which must be on this machine.

    Raises: RecipeError where open_clip cannot build it; DependencyError where a package or a configuration of
    transformers is missing.
    """
    assert config.open_clip is not None, f"{config.name} is no model in open_clip's words"
    arguments: dict[str, Any] = copy.deepcopy(config.open_clip)
    arguments.pop("custom_text", None)
    if "timm_model_name" in arguments["vision_cfg"]:
        arguments["vision_cfg"]["timm_model_pretrained"] = False
    hf_name = arguments["text_cfg"].get("hf_model_name")
    if hf_name:
        arguments["text_cfg"]["hf_model_pretrained"] = False
    build = CoCa if "multimodal_cfg" in arguments else CustomTextCLIP
    try:
        return build(**arguments)
    except (OSError, ImportError) as error:
        if not hf_name:
            raise DependencyError(f"open_clip cannot build {config.name}: {_first_line(error)}") from error
        raise DependencyError(
            f"the text tower of {config.name} is {hf_name} of transformers, whose configuration is not at hand: "
            f"{_first_line(error)}",
            expected="a folder with its config.json, or the network",
            fix="pip install 'evatool[transformers]', and put the folder's path into text_cfg.hf_model_name",
        ) from error
    except (TypeError, ValueError, KeyError, RuntimeError, AssertionError) as error:
        raise RecipeError(
            f"open_clip cannot build {config.name} from its description: {_first_line(error)}",
            expected="a model_cfg that this version of open_clip knows",
            fix="compare it with open_clip.get_model_config of a like model",
        ) from error


def _first_line(error: BaseException) -> str:
    return (str(error).strip().splitlines() or [type(error).__name__])[0][:300]


def kept_tensors(model: nn.Module) -> Iterator[tuple[str, Tensor]]:
    """Parameters and buffers that a file of the model holds, by name; without those that are recomputed."""
    for name, tensor in model.state_dict(keep_vars=True).items():
        if not RECOMPUTED.search(name):
            yield name, tensor
