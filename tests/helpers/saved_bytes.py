"""Bytes that autograd keeps between the two passes, measured without memory and without a GPU.

The tensors are meta tensors that say they are on a GPU, so that a GPU's kernels and autocast rules are chosen."""

from __future__ import annotations

import warnings
from collections.abc import Callable
from typing import Any
from unittest import mock

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch._subclasses import FakeTensorMode
from torch.utils._pytree import tree_leaves
from torch.utils.checkpoint import CheckpointPolicy

from evatool.distributed.engines import blocks
from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.optim.locking import lock

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


def _flash(q: Tensor, k: Tensor, v: Tensor, *_: Any, is_causal: bool = False, **__: Any) -> Tensor:
    """The operation that selective checkpointing sees on a GPU."""
    if torch.is_autocast_enabled("cuda"):
        q, k, v = (tensor.to(torch.get_autocast_dtype("cuda")) for tensor in (q, k, v))
    return torch.ops.aten._scaled_dot_product_flash_attention(q, k, v, 0.0, is_causal)[0]


def saved_bytes(module: nn.Module, call: Callable[[], Any], *, selective: bool = False) -> tuple[int, int]:
    """(activations, copies of weights) in bytes that `call` keeps, each storage once, parameters and buffers apart.

    What selective checkpointing keeps does not pass through the hooks: its policy is listened to.
    """
    own = {t.untyped_storage()._cdata for t in (*module.parameters(), *module.buffers())}
    shapes = {tuple(p.shape) for p in module.parameters()}
    kept: dict[int, tuple[Any, tuple[int, ...]]] = {}

    def pack(tensor: Tensor) -> Tensor:
        storage = tensor.untyped_storage()
        if storage._cdata not in own:
            kept[storage._cdata] = (storage, tuple(tensor.shape))  # held, so that no id is used twice
        return tensor

    policy = blocks._keeps_products

    def listening(context: Any, operation: Any, *args: Any, **kwargs: Any) -> Any:
        answer = policy(context, operation, *args, **kwargs)
        if answer == CheckpointPolicy.MUST_SAVE:
            for tensor in tree_leaves(context.op_output):
                if isinstance(tensor, Tensor):
                    kept[tensor.untyped_storage()._cdata] = (tensor.untyped_storage(), tuple(tensor.shape))
        return answer

    attention = _flash if selective else _attention
    with (
        warnings.catch_warnings(action="ignore", category=FutureWarning),
        mock.patch.object(blocks, "_keeps_products", listening),
        mock.patch.object(F, "scaled_dot_product_attention", attention),
        torch.autograd.graph.saved_tensors_hooks(pack, lambda tensor: tensor),
    ):
        call()
    is_weight = lambda shape: shape in shapes or shape[::-1] in shapes  # noqa: E731
    weights = sum(storage.nbytes() for storage, shape in kept.values() if is_weight(shape))
    return sum(storage.nbytes() for storage, _ in kept.values()) - weights, weights


def tower_bytes(
    name: str,
    tower: str,
    numerics: str,
    *,
    patch_dropout: float = 0.0,
    checkpointing: str = "none",
    dtype_name: str = "bfloat16",
    locked: int | str | None = None,
) -> float:
    """Bytes a sample that a preset's `visual` or `text` tower keeps under "fp32", "bf16" or "autocast", with the
    engine's own checkpointing; `locked` freezes blocks from the input up."""
    config = resolve_preset(name)
    with torch.device("meta"):
        clip = build_clip(config, patch_dropout=patch_dropout).train()
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
        if locked is not None:
            named = [(f"model.{name}", param) for name, param in clip.named_parameters()]
            lock(named, tower, locked, config.depth if tower == "visual" else config.text_depth)  # type: ignore[arg-type]
        x = (
            torch.zeros(B, length, dtype=torch.long, device="cuda")
            if tower == "text"
            else torch.zeros(B, 3, side, side, dtype=dtype, device="cuda")
        )
        torch.set_autocast_enabled("cuda", numerics == "autocast")
        torch.set_autocast_dtype("cuda", getattr(torch, dtype_name))
        is_selective = checkpointing == "selective"

        def call() -> Any:
            if checkpointing != "none":
                blocks.checkpoint_blocks(module, checkpointing)
            return module(x)

        try:
            return saved_bytes(module, call, selective=is_selective)[0] / B
        finally:
            torch.clear_autocast_cache()
            torch.set_autocast_enabled("cuda", False)
