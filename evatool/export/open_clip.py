"""A folder for open_clip's `local-dir:`, compared with the model after stock open_clip has opened it."""

from __future__ import annotations

import json
from collections.abc import Mapping
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

from torch import Tensor

import evatool
from evatool.core.image_input import ImageInput
from evatool.export.base import Exporter
from evatool.export.folder import Exported, Target, staged_folder, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.read_back import LibraryMap
from evatool.export.streamed import StreamedFormat
from evatool.export.verify import (
    OPEN_CLIP_READER,
    fixed_inputs,
    foreign_outputs,
    largest_difference,
    our_outputs,
)
from evatool.export.written import written_tensors
from evatool.formats.safetensors import write_safetensors
from evatool.inference.loaded_clip import LoadedClip
from evatool.model.clip import open_clip_model_config
from evatool.model.config import ModelConfig
from evatool.model.vision import STOCK_NAMES, timm_config
from evatool.weights.load import UnloadedClip
from evatool.weights.source import OPEN_CLIP_CONFIG as CONFIG
from evatool.weights.source import OPEN_CLIP_WEIGHTS as WEIGHTS

TIMM_CONFIG, CARD = "config.json", "README.md"

# Run in the folder after it was moved. One line, so that it can be copied from the card.
PATH_FIX = (
    "python -c \"import json, pathlib; p = pathlib.Path('open_clip_config.json'); c = json.loads(p.read_text()); "
    "c['model_cfg']['vision_cfg']['timm_model_name'] = f'local-dir:{p.resolve().parent}'; "
    'p.write_text(json.dumps(c, indent=2))"'
)


@dataclass(frozen=True)
class OpenClipDescription:
    """The configurations by which open_clip builds a model.

    Attributes:
        model_cfg: open_clip's model configuration; its `timm_model_name` is right where `timm_config` is None.
        timm_config: timm's `config.json` for a tower that has no name in timm, to lie in the same folder.
        needs_evatool: the tower's name is one that only `evatool.register()` adds to timm.
        preprocess_cfg: open_clip's preprocessing configuration.
        evatool: our own record, which open_clip passes over.
    """

    model_cfg: Mapping[str, Any]
    timm_config: Mapping[str, Any] | None
    needs_evatool: bool
    preprocess_cfg: Mapping[str, Any]
    evatool: Mapping[str, Any]


def open_clip_description(model: ModelConfig) -> OpenClipDescription:
    """The configurations by which open_clip builds `model`."""
    model_cfg = open_clip_model_config(model)
    if model.open_clip is not None:
        # The towers stand at `visual` and `text` in the file, whichever class it was.
        model_cfg["custom_text"] = True
        return OpenClipDescription(
            model_cfg=model_cfg,
            timm_config=None,
            needs_evatool=False,
            preprocess_cfg=preprocess_cfg_of(model.input),
            evatool={"version": evatool.__version__, "model": model.to_json()},
        )
    name = model_cfg["vision_cfg"].get("timm_model_name")  # None: open_clip's own ViT
    is_stock = name is None or name in STOCK_NAMES
    config = None if is_stock else timm_config(model)
    return OpenClipDescription(
        model_cfg=model_cfg,
        timm_config=config if config is not None and config["model_args"] else None,
        needs_evatool=config is not None and config["architecture"] not in STOCK_NAMES,
        preprocess_cfg=preprocess_cfg_of(model.input),
        evatool={"version": evatool.__version__, "model": model.to_json()},
    )


def preprocess_cfg_of(wanted: ImageInput) -> dict[str, Any]:
    """`wanted` in open_clip's words."""
    table: dict[str, Any] = {"mean": wanted.mean, "std": wanted.std, "interpolation": wanted.interpolation}
    table["resize_mode"] = wanted.resize
    return table | ({"fill_color": wanted.fill} if wanted.fill else {})


