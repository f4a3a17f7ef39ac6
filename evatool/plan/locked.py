"""What a frozen part of a tower saves: gradients, moments, activations and two thirds of its operations.

Freezing goes from the input up (`optim/locking.py`), so nothing before the first layer that learns is needed for the
backward pass. Held to locked models by tests/plan/test_locked.py.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from evatool.model.config import ModelConfig
from evatool.plan import towers

Layers = int | Literal["all"] | None


@dataclass(frozen=True)
class Locks:
    """Frozen blocks of each tower, the embeddings with them; "all" but the projection; None for nothing."""

    visual: Layers = None
    text: Layers = None


def frozen_params(config: ModelConfig, locks: Locks) -> int:
    """Parameters that do not learn."""
    counted = towers.count_parameters(config)
    image, text = config.vision, config.text
    frozen = 0
    if locks.visual == "all":
        bias = config.embed_dim or 0 if config.is_eva and image["qkv_bias"] else 0
        frozen += counted.image - config.width * (config.embed_dim or 0) - bias
    elif locks.visual is not None:
        rows = 3 * config.patch_size**2 + towers.num_patches(config) + 1
        rows += 2 if config.is_eva else 3  # class token; bias of the patch embedding, or open_clip's norm before all
        frozen += rows * config.width + locks.visual * towers.image_blocks(config).block_params
    if text is None or locks.text is None:
        return frozen
    if locks.text == "all":
        return frozen + counted.text - int(text["width"]) * (config.embed_dim or 0)
    table = int(text["vocab_size"] + text["context_length"]) * int(text["width"])
    return frozen + table + locks.text * towers.text_blocks(config).block_params


def idle_blocks(config: ModelConfig, locks: Locks) -> tuple[int, int]:
    """Blocks of the image and of the text tower through which no gradient goes."""
    visual = config.depth if locks.visual == "all" else locks.visual or 0
    return visual, config.text_depth if locks.text == "all" else locks.text or 0


def image_forward_only_flops(config: ModelConfig, locks: Locks, patch_dropout: float) -> int:
    """Operations a picture of the frozen part of the image tower, which has a forward pass alone."""
    if locks.visual is None:
        return 0
    blocks, _ = idle_blocks(config, locks)
    tokens = towers.kept_tokens(config, patch_dropout)
    return towers.patch_flops(config) + towers.image_blocks(config).flops(tokens) * blocks // config.depth


def text_forward_only_flops(config: ModelConfig, locks: Locks, text_tokens: int | None) -> int:
    """Operations a caption of the frozen part of the text tower, which has a forward pass alone."""
    _, blocks = idle_blocks(config, locks)
    if not blocks:
        return 0
    length = config.context_length if text_tokens is None else min(text_tokens, config.context_length)
    return towers.text_blocks(config).flops(length) * blocks // config.text_depth
