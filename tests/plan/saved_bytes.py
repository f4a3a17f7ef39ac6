"""Bytes that autograd keeps between the two passes, measured without memory and without a GPU.

The tensors are meta tensors that say they are on a GPU, so that a GPU's kernels and autocast rules are chosen."""

from __future__ import annotations

from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset

B = 2  # with one sample some copies are views


class _FlashLike(torch.autograd.Function):
    """Keeps what a fused attention kernel keeps; its output is laid out (B, T, H, d), as flash attention's is."""

    @staticmethod
    def forward(ctx: Any, q: Tensor, k: Tensor, v: Tensor) -> Tensor:
        size, heads, tokens, width = q.shape
        out = q.new_empty(size, tokens, heads, width).transpose(1, 2)
        ctx.save_for_backward(q, k, v, out, q.new_empty(size, heads, tokens, dtype=torch.float32))
        return out

    @staticmethod
    def backward(ctx: Any, *grads: Tensor) -> tuple[Tensor, ...]:
        return tuple(torch.empty_like(tensor) for tensor in ctx.saved_tensors[:3])


def _attention(q: Tensor, k: Tensor, v: Tensor, *_: Any, **__: Any) -> Tensor:
    if torch.is_autocast_enabled("cuda"):  # autocast has attention on its list
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    return _FlashLike.apply(q, k, v)


def saved_bytes(module: nn.Module, call: Callable[[], Any]) -> tuple[int, int]:
    """(activations, copies of weights) in bytes that `call` keeps, each storage once, parameters and buffers apart."""
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    shapes = {tuple(p.shape) for p in module.parameters()}
    kept: dict[int, tuple[Any, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage, tuple(tensor.shape))  # held, so that no id is used twice
        return tensor

    with (
        mock.patch.object(F, "scaled_dot_product_attention", _attention),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        call()
    is_weight = lambda shape: shape in shapes or shape[::-1] in shapes  # noqa: E731
    weights = sum(storage.nbytes() for storage, shape in kept.values() if is_weight(shape))
    return sum(storage.nbytes() for storage, _ in kept.values()) - weights, weights


def tower_bytes(
    name: str, tower: str, numerics: str, *, patch_dropout: float = 0.0, checkpointing: bool = False
) -> float:
    """Bytes a sample that a preset's `visual` or `text` tower keeps under "fp32", "bf16" or "autocast"."""
    config = resolve_preset(name)
    with torch.device("meta"):
        clip = build_clip(config, patch_dropout=patch_dropout).train()
    clip.set_grad_checkpointing(checkpointing)
    module = getattr(clip, tower)
    if numerics == "bf16":
        clip.to(torch.bfloat16)
    dtype = torch.bfloat16 if numerics == "bf16" else torch.float32
    side, length = config.image_size, config.context_length
    with FakeTensorMode():  # as on a GPU, without a GPU
        for part in module.modules():
            for key, value in part._parameters.items():
                if value is not None:
                    part._parameters[key] = nn.Parameter(torch.empty(value.shape, dtype=value.dtype, device="cuda"))
            for key, value in part._buffers.items():
                if value is not None:
                    part._buffers[key] = torch.empty(value.shape, dtype=value.dtype, device="cuda")
        x = (
            torch.zeros(B, length, dtype=torch.long, device="cuda")
            if tower == "text"
            else torch.zeros(B, 3, side, side, dtype=dtype, device="cuda")
        )
        torch.set_autocast_enabled("cuda", numerics == "autocast")
        torch.set_autocast_dtype("cuda", torch.bfloat16)
        try:
            return saved_bytes(module, lambda: module(x))[0] / B
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
