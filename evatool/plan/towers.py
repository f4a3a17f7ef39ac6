"""Parameters and floating-point operations of the towers, from their configuration alone.

A multiply-add counts as two operations. Norms, softmax, activations and rotations are left out, as
`torch.utils.flop_counter` leaves them out; attention is counted whole even where it is causal.
Source: docs/reference/memory-and-scale.md#operations. Held to meta builds and to the counter by
tests/plan/test_towers.py.
"""

# D width, h hidden width of the MLP, T tokens, N patches, E embedding

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, Literal

from evatool.model.config import ModelConfig

DECODER_MLP_RATIO = 4.0  # of the masked autoencoder EVA-L


@dataclass(frozen=True)
class Blocks:
    """A stack of equal transformer blocks.

    Attributes:
        width, depth, num_heads, hidden: D, number of blocks, attention heads, h.
        gated: "none", "packed" (gate and value in one matrix) or "separate".
        has_mlp_norm, has_inner_norm: norms inside the MLP and before the attention's output projection.
        has_rms_norm: RMSNorm instead of LayerNorm.
        has_fused_qkv: one matrix for query, key and value.
        qkv_biases: how many of query, key and value have a bias.
        has_layer_scale: a learned factor on each branch.
        is_text: open_clip's block around torch's own attention module.
        has_quick_gelu: x sigmoid(1.702 x).
    """

    width: int
    depth: int
    num_heads: int
    hidden: int
    gated: Literal["none", "packed", "separate"] = "none"
    has_mlp_norm: bool = False
    has_inner_norm: bool = False
    has_rms_norm: bool = False
    has_fused_qkv: bool = True
    qkv_biases: int = 3
    has_layer_scale: bool = False
    is_text: bool = False
    has_quick_gelu: bool = False

    @property
    def matrix_params(self) -> int:
        """Entries of one block's matrices: what multiplies every token."""
        num_mlp = 2 if self.gated == "none" else 3
        return 4 * self.width**2 + num_mlp * self.width * self.hidden

    @property
    def block_params(self) -> int:
        """All parameters of one block."""
        norm = self.width if self.has_rms_norm else 2 * self.width
        vectors = (self.qkv_biases + 1) * self.width  # of the attention
        vectors += (1 if self.gated == "none" else 2) * self.hidden + self.width  # of the MLP
        vectors += 2 * norm + (norm if self.has_inner_norm else 0)
        vectors += 2 * self.hidden if self.has_mlp_norm else 0
        vectors += 2 * self.width if self.has_layer_scale else 0
        return self.matrix_params + vectors

    @property
    def params(self) -> int:
        """All parameters of the stack."""
        return self.depth * self.block_params

    def flops(self, tokens: int) -> int:
        """Forward pass over one sequence of `tokens`."""
        return self.depth * (2 * self.matrix_params * tokens + 4 * tokens**2 * self.width)


def image_blocks(config: ModelConfig) -> Blocks:
    """The image tower's blocks."""
    vision = config.vision
    shape: dict[str, Any] = {
        "width": config.width,
        "depth": config.depth,
        "num_heads": config.num_heads,
        "hidden": int(config.width * vision["mlp_ratio"]),
    }
    if not config.is_eva or config.decoder is not None:
        return Blocks(**shape, is_text=not config.is_eva, has_quick_gelu=config.quick_gelu)
    gated: Literal["none", "packed", "separate"] = "none"
    if vision["naiveswiglu"] or vision["swiglu"]:
        gated = "separate" if vision["naiveswiglu"] else "packed"
    return Blocks(
        **shape,
        gated=gated,
        has_mlp_norm=bool(vision["naiveswiglu"]),
        has_inner_norm=config.has_inner_attn_norm,
        has_rms_norm=bool(vision["use_rms_norm"]),
        has_fused_qkv=not vision["subln"],
        qkv_biases=2 if vision["qkv_bias"] else 0,
        has_layer_scale=vision["ls_init_value"] is not None,
    )


def text_blocks(config: ModelConfig) -> Blocks:
    """The text tower's blocks. The configuration must have a text tower."""
    text = config.text
    assert text is not None, f"{config.name} has no text tower"
    return Blocks(
        width=text["width"],
        depth=text["layers"],
        num_heads=text["heads"],
        hidden=int(text["width"] * text["mlp_ratio"]),
        has_layer_scale=text["ls_init_value"] is not None,
        is_text=True,
        has_quick_gelu=config.quick_gelu,
    )


