"""The table of export formats.

`deepspeed` is not among them: it is a training checkpoint, moments included, and no model to run
(`stages/exporting/deepspeed.py`).
"""

from __future__ import annotations

from pathlib import Path
from typing import Literal

from evatool.export.base import Exporter
from evatool.export.graph import OnnxExporter, TorchExporter
from evatool.export.onnx_precision import OnnxPrecision
from evatool.export.open_clip import OpenClipExporter
from evatool.export.tensors import BaaiExporter, SafetensorsExporter
from evatool.export.timm import TimmExporter
from evatool.export.transformers import TransformersExporter
from evatool.export.written import Tower

ModelFormat = Literal["open_clip", "baai", "timm", "safetensors", "onnx", "torch-export", "transformers"]

EXPORTERS: tuple[type[Exporter], ...] = (
    OpenClipExporter,
    BaaiExporter,
    TimmExporter,
    SafetensorsExporter,
    OnnxExporter,
    TorchExporter,
    TransformersExporter,
)


def build_exporter(
    format: ModelFormat,
    *,
    tower: Tower | None = None,
    opset: int | None = None,
    precision: OnnxPrecision = "fp32",
    images: Path | None = None,
) -> Exporter:
    """The exporter of a format.

    Args:
        tower: write this tower alone; both when None. An open_clip folder always holds both, timm's the image tower.
        opset: ONNX operator set; the default when None. Only `onnx` has one.
        precision, images: of `onnx`: arithmetic of the graphs, and pictures on which its agreement is measured.
    """
    match format:
        case "open_clip":
            return OpenClipExporter()
        case "baai":
            return BaaiExporter(tower)
        case "timm":
            return TimmExporter()
        case "safetensors":
            return SafetensorsExporter(tower)
        case "onnx":
            return OnnxExporter(tower, opset, precision, images)
        case "torch-export":
            return TorchExporter(tower)
        case "transformers":
            return TransformersExporter()
