"""The golden files: inputs, weights and outputs of the original EVA code on tiny random models (float32, CPU)."""

from __future__ import annotations

import json
from dataclasses import dataclass
from pathlib import Path

from torch import Tensor

from evatool.formats.safetensors import SafetensorsMap
from evatool.model.config import ModelConfig, from_mim_arguments

FOLDER = Path(__file__).resolve().parents[1] / "assets" / "golden"
CLIP_FILES = ["eva01-clip-g", "eva02-clip-b16", "eva02-clip-l14", "eva02-clip-bige14", "eva-clip-8b", "eva-clip-18b"]
MIM_FILES = ["eva01-mim", "eva02-mim"]

TOLERANCE = 1e-5  # ||a - b|| / ||b|| per tensor; worst measured 1.2e-6 (a gradient of eva02-mim)


@dataclass(frozen=True)
class Golden:
    """One file."""

    config: ModelConfig
    state: dict[str, Tensor]  # original names
    inputs: dict[str, Tensor]
    expected: dict[str, Tensor]


def read_golden(name: str) -> Golden:
    """Read one file by its stem."""
    file = SafetensorsMap(FOLDER / f"{name}.safetensors")
    part = lambda prefix: {k.removeprefix(prefix): file[k] for k in file if k.startswith(prefix)}  # noqa: E731
    vision = json.loads(file.metadata["vision_cfg"])
    if "text_cfg" in file.metadata:
        table = {
            "embed_dim": int(file.metadata["embed_dim"]),
            "vision_cfg": vision,
            "text_cfg": json.loads(file.metadata["text_cfg"]),
        }
        config = ModelConfig.from_json(table, name=name)
    else:
        config = from_mim_arguments(vision, name=name)
    return Golden(config, part("state_dict."), part("input."), part("expected."))


def relative(ours: Tensor, theirs: Tensor) -> float:
    """||ours - theirs|| / ||theirs|| in float64; infinite where the shapes differ."""
    if ours.shape != theirs.shape:
        return float("inf")
    theirs = theirs.detach().double()
    return float((ours.detach().double() - theirs).norm() / theirs.norm())
