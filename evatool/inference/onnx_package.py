"""A CLIP model whose towers are ONNX files, run by onnxruntime: what `load_clip` makes of an exported package."""

from __future__ import annotations

import hashlib
import importlib.util
import json
import math
from pathlib import Path
from typing import Any

import torch
from torch import Tensor, nn

from evatool.core.bounded_json import read_json
from evatool.core.errors import CheckpointError, DependencyError
from evatool.data.tokenizer import ClipTokenizer, Tokenizer
from evatool.model.config import ModelConfig

PREPROCESSOR, SCORES, CONFIG = "preprocessor.json", "scores.json", "model_config.json"
GRAPHS = {"visual": "image.onnx", "text": "text.onnx"}

# B images or captions, S input side in pixels, L text tokens, E embedding


class OnnxTower(nn.Module):
    """One tower in onnxruntime, on the CPU or whatever device that was built for; it has no weights to look at.

    Args:
        path: of the graph. Files of its large tensors lie beside it.
        vocab_size: of a text tower, where it is known.
    """

    def __init__(self, path: Path, vocab_size: int | None = None) -> None:
        super().__init__()
        import onnxruntime

        self.session = onnxruntime.InferenceSession(str(path), providers=onnxruntime.get_available_providers())
        self.vocab_size = vocab_size
        # Told apart by the bytes of its files, as other towers by their weights.
        self.register_buffer("digest", torch.frombuffer(bytearray(_digest(path)), dtype=torch.uint8))
        # What the pixels are made in: the graph takes float32 whatever it computes in.
        self.register_parameter("input_dtype", nn.Parameter(torch.zeros(0), requires_grad=False))

    def forward(self, x: Tensor) -> Tensor:
        """(B, 3, S, S) float or (B, L) int64 -> (B, E), not normalised."""
        features = self.session.run(["features"], {"input": x.cpu().contiguous().numpy()})[0]
        return torch.from_numpy(features).to(x.device)


class OnnxClip(nn.Module):
    """Both towers of a package with their temperature and bias, under open_clip's names.

    Args:
        folder: an ONNX export of both towers.
        config: of the model.
    """

    def __init__(self, folder: Path, config: ModelConfig) -> None:
        super().__init__()
        table = _read(folder / SCORES)
        scale, bias = table.get("logit_scale"), table.get("logit_bias")
        if not isinstance(scale, int | float) or not scale > 0 or not isinstance(bias, int | float | None):
            raise CheckpointError(
                f"logit_scale is {scale!r}, logit_bias {bias!r}",
                where=str(folder / SCORES),
                expected="a number above 0, and a number or null",
                fix="export the model again",
            )
        self.visual = OnnxTower(folder / GRAPHS["visual"])
        self.text = OnnxTower(folder / GRAPHS["text"], table.get("vocab_size"))
        self.logit_scale = nn.Parameter(torch.tensor([math.log(scale)]), requires_grad=False)
        self.logit_bias = None if bias is None else nn.Parameter(torch.tensor([float(bias)]), requires_grad=False)
        self.context_length = config.context_length

    def encode_image(self, image: Tensor, normalize: bool = False) -> Tensor:
        """(B, 3, S, S) float -> (B, E)."""
        features: Tensor = self.visual(image)
        return nn.functional.normalize(features, dim=-1) if normalize else features

    def encode_text(self, text: Tensor, normalize: bool = False) -> Tensor:
        """(B, L) int64 -> (B, E)."""
        features: Tensor = self.text(text)
        return nn.functional.normalize(features, dim=-1) if normalize else features


def has_clip_tokenizer(tokenizer: Tokenizer) -> bool:
    """True for CLIP's byte pairs, which a package can hold."""
    return isinstance(tokenizer, ClipTokenizer)


def is_onnx_package(path: Path) -> bool:
    """True for a folder with both towers as ONNX and what scores them."""
    return path.is_dir() and all((path / name).is_file() for name in (*GRAPHS.values(), SCORES, CONFIG))


def open_onnx_package(folder: Path) -> tuple[OnnxClip, ModelConfig]:
    """The model in an exported package, and its configuration.

    Raises: DependencyError without onnxruntime; CheckpointError for a damaged package.
    """
    if importlib.util.find_spec("onnxruntime") is None:
        raise DependencyError(f"{folder} is an ONNX package, which onnxruntime runs", fix="pip install 'evatool[onnx]'")
    config = ModelConfig.from_json(_read(folder / CONFIG))
    try:
        return OnnxClip(folder, config), config
    except CheckpointError:
        raise
    except Exception as error:  # onnxruntime raises classes of its own
        raise CheckpointError(
            f"onnxruntime cannot open the graphs: {str(error).splitlines()[0][:300]}",
            where=str(folder),
            fix="copy or export the package again",
        ) from error


def _read(path: Path) -> dict[str, Any]:
    try:
        table = read_json(path)
    except (OSError, ValueError) as error:
        raise CheckpointError(f"{path.name} cannot be read: {error}", where=str(path)) from error
    if not isinstance(table, dict):
        raise CheckpointError(f"{path.name} is no JSON object", where=str(path))
    return table


def _digest(path: Path) -> bytes:
    digest = hashlib.sha256(json.dumps(path.name).encode())
    for file in (path, path.with_name(f"{path.name}.data")):
        if file.is_file():
            with file.open("rb") as opened:
                while block := opened.read(2**20):
                    digest.update(block)
    return digest.digest()
