"""The image tower as a folder for timm's `local-dir:`, compared after stock timm has opened it."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import torch
from torch import Tensor

from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.open_clip import NEEDS_EVATOOL
from evatool.export.verify import TIMM_READER, ExportableClip, fixed_inputs, foreign_outputs, largest_difference
from evatool.formats.safetensors import write_safetensors

WEIGHTS, CONFIG, CARD = "model.safetensors", "config.json", "README.md"


def export_timm(
    clip: ExportableClip,
    timm_config: Mapping[str, Any],
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
        tensors: the weights to write, under timm's names.
        needs_evatool: the tower's name is one that only `evatool.register()` adds to timm.

    Raises: as `export_open_clip`.
    """
    files = (WEIGHTS, CARD, CONFIG)
    with staged_folder(target, files) as work:
        write_safetensors(work / WEIGHTS, tensors, {"format": "pt"})
        write_json(work / CONFIG, timm_config)
        inputs = {"image": fixed_inputs(clip.image_size, clip.context_length, 3)["image"]}
        theirs = foreign_outputs(TIMM_READER, work, inputs, needs_evatool=needs_evatool)
        model: Any = clip.model
        with torch.no_grad():
            ours = {"image_features": model.visual.trunk(inputs["image"])}
        difference = largest_difference(theirs, ours, target)
        write_text(work / CARD, _card(facts, timm_config, needs_evatool, difference, target.tolerance))
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
