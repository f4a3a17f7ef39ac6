"""Each tower as a graph for any batch size: a torch.export program or an ONNX file."""

from __future__ import annotations

import importlib.util
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass
from functools import partial
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evatool.core.errors import DependencyError
from evatool.export.base import Exporter
from evatool.export.folder import Exported, Target, staged_folder, sync_file, write_json, write_text
from evatool.export.model_card import CardFacts, model_card
from evatool.export.onnx_package import package_files, write_package
from evatool.export.onnx_precision import OnnxPrecision, agreement, reduce_precision, tidy_graph
from evatool.export.verify import fixed_inputs, largest_difference, our_outputs
from evatool.export.written import Tower
from evatool.inference.loaded_clip import LoadedClip
from evatool.inference.onnx_package import has_clip_tokenizer
from evatool.model.config import ModelConfig

CONFIG, CARD, AGREEMENT = "model_config.json", "README.md", "agreement.json"
DEFAULT_OPSET = 20

# B images or captions, S input side in pixels, L text tokens


class Encoder(nn.Module):
    """One tower with nothing around it: (B, 3, S, S) float or (B, L) int64 -> (B, E), not normalised."""

    def __init__(self, tower: nn.Module) -> None:
        super().__init__()
        self.tower = tower

    def forward(self, x: Tensor) -> Tensor:
        """Features of a batch."""
        features: Tensor = self.tower(x)
        return features


