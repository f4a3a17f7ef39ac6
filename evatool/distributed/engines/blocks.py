"""The transformer blocks of an objective: the units in which weights come together, activations are recomputed and
code is compiled; and objectives whose weights are still to come."""

from __future__ import annotations

import logging
import os
import shutil
from collections.abc import Callable
from functools import partial
from typing import Any

import torch
from torch import nn
from torch.utils.checkpoint import CheckpointPolicy, checkpoint, create_selective_checkpoint_contexts

from evatool.distributed.engines.amp import plain_attention

log = logging.getLogger(__name__)

_GEMMS = ("mm", "addmm", "bmm", "baddbmm", "_scaled_mm")
_ATTENTIONS = ("flash_attention", "flash_attention_for_cpu", "efficient_attention", "cudnn_attention")
_KEPT = {
    getattr(torch.ops.aten, name).default
    for name in (*_GEMMS, *(f"_scaled_dot_product_{kind}" for kind in _ATTENTIONS))
    if hasattr(torch.ops.aten, name)
}
"""Operations whose results are worth their memory: matrix products and attention."""


def blocks_of(objective: nn.Module) -> list[nn.Module]:
    """Every block of every tower, in the order of the modules; blocks stand in lists called `blocks`, `resblocks`."""
    lists = (part for name, part in objective.named_modules() if name.rpartition(".")[2] in ("blocks", "resblocks"))
    return [block for part in lists if isinstance(part, nn.ModuleList) for block in part]


def has_no_weights(objective: nn.Module) -> bool:
    """True for an objective that was built on the meta device: `load_model_state` is to give it its weights."""
    return any(param.is_meta for param in objective.parameters())


def materialize(objective: nn.Module, device: torch.device) -> None:
    """Memory on `device` for parameters on the meta device, for what this rank holds of them; buffers move with their
    values."""
    buffers = dict(objective.named_buffers())
    stale = sorted(name for name, buffer in buffers.items() if buffer.is_meta)
    assert not stale, f"buffers without values: {stale[:5]}"
    objective.to_empty(device=device)
    with torch.no_grad():
        for name, buffer in objective.named_buffers():
            buffer.copy_(buffers[name])


def checkpoint_blocks(objective: nn.Module, kind: str) -> None:
    """Let every block keep less for its backward pass; results and random numbers stay the same.

    Args:
        kind: "selective" keeps the results of matrix products and attention and computes the rest again (norms,
            activations, rotations, dropout); "full" keeps a block's input and computes all of it again.
    """
    contexts = {"context_fn": partial(create_selective_checkpoint_contexts, _keeps_products)}
    options = contexts if kind == "selective" else {}
    for block in blocks_of(objective):
        block.forward = _checkpointed(block.forward, options)


def _checkpointed(forward: Callable[..., Any], options: dict[str, Any]) -> Callable[..., Any]:
    def block(*args: Any, **kwargs: Any) -> Any:
        with plain_attention():  # what surrounds the first pass is not there when the block is computed again
            return forward(*args, **kwargs)

    def run(*args: Any, **kwargs: Any) -> Any:
        if not torch.is_grad_enabled():
            return forward(*args, **kwargs)
        return checkpoint(block, *args, use_reentrant=False, **options, **kwargs)

    return run


def _keeps_products(context: Any, operation: Any, *args: Any, **kwargs: Any) -> CheckpointPolicy:
    return CheckpointPolicy.MUST_SAVE if operation in _KEPT else CheckpointPolicy.PREFER_RECOMPUTE


def compile_blocks(objective: nn.Module, device: torch.device, asked: str = "engine.compile = true") -> bool:
    """Compile every block where a compiler is found; says so once, and returns False, where none is."""
    blocks = blocks_of(objective)
    missing = _missing_compiler(device)
    if missing is not None:
        log.warning("%s, but %s: the blocks run as they are", asked, missing)
        return False
    # Blocks of one tower share their code and differ in constants such as drop path rates: one version each.
    limit = 4 * len(blocks)
    torch._dynamo.config.recompile_limit = max(torch._dynamo.config.recompile_limit, limit)
    torch._dynamo.config.accumulated_recompile_limit = max(torch._dynamo.config.accumulated_recompile_limit, limit)
    for block in blocks:
        block.forward = torch.compile(block.forward)
    log.info("%d blocks are compiled in their first steps", len(blocks))
    return True


def _missing_compiler(device: torch.device) -> str | None:
    """What torch.compile would miss on this device, in words; None if nothing."""
    if device.type == "cuda":
        if not torch.utils._triton.has_triton():
            return "Triton cannot be used"
        names = [os.environ.get("CC"), "gcc", "clang", "cc"]
    else:
        names = [os.environ.get("CXX"), "g++", "clang++"]
    if any(name and shutil.which(name) for name in names):
        return None
    return f"no compiler is found ({', '.join(name for name in names if name)})"
