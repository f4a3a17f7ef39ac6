"""The image tower as a folder for timm's `local-dir:`, compared after stock timm has opened it."""

from __future__ import annotations

from collections.abc import Mapping
from pathlib import Path
from typing import Any

import torch
from open_clip import CustomTextCLIP
from torch import Tensor

from evatool.core.errors import RecipeError
from evatool.export.base import Exporter
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.open_clip import NEEDS_EVATOOL
from evatool.export.verify import TIMM_READER, fixed_inputs, foreign_outputs, largest_difference
from evatool.export.written import CastMap
from evatool.formats.safetensors import write_safetensors
from evatool.inference.loaded_clip import LoadedClip
from evatool.model.clip import TOWER
from evatool.model.config import ModelConfig
from evatool.model.vision import STOCK_NAMES, has_head_bias, timm_config

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


class TimmExporter(Exporter):
    """The image tower for timm's `local-dir:`."""

    format = "timm"
    writes = "`config.json`, `model.safetensors` with timm's names, a card"
    verified_by = "stock timm in a fresh process"

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_timm`."""
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
        needs_evatool = config["architecture"] not in STOCK_NAMES
        return export_timm(clip, config, tensors, facts, target, needs_evatool=needs_evatool)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through `local-dir:`."""
        register = "import evatool; evatool.register(); " if config.vision["use_rms_norm"] else ""
        return f"{register}import timm; timm.create_model('local-dir:{folder}', pretrained=True)"


def export_timm(
    clip: LoadedClip,
    config: Mapping[str, Any],
    tensors: Mapping[str, Tensor],
    facts: CardFacts,
    target: Target,
    *,
    needs_evatool: bool,
) -> Exported:
    """Write the target folder: timm's configuration and weights of the image tower, and a model card.

    Where the projection has a bias it is timm's head, and the model's output is the image features; else (8B, 18B) the
    output is the class token before the projection.

    Args:
        config: timm's, for the tower.
        tensors: the weights to write, under timm's names.
        needs_evatool: the tower's name is one that only `evatool.register()` adds to timm.

    Raises: as `export_open_clip`.
    """
    files = (WEIGHTS, CARD, CONFIG)
    with staged_folder(target, files) as work:
        write_safetensors(work / WEIGHTS, tensors, {"format": "pt"})
        write_json(work / CONFIG, config)
        inputs = {"image": fixed_inputs(clip.image_size, clip.context_length, 3)["image"]}
        theirs = foreign_outputs(TIMM_READER, work, inputs, needs_evatool=needs_evatool)
        assert isinstance(clip.model, CustomTextCLIP)
        with torch.no_grad():
            ours = {"image_features": clip.model.visual.trunk(inputs["image"])}
        difference = largest_difference(theirs, ours, target)
        write_text(work / CARD, _card(facts, config, needs_evatool, difference, target.tolerance))
    return Exported(target.folder, files, difference)


def _card(facts: CardFacts, config: Mapping[str, Any], needs_evatool: bool, difference: float, tolerance: float) -> str:
    imports = "import evatool, timm; evatool.register()" if needs_evatool else "import timm"
    loading = (
        f'{imports}\nmodel = timm.create_model("local-dir:PATH/OF/THIS/FOLDER", pretrained=True).eval()\n'
        "transform = timm.data.create_transform(**timm.data.resolve_model_data_config(model))"
    )
    output = "image features" if config["num_classes"] else "class token before the projection, which timm cannot hold"
    notes = [f"The image tower alone; its output is the {output}."] + ([NEEDS_EVATOOL] if needs_evatool else [])
    verification = (
        "Before this folder was published, stock timm opened it in a fresh process. Its output on fixed inputs differs "
        f"from the original tower by {difference:.1e} (relative L2; {tolerance:.0e} was allowed)."
    )
    return model_card(facts, library="timm", loading=loading, notes=notes, verification=verification)