class OnnxExporter(Exporter):
    """Each tower as an ONNX graph.

    Args:
        tower: write this tower alone; both when None.
        opset: ONNX operator set; `DEFAULT_OPSET` when None.
        precision: arithmetic of the graphs.
        images: folder of pictures on which the agreement of graphs in fewer bits is measured.
    """

    format = "onnx"
    writes = (
        "`image.onnx`, `text.onnx`, and with both what serves them alone: preprocessing, tokenizer, scores, a script"
    )
    verified_by = "onnxruntime, on one and on four inputs"

    def __init__(
        self,
        tower: Tower | None = None,
        opset: int | None = None,
        precision: OnnxPrecision = "fp32",
        images: Path | None = None,
    ) -> None:
        self.tower, self.opset, self.precision, self.images = tower, opset, precision, images

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_onnx`."""
        towers, config = _towers(self.tower), clip.config.to_json()
        return export_onnx(
            clip, towers, config, facts, target, opset=self.opset, precision=self.precision, images=self.images
        )

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through onnxruntime, of the image tower where both were written."""
        return f"import onnxruntime; onnxruntime.InferenceSession('{folder}/{_towers(self.tower)[0]}.onnx')"


class TorchExporter(Exporter):
    """Each tower as a program of torch.export.

    Args:
        tower: write this tower alone; both when None.
    """

    format = "torch-export"
    writes = "`image.pt2`, `text.pt2`, `model_config.json`, a card"
    verified_by = "torch.export, on one and on four inputs"

    def __init__(self, tower: Tower | None = None) -> None:
        self.tower = tower

    def export(self, clip: LoadedClip, facts: CardFacts, target: Target) -> Exported:
        """See `export_torch`."""
        return export_torch(clip, _towers(self.tower), clip.config.to_json(), facts, target)

    def loading_code(self, config: ModelConfig, folder: Path) -> str:
        """Through torch.export, of the image tower where both were written."""
        return f"import torch; torch.export.load('{folder}/{_towers(self.tower)[0]}.pt2')"


def _towers(tower: Tower | None) -> list[Tower]:
    return [tower] if tower else ["image", "text"]


@dataclass(frozen=True)
class _GraphFormat:
    """One kind of graph: its writer, its reader, and the words of the card."""

    suffix: str
    library: str
    write: Callable[[nn.Module, Tensor, Path], None]  # encoder, example input, path
    read: Callable[[Path], Callable[[Tensor], Tensor]]
    loading: str
    verified: str
    precision: OnnxPrecision = "fp32"
    images: Path | None = None  # for the agreement of graphs in fewer bits


def export_torch(
    clip: LoadedClip, towers: Sequence[str], config: Mapping[str, Any], facts: CardFacts, target: Target
) -> Exported:
    """Write the target folder: `image.pt2` and `text.pt2` (torch.export), our configuration and a model card.

    Each program is loaded again and run on one and on four inputs.

    Args:
        towers: `image`, `text` or both.
    Raises: as `export_open_clip`.
    """
    graph = _GraphFormat(
        suffix="pt2",
        library="pytorch",
        write=lambda encoder, example, path: torch.export.save(_program(encoder, example), path),
        read=lambda path: torch.export.load(path).module(),
        loading='import torch\nencode_image = torch.export.load("image.pt2").module()\n'
        "features = encode_image(images)  # (B, 3, S, S) float32, normalised -> (B, E)",
        verified="loaded again by torch.export",
    )
    return _export(clip, towers, config, facts, target, graph)


def export_onnx(
    clip: LoadedClip,
    towers: Sequence[str],
    config: Mapping[str, Any],
    facts: CardFacts,
    target: Target,
    *,
    opset: int | None,
    precision: OnnxPrecision = "fp32",
    images: Path | None = None,
) -> Exported:
    """Write the target folder: `image.onnx` and `text.onnx`, our configuration and a model card.

    With both towers also `preprocessor.json`, `tokenizer.json`, `scores.json` and `classify.py`, which need no evatool.
    onnxruntime runs each file on one and on four inputs. Graphs in fewer bits are made from float32 ones that have
    passed that; how far they then agree is measured and stands on the card and in `agreement.json`.

    Args:
        towers: `image`, `text` or both.
        opset: ONNX operator set; 20 when None.
        precision: arithmetic of the graphs.
        images: folder of pictures for the agreement; noise when None.
    Raises: DependencyError without the onnx packages; else as `export_open_clip`.
    """
    needed = ("onnx", "onnxscript", "onnxruntime", "tokenizers")
    missing = [name for name in needed if importlib.util.find_spec(name) is None]
    if missing:
        raise DependencyError(
            f"an ONNX export needs {', '.join(missing)}", fix="pip install 'evatool[onnx]', then the same command"
        )
    opset = opset or DEFAULT_OPSET
    graph = _GraphFormat(
        suffix="onnx",
        library="onnx",
        write=partial(_write_onnx, opset=opset),
        read=_read_onnx,
        loading='import onnxruntime\nsession = onnxruntime.InferenceSession("image.onnx")\n'
        'features = session.run(["features"], {"input": images})[0]  # (B, 3, S, S) float32, normalised -> (B, E)',
        verified=f"run by onnxruntime (operator set {opset})",
        precision=precision,
        images=images,
    )
    return _export(clip, towers, config, facts, target, graph)


def _write_onnx(encoder: nn.Module, example: Tensor, path: Path, *, opset: int) -> None:
    torch.onnx.export(
        _program(encoder, example),
        (),
        path,
        dynamo=True,
        opset_version=opset,
        input_names=["input"],
        output_names=["features"],
        verbose=False,
        external_data=_bytes(encoder) > 1.5e9,  # a protobuf ends at 2 GB
    )
    tidy_graph(path)


def _read_onnx(path: Path) -> Callable[[Tensor], Tensor]:
    import onnxruntime

    session = onnxruntime.InferenceSession(path, providers=["CPUExecutionProvider"])
    return lambda x: torch.from_numpy(session.run(["features"], {"input": x.numpy()})[0])


def _export(
    clip: LoadedClip,
    towers: Sequence[str],
    config: Mapping[str, Any],
    facts: CardFacts,
    target: Target,
    graph: _GraphFormat,
) -> Exported:
    inputs = fixed_inputs(clip.image_size, clip.context_length, config["text_cfg"]["vocab_size"])
    ours = our_outputs(clip, inputs)
    graphs = [f"{tower}.{graph.suffix}" for tower in towers]
    is_package = graph.suffix == "onnx" and len(towers) == 2
    beside = package_files(clip) if is_package else ()
    reduced = (AGREEMENT,) if graph.precision != "fp32" else ()
    files = (*graphs, *beside, *reduced, CARD, CONFIG)
    largest = 0.0
    agreed: dict[str, Any] = {}
    with staged_folder(target, files, optional=[f"{name}.data" for name in graphs]) as work:
        for tower, name in zip(towers, graphs, strict=True):
            example = inputs["image"] if tower == "image" else inputs["tokens"]
            encoder = Encoder(clip.model.visual if tower == "image" else clip.model.text).eval()
            graph.write(encoder, example, work / name)
            sync_file(work / name)
            run = graph.read(work / name)
            feature = f"{tower}_features"
            for count in (1, len(example)):
                theirs, expected = {feature: run(example[:count])}, {feature: ours[feature][:count]}
                largest = max(largest, largest_difference(theirs, expected, target))
            reduce_precision(work / name, graph.precision)
            sync_file(work / name)
        if reduced:
            agreed = {"precision": graph.precision} | agreement(work, clip, towers, graph.images)
            write_json(work / AGREEMENT, agreed)
        if is_package:
            write_package(work, clip)
        write_json(work / CONFIG, config)
        write_text(work / CARD, _card(clip, graphs, facts, graph, largest, target.tolerance, agreed))
    return Exported(target.folder, files, largest, agreed)


def _card(
    clip: LoadedClip,
    graphs: list[str],
    facts: CardFacts,
    graph: _GraphFormat,
    largest: float,
    allowed: float,
    agreed: Mapping[str, Any],
) -> str:
    note = (
        f"Files: {', '.join(graphs)}. Inputs are normalised pictures (B, 3, {clip.image_size}, {clip.image_size}) or "
        f"token rows (B, {clip.context_length}) of int64; outputs are features (B, E), not normalised. Any B."
    )
    verification = (
        f"Before they were published, the files were {graph.verified}, on one and on four inputs. Features differ from "
        f"the original model by at most {largest:.1e} (relative L2 per tensor; {allowed:.0e} was allowed)."
    )
    notes = [note]
    if graph.suffix == "onnx" and len(graphs) == 2 and has_clip_tokenizer(clip.tokenizer):
        notes.append(
            "`python classify.py picture.jpg --labels cat dog` needs onnxruntime, numpy, pillow and tokenizers alone. "
            "`preprocessor.json`, `tokenizer.json` and `scores.json` (temperature and bias) say what it does; "
            "`evatool.load_clip` reads the folder too. `ftfy.zip` is ftfy under its own licence."
        )
    if agreed:
        measured = ", ".join(
            f"{tower} features' cosine {agreed[tower]['cosine_min']:.4f} at least, {agreed[tower]['cosine_mean']:.4f} "
            "on average"
            for tower in ("image", "text")
            if tower in agreed
        )
        on = f"{agreed['images']} pictures" if agreed["images"] else "noise"
        notes.append(f"The graphs compute in {graph.precision}. Beside the float32 model, on {on}: {measured}.")
        verification = "In float32, before they were reduced: " + verification
    return model_card(facts, library=graph.library, loading=graph.loading, notes=notes, verification=verification)


def _program(encoder: nn.Module, example: Tensor) -> torch.export.ExportedProgram:
    with torch.no_grad():
        return torch.export.export(encoder, (example,), dynamic_shapes=({0: torch.export.Dim("batch")},))


def _bytes(module: nn.Module) -> int:
    return sum(p.numel() * p.element_size() for p in module.parameters())
