"""Weights under published names in one file: EVA-CLIP's own format, and plain safetensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.verify import (
    ExportableClip,
    fixed_inputs,
    largest_difference,
    our_outputs,
    refuse_different_tensors,
)
from evatool.formats.safetensors import write_safetensors
from evatool.formats.torch_zip import write_torch_archive

BAAI_WEIGHTS, SAFETENSORS_WEIGHTS, CONFIG, CARD = "model.pt", "model.safetensors", "model_config.json", "README.md"

BAAI_NOTE = "`model.pt` is a flat state dict with the names of EVA-CLIP's releases; its own code loads it as well."
SAFETENSORS_NOTE = "`model.safetensors` holds the weights under the names of open_clip's `CustomTextCLIP`."

Outputs = dict[str, Tensor]


def export_baai(
    clip: ExportableClip,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    facts: CardFacts,
    target: Target,
) -> Exported:
    """Write the target folder: a flat torch file with EVA-CLIP's names, BAAI's JSON and a model card.

    The file is loaded again with torch's restricted loader. Its image tower goes through timm's own filter for these
    names, an independent translation, and features are compared.

    Args:
        tensors: the weights to write, under EVA-CLIP's names; one tower or both.
        config: the model in BAAI's vocabulary.

    Raises: as `export_open_clip`.
    """
    files = (BAAI_WEIGHTS, CARD, CONFIG)
    with staged_folder(target, files) as work:
        write_torch_archive(work / BAAI_WEIGHTS, tensors)
        read = torch.load(work / BAAI_WEIGHTS, weights_only=True)
        refuse_different_tensors(read, tensors, target.folder)
        difference = _compare(clip, config, target, lambda inputs: _through_timm(clip, read, inputs))
        write_json(work / CONFIG, config)
        how = "loaded with torch's restricted loader, its image tower translated by timm's filter, and run"
        write_text(work / CARD, card_of(facts, "pytorch", BAAI_NOTE, how, difference, target.tolerance))
    return Exported(target.folder, files, difference)


def export_safetensors(
    clip: ExportableClip,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    facts: CardFacts,
    target: Target,
    *,
    reopen: Callable[[Path], ExportableClip] | None,
) -> Exported:
    """Write the target folder: one safetensors file under open_clip's names, the configuration and a model card.

    The library reads the file back; every tensor must have the same bits, and the model built from it our features.

    Args:
        config: our configuration, which the model is built from again.
        reopen: builds the model from the folder; None where only one tower was written, which has tensors to compare.

    Raises: as `export_open_clip`.
    """
    from safetensors.torch import load_file

    files = (SAFETENSORS_WEIGHTS, CARD, CONFIG)
    with staged_folder(target, files) as work:
        write_safetensors(work / SAFETENSORS_WEIGHTS, tensors, {"format": "pt"})
        write_json(work / CONFIG, config)
        refuse_different_tensors(load_file(work / SAFETENSORS_WEIGHTS), tensors, target.folder)
        difference = 0.0
        if reopen is not None:
            again = reopen(work)
            difference = _compare(clip, config, target, lambda inputs: our_outputs(again, inputs))
        how = "read back by the safetensors library with the same bits in every tensor, and run"
        write_text(work / CARD, card_of(facts, "safetensors", SAFETENSORS_NOTE, how, difference, target.tolerance))
    return Exported(target.folder, files, difference)


def _compare(
    clip: ExportableClip,
    config: Mapping[str, Any],
    target: Target,
    outputs: Callable[[Mapping[str, Tensor]], Outputs],
) -> float:
    inputs = fixed_inputs(clip.image_size, clip.context_length, config["text_cfg"]["vocab_size"])
    theirs = outputs(inputs)
    ours = {name: tensor for name, tensor in our_outputs(clip, inputs).items() if name in theirs}
    return largest_difference(theirs, ours, target)


@torch.no_grad()
def _through_timm(clip: ExportableClip, read: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Outputs:
    """Features of the towers in `read`, the image tower's names translated by timm."""
    outputs: Outputs = {}
    model: Any = clip.model
    if "visual.pos_embed" in read:
        trunk = copy.deepcopy(model.visual.trunk)
        state = {name: tensor.float() for name, tensor in checkpoint_filter_fn(dict(read), trunk).items()}
        projection = None if "head.bias" in state else state.pop("head.weight")
        trunk.load_state_dict(state, strict=True)
        features = trunk(inputs["image"])
        outputs["image_features"] = features if projection is None else F.linear(features, projection)
    if "text.positional_embedding" in read:
        text = copy.deepcopy(model.text)
        text.load_state_dict({n.removeprefix("text."): t.float() for n, t in read.items() if n.startswith("text.")})
        outputs["text_features"] = text(inputs["tokens"])
    if "logit_scale" in read:
        outputs["logit_scale"] = read["logit_scale"].float().exp().reshape(1)
    return outputs


def card_of(facts: CardFacts, library: str, note: str, how: str, difference: float, allowed: float) -> str:
    """README.md of a folder with one weight file, which was verified as `how` says."""
    loading = (
        "import evatool\n"
        'clip = evatool.load_clip("PATH/OF/THIS/FOLDER")\n'
        "features = clip.encode_image(clip.preprocess(picture)[None])"
    )
    verification = (
        f"Before it was published, the file was {how}. The largest difference from the original model was "
        f"{difference:.1e} (relative L2 per tensor; {allowed:.0e} was allowed)."
    )
    return model_card(facts, library=library, loading=loading, notes=[note], verification=verification)