class OpenClipExporter(Exporter):
    """A folder for open_clip's `local-dir:`."""

    format = "open_clip"
    writes = "`open_clip_config.json`, `open_clip_model.safetensors`, timm's `config.json` where needed, a card"
    verified_by = "stock open_clip in a fresh process"

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_open_clip`."""
        return export_open_clip(clip, open_clip_description(clip.config), written_tensors(clip), facts, target)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through `local-dir:`."""
        register = "import evatool; evatool.register(); " if config.vision.get("use_rms_norm") else ""
        return f"{register}import open_clip; open_clip.create_model_from_pretrained('local-dir:{folder}')"

    def streamed_format(self, clip: UnloadedClip, facts: CardFacts, target: Target) -> StreamedFormat:
        """The files of `export`, written tensor by tensor."""
        description = open_clip_description(clip.config)
        configs: dict[str, Mapping[str, Any]] = {}
        if description.timm_config is not None:
            configs[TIMM_CONFIG] = description.timm_config
        configs[CONFIG] = config_of(description, target.folder)
        return StreamedFormat(
            weights=WEIGHTS,
            write=partial(write_safetensors, metadata={"format": "pt"}),
            read=LibraryMap,
            configs=configs,
            card=lambda difference, how: card_of(description, facts, target, difference=difference, how=how),
        )


def export_open_clip(
    clip: LoadedClip,
    description: OpenClipDescription,
    tensors: Mapping[str, Tensor],
    facts: CardFacts,
    target: Target,
) -> Exported:
    """Write the target folder: configuration, weights, timm's configuration where needed, and a model card.

    Everything is written to a temporary folder first and opened there by open_clip in a fresh process, where evatool
    cannot be imported unless the model needs it. Only what has passed is moved into the target.

    Args:
        tensors: the weights to write, under open_clip's names.

    Raises: EvatoolError beyond the tolerance, on a full disk, or if open_clip cannot open the folder; UsageError if
    the folder already holds an export. Then nothing of the export is left.
    """
    is_tied = description.timm_config is not None
    files = (WEIGHTS, *((TIMM_CONFIG,) if is_tied else ()), CARD, CONFIG)
    with staged_folder(target, files) as work:
        write_safetensors(work / WEIGHTS, tensors, {"format": "pt"})
        if is_tied:
            write_json(work / TIMM_CONFIG, description.timm_config)
        write_json(work / CONFIG, config_of(description, work))
        inputs = fixed_inputs(
            clip.input_size, clip.context_length, description.model_cfg["text_cfg"].get("vocab_size", 49408)
        )
        theirs = foreign_outputs(OPEN_CLIP_READER, work, inputs, needs_evatool=description.needs_evatool)
        difference = largest_difference(theirs, our_outputs(clip, inputs), target)
        write_json(work / CONFIG, config_of(description, target.folder))
        write_text(work / CARD, card_of(description, facts, target, difference=difference))
    return Exported(target.folder, files, difference)


def config_of(description: OpenClipDescription, folder: Path) -> dict[str, Any]:
    """`open_clip_config.json` of the folder at this path."""
    model_cfg = json.loads(json.dumps(description.model_cfg))
    if description.timm_config is not None:
        # timm takes arguments from a folder only by its absolute path: a relative one would depend on the reader's
        # working directory.
        model_cfg["vision_cfg"]["timm_model_name"] = f"local-dir:{folder.resolve()}"
    return {
        "model_cfg": model_cfg,
        "preprocess_cfg": dict(description.preprocess_cfg),
        "evatool": dict(description.evatool),
    }


def card_of(
    description: OpenClipDescription, facts: CardFacts, target: Target, *, difference: float, how: str | None = None
) -> str:
    """The folder's README.md.

    Args:
        how: how it was verified, where that was not by opening the whole model in open_clip.
    """
    lines = ["import open_clip"]
    notes = []
    if description.needs_evatool:
        lines = ["import evatool, open_clip; evatool.register()"]
        notes.append(NEEDS_EVATOOL)
    folder = target.folder.resolve() if description.timm_config is not None else "PATH/OF/THIS/FOLDER"
    lines += [
        f'model, preprocess = open_clip.create_model_from_pretrained("local-dir:{folder}")',
        f'tokenizer = open_clip.get_tokenizer("local-dir:{folder}")',
    ]
    if description.timm_config is not None:
        notes.append(
            "**This folder is tied to its path.** timm has no name for this image tower, so `open_clip_config.json` "
            "points at the `config.json` beside it by absolute path. After moving or copying the folder, run this "
            f"one line inside it:\n\n```sh\n{PATH_FIX}\n```"
        )
    where = "registered" if description.needs_evatool else "impossible to import"
    verification = (
        "Before this folder was published, stock open_clip opened it in a fresh process with evatool "
        f"{where}. Image features, text features, temperature and preprocessing of fixed inputs differ from the "
        f"original model by at most {difference:.1e} (relative L2 per tensor; {target.tolerance:.0e} was allowed)."
    )
    if how is not None:
        verification = f"Before it was published, the file was {how} (relative L2 at most {difference:.1e})."
    return model_card(facts, library="open_clip", loading="\n".join(lines), notes=notes, verification=verification)


NEEDS_EVATOOL = (
    "The image tower has RMSNorm, which timm cannot be told of in JSON: `evatool.register()` adds the tower to timm, "
    "and evatool must be installed."
)
