"""Bytes on one rank, by part, at the worst moment of a step.

Activations are counted operation by operation: what each keeps for the backward pass, with an attention kernel that
keeps query, key, value, output and one number a row. Source: docs/reference/memory-and-scale.md#activations; held to
saved tensors by
tests/plan/test_memory.py. What engines hold is in engines.py.
"""

# D width, h hidden width of the MLP, T tokens, P parameters, b samples a rank, B global batch, E embedding

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Literal

from evatool.model.config import ModelConfig
from evatool.plan.towers import Blocks, decoder_blocks, image_blocks, kept_tokens, num_patches, text_blocks
from evatool.recipe.schema.objective import TILE_SIDE

GIB = 2**30
FP32 = 4

Checkpointing = Literal["none", "selective", "full"]
"""What blocks keep: everything, the results of matrix products and attention, or only their input."""

CONTEXT_BYTES = 1.5 * GIB
"""CUDA context and the buffers of NCCL or RCCL: 1 to 2 GiB (docs/reference/memory-and-scale.md#what-is-left-over)."""
FRAGMENTATION = 1.06
"""What the allocator cannot use: 5 to 8 % (docs/reference/memory-and-scale.md#what-is-left-over)."""


@dataclass(frozen=True)
class Numerics:
    """What a number weighs.

    Attributes:
        name: "fp32" and "autocast" are what `train.precision` = "fp32", and "bf16" or "fp16", do here: weights,
            gradients and moments stay float32, and autocast casts. "bf16" is DeepSpeed's own 16-bit engine, with which
            the EVA models were trained: 16-bit weights and gradients, float32 master weights and moments.
        compute: bytes of an activation.
        residual: bytes of the residual stream and of what norms keep.
        weight: bytes of a weight and of its gradient.
    """

    name: Literal["fp32", "autocast", "bf16"]
    compute: int
    residual: int
    weight: int

    @property
    def casts(self) -> bool:
        """Whether each linear layer makes 16-bit copies of its input and weight."""
        return self.name == "autocast"


NUMERICS = {
    "fp32": Numerics("fp32", 4, 4, 4),
    "autocast": Numerics("autocast", 2, 4, 4),
    "bf16": Numerics("bf16", 2, 2, 2),
}


# ------------------------------------------------------------------------------------------------------ activations


@dataclass(frozen=True)
class Activations:
    """Bytes a sample that one tower keeps for the backward pass.

    Attributes:
        kept: all of it between the two passes.
        block: what one block's backward pass needs back for a moment; 0 unless blocks are recomputed.
    """

    kept: int
    block: int = 0


def block_activations(blocks: Blocks, tokens: int, numerics: Numerics) -> int:
    """Bytes a sequence that one block keeps."""
    compute, residual, casts = numerics.compute, numerics.residual, numerics.casts
    norm_input = FP32 if blocks.has_rms_norm else residual  # RMSNorm is computed in float32
    norm_rows = FP32 if blocks.has_rms_norm else 2 * FP32
    # Autocast gives every linear layer its own copy of a float32 input.
    num_qkv_inputs = 3 if casts and not blocks.has_fused_qkv else 1
    num_mlp_inputs = 2 if casts and blocks.gated == "separate" else 1
    num_outputs = 2 if blocks.is_text else 1  # torch's attention module copies the output to another layout
    a_width = compute * (num_qkv_inputs + 3 + num_outputs + num_mlp_inputs) + 2 * norm_input
    rows = 2 * norm_rows + FP32 * blocks.num_heads
    if blocks.has_inner_norm:
        a_width += compute + (norm_input if casts or blocks.has_rms_norm else 0)
        rows += norm_rows
    if blocks.has_layer_scale:
        a_width += 2 * compute
    if blocks.gated == "none":
        a_hidden = (3 if blocks.has_quick_gelu else 2) * compute
    elif blocks.has_mlp_norm:
        a_hidden = 4 * compute + (FP32 if casts else compute)
        rows += norm_rows
    else:
        a_hidden = 4 * compute
    return tokens * (a_width * blocks.width + a_hidden * blocks.hidden + rows)


def block_products(blocks: Blocks, tokens: int, numerics: Numerics) -> int:
    """Bytes a sequence of one block's matrix products and attention, which selective checkpointing keeps."""
    num_hidden = 1 if blocks.gated == "none" else 2
    products = (3 + 1 + 1) * blocks.width + num_hidden * blocks.hidden  # q, k, v, projection, MLP
    return tokens * (numerics.compute * (products + blocks.width) + FP32 * blocks.num_heads)


def stack_activations(blocks: Blocks, tokens: int, numerics: Numerics, *, checkpointing: Checkpointing) -> Activations:
    """Bytes a sequence that a stack keeps: every block's, or every block's input, with or without its products."""
    block = block_activations(blocks, tokens, numerics)
    if checkpointing == "none":
        return Activations(blocks.depth * block)
    kept = tokens * blocks.width * numerics.residual
    if checkpointing == "full":
        return Activations(blocks.depth * kept, block)
    products = block_products(blocks, tokens, numerics)
    return Activations(blocks.depth * (kept + products), max(0, block - products))


