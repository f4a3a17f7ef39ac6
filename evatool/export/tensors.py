"""Weights under published names in one file: EVA-CLIP's own format, and plain safetensors."""

from __future__ import annotations

import copy
from collections.abc import Callable, Mapping
from functools import partial
from pathlib import Path
from typing import Any

import torch
import torch.nn.functional as F
from open_clip import CustomTextCLIP
from timm.models.eva import checkpoint_filter_fn
from torch import Tensor

from evatool.export.baai import baai_config, baai_state
from evatool.export.base import Exporter
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.read_back import LibraryMap, TorchMap
from evatool.export.streamed import NamedBlock, StreamedFormat
from evatool.export.verify import (
    fixed_inputs,
    largest_difference,
    our_outputs,
    refuse_different_tensors,
)
from evatool.export.written import Tower, written_tensors
from evatool.formats.safetensors import TensorMap, write_safetensors
from evatool.formats.torch_zip import write_torch_archive
from evatool.inference.loaded_clip import LoadedClip, load_clip
from evatool.model.config import ModelConfig
from evatool.model.vision import build_trunk
from evatool.weights.load import UnloadedClip

BAAI_WEIGHTS, SAFETENSORS_WEIGHTS, CONFIG, CARD = "model.pt", "model.safetensors", "model_config.json", "README.md"

BAAI_NOTE = "`model.pt` is a flat state dict with the names of EVA-CLIP's releases; its own code loads it as well."
SAFETENSORS_NOTE = "`model.safetensors` holds the weights under the names of open_clip's `CustomTextCLIP`."

Outputs = dict[str, Tensor]


class BaaiExporter(Exporter):
    """EVA-CLIP's own format.

    Args:
        tower: write this tower alone; both when None.
    """

    format = "baai"
    writes = "`model.pt` with the names of EVA-CLIP's releases, `model_config.json` in its vocabulary, a card"
    verified_by = "torch's restricted loader and timm's filter for these names"

    def __init__(self, tower: Tower | None = None) -> None:
        self.tower = tower

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_baai`."""
        tensors = baai_state(written_tensors(clip, self.tower), clip.config)
        return export_baai(clip, tensors, baai_config(clip.config), facts, target)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through `load_clip`; EVA-CLIP's code has no name to import."""
        return _our_code(folder)

    def streamed_format(self, clip: UnloadedClip, facts: CardFacts, target: Target) -> StreamedFormat:
        """The files of `export`, written tensor by tensor."""
        return StreamedFormat(
            weights=BAAI_WEIGHTS,
            write=write_torch_archive,
            read=TorchMap,
            configs={CONFIG: baai_config(clip.config)},
            card=lambda difference, how: weights_card(facts, "pytorch", BAAI_NOTE, how, difference, target.tolerance),
            tower=self.tower,
            rename=lambda tensors: baai_state(tensors, clip.config),
            block=partial(_block_through_timm, clip.config),
        )


class SafetensorsExporter(Exporter):
    """Our names in one safetensors file.

    Args:
        tower: write this tower alone; both when None.
    """

    format = "safetensors"
    writes = "`model.safetensors` with open_clip's names, `model_config.json`, a card"
    verified_by = "the safetensors library, and the model built from the file again"

    def __init__(self, tower: Tower | None = None) -> None:
        self.tower = tower

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_safetensors`."""
        reopen = None if self.tower else load_clip
        tensors = written_tensors(clip, self.tower)
        return export_safetensors(clip, tensors, clip.config.to_json(), facts, target, reopen=reopen)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through `load_clip`."""
        return _our_code(folder)

    def streamed_format(self, clip: UnloadedClip, facts: CardFacts, target: Target) -> StreamedFormat:
        """The files of `export`, written tensor by tensor."""
        note = SAFETENSORS_NOTE
        return StreamedFormat(
            weights=SAFETENSORS_WEIGHTS,
            write=partial(write_safetensors, metadata={"format": "pt"}),
            read=LibraryMap,
            configs={CONFIG: clip.config.to_json()},
            card=lambda difference, how: weights_card(facts, "safetensors", note, how, difference, target.tolerance),
            tower=self.tower,
        )


def _our_code(folder: Path) -> str:
    return f"import evatool; evatool.load_clip('{folder}')"


def _block_through_timm(config: ModelConfig, read: TensorMap) -> NamedBlock:
    """A block of a file with EVA-CLIP's names as timm's filter finds it."""
    with torch.device("meta"):
        trunk = build_trunk(config)

    def block(number: int) -> dict[str, Tensor]:
        prefix = f"visual.blocks.{number}."
        found = {name.removeprefix(prefix): read[name] for name in read if name.startswith(prefix)}
        # The filter looks at these names to tell the layout.
        state = {"visual.pos_embed": read["visual.pos_embed"]}
        state |= {f"visual.blocks.0.{name}": tensor for name, tensor in found.items()}
        named = checkpoint_filter_fn(state, trunk)
        return {n.removeprefix("blocks.0."): t for n, t in named.items() if n.startswith("blocks.0.")}

    return block


def export_baai(
    clip: LoadedClip,
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
        write_text(work / CARD, weights_card(facts, "pytorch", BAAI_NOTE, how, difference, target.tolerance))
    return Exported(target.folder, files, difference)


def export_safetensors(
    clip: LoadedClip,
    tensors: Mapping[str, Tensor],
    config: Mapping[str, Any],
    facts: CardFacts,
    target: Target,
    *,
    reopen: Callable[[Path], LoadedClip] | None,
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
        write_text(work / CARD, weights_card(facts, "safetensors", SAFETENSORS_NOTE, how, difference, target.tolerance))
    return Exported(target.folder, files, difference)


def _compare(
    clip: LoadedClip,
    config: Mapping[str, Any],
    target: Target,
    outputs: Callable[[Mapping[str, Tensor]], Outputs],
) -> float:
    inputs = fixed_inputs(clip.image_size, clip.context_length, config["text_cfg"]["vocab_size"])
    theirs = outputs(inputs)
    ours = {name: tensor for name, tensor in our_outputs(clip, inputs).items() if name in theirs}
    return largest_difference(theirs, ours, target)


@torch.no_grad()
def _through_timm(clip: LoadedClip, read: Mapping[str, Tensor], inputs: Mapping[str, Tensor]) -> Outputs:
    """Features of the towers in `read`, the image tower's names translated by timm."""
    outputs: Outputs = {}
    model = clip.model
    assert isinstance(model, CustomTextCLIP)
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


def weights_card(facts: CardFacts, library: str, note: str, how: str, difference: float, allowed: float) -> str:
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