def decoder_blocks(config: ModelConfig) -> Blocks:
    """The decoder's blocks of a masked autoencoder."""
    decoder = config.decoder
    assert decoder is not None, f"{config.name} has no decoder"
    width = decoder["width"]
    return Blocks(width, decoder["layers"], decoder["heads"], int(width * DECODER_MLP_RATIO))


# ----------------------------------------------------------------------------------------------------- parameters


@dataclass(frozen=True)
class Parameters:
    """Parameters by part; `other` is the temperature, or mask token, decoder and prediction head."""

    image: int
    text: int
    other: int

    @property
    def total(self) -> int:
        """All of them."""
        return self.image + self.text + self.other


def count_parameters(config: ModelConfig) -> Parameters:
    """Exact counts of the CLIP model, or of the MIM model where the configuration has no text tower."""
    if config.task == "clip":
        return Parameters(_image_params(config), _text_params(config), 1)
    width, predict = config.width, config.predict_dim or 0
    if config.decoder is None:
        return Parameters(_image_params(config), 0, width + (width + 1) * predict)
    inner = config.decoder["width"]
    other = (width + 1) * inner + inner + decoder_blocks(config).params + 2 * inner + (inner + 1) * predict
    return Parameters(_image_params(config), 0, other)


def _image_params(config: ModelConfig) -> int:
    width, blocks = config.width, image_blocks(config)
    pixels = 3 * config.patch_size**2
    positions = config.grid[0] * config.grid[1] + 1
    if not config.is_eva:  # no bias in the patch embedding, a norm before and after the blocks
        return (pixels + 1 + positions) * width + 4 * width + blocks.params + width * (config.embed_dim or 0)
    norm = width if blocks.has_rms_norm else 2 * width
    params = (pixels + 1) * width + width + blocks.params + norm
    if config.decoder is None:  # a masked autoencoder's positions are a fixed table
        params += positions * width
    if config.task == "clip":
        assert config.embed_dim is not None
        params += width * config.embed_dim + (config.embed_dim if config.vision["qkv_bias"] else 0)
    return params


def _text_params(config: ModelConfig) -> int:
    text = config.text
    assert text is not None
    assert config.embed_dim is not None
    width = int(text["width"])
    table = int(text["vocab_size"] + text["context_length"]) * width
    return table + text_blocks(config).params + 2 * width + width * config.embed_dim


# ----------------------------------------------------------------------------------------------------- operations


def num_patches(config: ModelConfig) -> int:
    """N."""
    return config.grid[0] * config.grid[1]


def kept_tokens(config: ModelConfig, patch_dropout: float = 0.0) -> int:
    """Tokens of the image tower in training, with the class token: 129 of 257 at a dropout of 0.5."""
    patches = num_patches(config)
    return 1 + (max(1, int(patches * (1.0 - patch_dropout))) if patch_dropout > 0 else patches)


def image_flops(config: ModelConfig, patch_dropout: float = 0.0, *, all_tokens: bool = False) -> int:
    """Forward pass of the image tower for one picture.

    Args:
        all_tokens: project every token, as a MIM teacher does, not only the class token.
    """
    tokens = kept_tokens(config, patch_dropout)
    head = 2 * config.width * (config.embed_dim or 0) * (tokens if all_tokens else 1)
    return patch_flops(config) + image_blocks(config).flops(tokens) + head


def text_flops(config: ModelConfig, tokens: int | None = None) -> int:
    """Forward pass of the text tower for one caption of `tokens` (the whole context when None)."""
    assert config.text is not None
    length = config.context_length if tokens is None else min(tokens, config.context_length)
    return text_blocks(config).flops(length) + 2 * int(config.text["width"]) * (config.embed_dim or 0)


def mim_flops(config: ModelConfig, masked: int) -> int:
    """Forward pass of a MIM student for one picture with `masked` hidden patches."""
    predict = config.predict_dim or 0
    patches = num_patches(config)
    if config.decoder is None:
        return patch_flops(config) + image_blocks(config).flops(1 + patches) + 2 * masked * config.width * predict
    visible, inner = 1 + patches - masked, int(config.decoder["width"])
    encoder = image_blocks(config).flops(visible) + 2 * visible * config.width * inner
    return patch_flops(config) + encoder + decoder_blocks(config).flops(1 + patches) + 2 * masked * inner * predict


def patch_flops(config: ModelConfig) -> int:
    """Embedding of one picture's patches."""
    return 2 * 3 * config.patch_size**2 * config.width * num_patches(config)
