"""The README.md of an exported model: what it is, where it comes from, how to load it."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import torch

import evatool
from evatool.core.secrets import mask_secrets
from evatool.core.shown_text import markdown_block, markdown_code, markdown_text
from evatool.model.config import ModelConfig
from evatool.weights.load import UnloadedClip


@dataclass(frozen=True)
class CardFacts:
    """The facts about the model itself that stand on its card."""

    name: str
    source: str  # the run or file it was exported from
    architecture: Sequence[tuple[str, str]]  # rows of the table
    parameters: Mapping[str, int]  # by tower
    recipe_toml: str | None = None  # the resolved recipe of its training, without credentials
    results: Sequence[tuple[str, str]] = field(default_factory=tuple)  # evaluation set -> figure
    evatool_version: str = ""


def card_facts(clip: UnloadedClip, dtype: torch.dtype, results: Sequence[tuple[str, str]] = ()) -> CardFacts:
    """The facts for the card: shape and size of `clip`, the recipe found beside its weights, and `results`."""
    config = clip.config
    assert config.text is not None, "exports are of CLIP models only"
    text = config.text

    def count(prefix: str) -> int:
        return sum(math.prod(clip.tensors.shape(name)) for name in clip.tensors if name.startswith(prefix))

    if config.open_clip is not None:
        rows = [("image size", " x ".join(map(str, config.input_size))), ("architecture", open_clip_words(config))]
    else:
        rows = [
            (
                "image size, patch, grid",
                f"{config.image_size}, {config.patch_size}, {config.grid[0]} x {config.grid[1]}",
            ),
            ("image tower: width, depth, heads", f"{config.width}, {config.depth}, {config.num_heads}"),
            ("image tower: blocks", _block_words(config.vision)),
            ("text tower: width, depth, heads", f"{text['width']}, {text['layers']}, {text['heads']}"),
        ]
    return CardFacts(
        name=config.name,
        source=clip.source,
        architecture=[
            *rows,
            ("context, vocabulary", f"{config.context_length}, {text['vocab_size']}"),
            ("embedding", str(config.embed_dim)),
            ("weights", dtype_name(dtype)),
        ],
        parameters={"image": count("visual."), "text": count("text."), "temperature": 1},
        recipe_toml=published_recipe(Path(clip.source)),
        results=results,
        evatool_version=evatool.__version__,
    )


def open_clip_words(config: ModelConfig) -> str:
    """The towers of a model in open_clip's words."""
    assert config.open_clip is not None
    vision, text = config.open_clip["vision_cfg"], config.open_clip["text_cfg"]
    image = vision.get("timm_model_name", "an image tower of open_clip")
    return f"open_clip: {image}; {text.get('hf_model_name', 'a text transformer of open_clip')}"


def _block_words(vision: Mapping[str, Any]) -> str:
    if vision["tower"] == "clip-vit":
        return f"OpenAI's ViT, MLP ratio {vision['mlp_ratio']:.4g}"
    words = [
        "post-norm" if vision["postnorm"] else "pre-norm",
        "RMSNorm" if vision["use_rms_norm"] else "LayerNorm",
        "SwiGLU" if vision["naiveswiglu"] or vision["swiglu"] else "GELU",
        f"MLP ratio {vision['mlp_ratio']:.4g}",
        *(["sub-LN"] if vision["subln"] else []),
        *(["RoPE"] if vision["rope"] else []),
        "q and v biases" if vision["qkv_bias"] else "no q/k/v biases",
    ]
    return ", ".join(words)


def dtype_name(dtype: torch.dtype) -> str:
    """`float32` and the like, without torch's prefix."""
    return str(dtype).removeprefix("torch.")


def published_recipe(source: Path) -> str | None:
    """The recipe beside a run's weights as it may be published: credentials hidden. None where there is none."""
    path = source / "resolved.toml"
    return mask_secrets(path.read_text(encoding="utf-8")) if path.is_file() else None


def model_card(facts: CardFacts, *, library: str, loading: str, notes: Sequence[str], verification: str) -> str:
    """Markdown for the folder's README.md.

    Args:
        library: the tag the Hugging Face hub knows, such as `open_clip`.
        loading: Python that loads the model, about three lines.
        notes: paragraphs after the loading code.
        verification: what was compared, and the largest difference.
    """
    total = sum(facts.parameters.values())
    rows = [*facts.architecture, *((f"parameters, {tower}", f"{n:,}") for tower, n in facts.parameters.items())]
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- clip\n- eva\n- zero-shot-image-classification\n---",
        f"# {markdown_text(facts.name)}",
        f"A contrastive image-text model of the EVA-CLIP family with {total:,} parameters, exported by evatool "
        f"{facts.evatool_version}.",
        "## Loading",
        f"```python\n{loading}\n```",
        *notes,
        "## Architecture",
        _table(("", ""), [*rows, ("parameters, total", f"{total:,}")]),
        "## Verification",
        verification,
        "## Training",
        _training(facts),
        "## Evaluation",
        _table(("set", "result"), facts.results) if facts.results else "Not evaluated at the time of the export.",
        "## Licence",
        "The weights carry no licence of their own yet: whoever publishes them chooses one, in keeping with the "
        "licences of the training data and of any weights they were initialised from or distilled from.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(facts: CardFacts) -> str:
    origin = f"Exported from {markdown_code(facts.source)}."
    if facts.recipe_toml is None:
        return f"{origin} The recipe is not known."
    recipe = markdown_block(facts.recipe_toml.strip(), "toml")
    return f"{origin} The resolved recipe, with the data it names:\n\n{recipe}"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    cells = [[markdown_text(str(cell)) for cell in row] for row in rows]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in cells)])
