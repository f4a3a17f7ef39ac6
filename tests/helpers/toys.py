"""Toy models and evaluation sets, and made-up results."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, field
from itertools import pairwise
from typing import Any

import torch
from torch import Tensor

from evatool.eval.encode import Encoding, ImageMemory
from evatool.eval.encoder import SetEncoder
from evatool.eval.predictions import ClassificationResult
from evatool.eval.results import DifferenceRow, EvalResults, ModelRecord, ResultRow, SetRecord
from evatool.eval.tasks.zero_shot import ZeroShotClassification


@dataclass
class ToySet:
    """An opened set whose loader is a list of batches."""

    name: str = "toy"
    kind: str = "classification"
    classnames: list[str] = field(default_factory=list)
    templates: list[str] = field(default_factory=lambda: ["{c}"])
    loader: list[Any] = field(default_factory=list)
    samples: Any = None


class ToyClip:
    """Pictures are their own features, laid out as (B, E, 1, 1); a text's features are looked up by its first token."""

    def __init__(self, text_features: Tensor) -> None:
        self.text_features = text_features
        self.texts_encoded = 0
        self.known: dict[str, int] = {}

    def tokenizer(self, texts: Sequence[str]) -> Tensor:
        """Equal texts get equal tokens; a text never seen gets the next free one."""
        return torch.tensor([[self.known.setdefault(text, len(self.known))] for text in texts])

    def encode_image(self, image: Tensor) -> Tensor:
        return image.flatten(1).float()

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.texts_encoded += len(tokens)
        return self.text_features[tokens[:, 0]]


def encoder_of(
    model: Any, tokenizer: Any = None, *, trim_text: bool = False, memory: ImageMemory | None = None, **options: Any
) -> SetEncoder:
    """A model on the CPU, ready for a task."""
    return SetEncoder(model, tokenizer or model.tokenizer, Encoding(trim_text=trim_text), memory=memory, **options)


def classify(model: Any, tokenizer: Any, eval_set: Any, **options: Any) -> ClassificationResult:
    """Zero-shot predictions."""
    return ZeroShotClassification().run(encoder_of(model, tokenizer, **options), eval_set).predictions


def as_pictures(features: Tensor) -> Tensor:
    """(B, E) features as pictures that ToyClip gives back."""
    return features[:, :, None, None]


def made_up_results(
    values: dict[str, tuple[float, float, float]] | None = None,
    differences: list[tuple[float, float, float]] | None = None,
) -> EvalResults:
    """Two models on one classification set; values and differences as (value, low, high)."""
    values = values or {"first": (0.05, 0.035, 0.066), "second": (0.08, 0.061, 0.099)}
    results = EvalResults("drawings", "Drawings", "data/eval", seed=0, num_bootstrap=1000, machine="2 CPU cores")
    results.sets = [
        SetRecord(
            "new-artist", "New artist", "the new artist", "About it", "classification", "d/n", 729, 729, 1 / 729, True
        )
    ]
    for name, (value, low, high) in values.items():
        results.models.append(ModelRecord(name, f"runs/{name}", "ab" * 32, 48, 1_200_000, "toy"))
        row = ResultRow(
            name, "ab" * 32, "new-artist", "d/n", "classification", "top1", value, low, high, 1 / 729, 729, 729, 0, 1.0
        )
        results.results.append(row)
    names = list(values)
    for (before, after), (value, low, high) in zip(pairwise(names), differences or [(0.03, 0.01, 0.05)], strict=False):
        results.differences.append(DifferenceRow(before, after, "new-artist", "top1", value, low, high, 729))
    return results