def image_activations(
    config: ModelConfig,
    numerics: Numerics,
    *,
    patch_dropout: float = 0.0,
    checkpointing: Checkpointing = "none",
    idle_blocks: int | None = None,
    is_locked: bool = False,
) -> Activations:
    """Bytes a picture that the image tower keeps: its blocks, the picture and the final norm.

    Args:
        idle_blocks: first blocks that keep nothing because they are frozen, and the embeddings before them; None where
            these learn.
        is_locked: the final norm is frozen too.
    """
    tokens, blocks = kept_tokens(config, patch_dropout), image_blocks(config)
    if is_locked:  # the projection's input alone; where that is a view, all tokens
        is_view = not (numerics.casts and config.is_eva)
        return Activations((tokens if is_view else 1) * config.width * numerics.compute)
    blocks = replace(blocks, depth=blocks.depth - (idle_blocks or 0))
    stack = stack_activations(blocks, tokens, numerics, checkpointing=checkpointing)
    if checkpointing != "none" and not config.is_eva:  # open_clip's ViT keeps its residual stream as the convolution's
        excess = blocks.depth * tokens * blocks.width * (numerics.residual - numerics.compute)
        stack = Activations(stack.kept - excess, stack.block)
    norm_input = FP32 if blocks.has_rms_norm else numerics.residual
    norm = tokens * (blocks.width * norm_input + 2 * FP32)
    outside = norm + (3 * config.image_size**2 * numerics.compute if idle_blocks is None else 0)
    if not config.is_eva:  # a norm before the blocks as well
        outside += norm
    if config.task == "clip" and not (
        numerics.casts and config.is_eva
    ):  # the pooled token is a view: its projection keeps the rest
        outside += tokens * blocks.width * numerics.compute
    if patch_dropout > 0 and idle_blocks is None:  # all patches, from which some are chosen
        outside += num_patches(config) * blocks.width * numerics.residual
    return Activations(stack.kept + outside, stack.block)


def text_activations(
    config: ModelConfig,
    numerics: Numerics,
    *,
    tokens: int | None = None,
    checkpointing: Checkpointing = "none",
    idle_blocks: int = 0,
    is_locked: bool = False,
) -> Activations:
    """Bytes a caption of `tokens` (the whole context when None) that the text tower keeps; locks as for pictures."""
    length = config.context_length if tokens is None else min(tokens, config.context_length)
    blocks = text_blocks(config)
    if is_locked:
        return Activations(blocks.width * numerics.compute)
    blocks = replace(blocks, depth=blocks.depth - idle_blocks)
    stack = stack_activations(blocks, length, numerics, checkpointing=checkpointing)
    return Activations(stack.kept + length * (blocks.width * numerics.residual + 2 * FP32), stack.block)


def mim_activations(
    config: ModelConfig, numerics: Numerics, masked: int, *, checkpointing: Checkpointing = "none"
) -> Activations:
    """Bytes a picture that a MIM student keeps, prediction head and loss included."""
    predict = masked * (config.predict_dim or 0) * (numerics.compute + 3 * FP32)
    if config.decoder is None:
        tower = image_activations(config, numerics, checkpointing=checkpointing)
        return Activations(tower.kept + masked * config.width * numerics.compute + predict, tower.block)
    patches = num_patches(config)
    encoder = stack_activations(image_blocks(config), 1 + patches - masked, numerics, checkpointing=checkpointing)
    decoder = stack_activations(decoder_blocks(config), 1 + patches, numerics, checkpointing="none")
    return Activations(encoder.kept + decoder.kept + predict, encoder.block)


def teacher_activations(blocks: Blocks, tokens: int, numerics: Numerics) -> int:
    """Bytes a sequence that a frozen tower needs for a moment: one block's, since nothing is kept."""
    return block_activations(blocks, tokens, numerics)


def cast_weights(params_in_matrices: int, numerics: Numerics) -> int:
    """Autocast's 16-bit copies of the weights, which live from the forward to the backward pass."""
    return numerics.compute * params_in_matrices if numerics.casts else 0


# ------------------------------------------------------------------------------------------------------------- loss


def contrastive_bytes(
    batch: int, global_batch: int, embed_dim: int, numerics: Numerics, *, teacher_widths: Sequence[int] = ()
) -> int:
    """What the loss between one rank's samples and the global batch needs at its largest.

    Here it goes tile by tile round a ring: features of two ranks with their gradients, scaled pictures, and a few
    tiles, all float32, so the global batch does not matter. A teacher's features go round with the student's, and
    their tiles stand beside its: `teacher_widths` are of those a student learns from. The 16-bit engine is EVA's, with
    whole rows of logits: 2 b B (q + 8), docs/reference/memory-and-scale.md#memory-of-the-loss.
    """
    if numerics.name == "bf16":
        return 2 * batch * global_batch * (numerics.compute + 8) + 4 * global_batch * embed_dim * numerics.compute
    features = 10 * batch * embed_dim * FP32
    features += 6 * batch * sum(teacher_widths) * FP32
    tiles = (6 if teacher_widths else 4) * min(batch, TILE_SIDE["cuda"]) ** 2 * FP32
    return features + tiles


def model_buffers(config: ModelConfig) -> int:
    """Bytes of the model's constants: causal mask, rotations, EVA-01's biases of the keys."""
    numbers = config.context_length**2 if config.text else 0
    blocks = image_blocks(config)
    if config.is_eva and config.vision["rope"]:
        head = blocks.width // blocks.num_heads
        numbers += num_patches(config) * 2 * head + head // 4
    if config.is_eva and blocks.has_fused_qkv and blocks.qkv_biases == 2:
        numbers += blocks.depth * blocks.width
    return FP32 * numbers
