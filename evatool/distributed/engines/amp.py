"""Arithmetic of the forward pass, and the factor that keeps float16 gradients in range.

Weights, gradients and moments are float32 in every precision and engine; only the forward pass is autocast.
"""

from __future__ import annotations

from collections.abc import Iterator, Mapping
from contextlib import AbstractContextManager, contextmanager, nullcontext

import torch
from torch import Tensor
from torch.nn.attention import SDPBackend, sdpa_kernel

LOSS_SCALE, GOOD_STEPS = "loss_scale", "loss_scale_good_steps"
INITIAL_SCALE, GROWTH_INTERVAL = 2.0**16, 1000  # as EVA's runs (docs/reference/eva.md#deepspeed-configuration)


@contextmanager
def autocast(precision: str, device: torch.device) -> Iterator[None]:
    """Arithmetic of the forward pass: bf16 or fp16 where `precision` says so, else as the tensors are."""
    dtypes = {"bf16": torch.bfloat16, "fp16": torch.float16}
    if precision not in dtypes:
        yield
        return
    # No cache: it would keep a 16-bit copy of every weight to the end of the pass, also of weights that were only
    # gathered for one block (34 GiB of EVA-CLIP-18B). No weight is used twice in a pass.
    with torch.autocast(device.type, dtype=dtypes[precision], cache_enabled=False), plain_attention():
        yield


def own_precision(tensor: Tensor) -> AbstractContextManager[object]:
    """Around a frozen model whose weights say what it computes in, whatever the model that learns does."""
    return torch.autocast(tensor.device.type, enabled=False)


def plain_attention() -> AbstractContextManager[object]:
    """Attention by plain products where a CPU computes in half precision; a block that is computed again in the
    backward pass must choose as it did before.

    torch's fused attention has a slow backward pass there: with plain products a step of a tiny EVA-02 took 0.61 s
    against 0.82 s.
    """
    return sdpa_kernel(SDPBackend.MATH) if torch.is_autocast_enabled("cpu") else nullcontext()


def poisoned_if_not_finite(loss: Tensor) -> Tensor:
    """`loss`, with a gradient of NaN if it is not finite.

    So a bad loss on one rank always makes the reduced gradients bad on every rank, and all skip the same step without
    an exchange of flags and without the CPU waiting for the GPU.
    """
    factor = torch.where(torch.isfinite(loss.detach()), 1.0, float("nan"))
    return loss * factor.to(loss.dtype)


class LossScale:
    """Dynamic loss scale: halved (to 1 at least) after a step that overflowed, doubled after 1,000 that did not.

    It moves by what all ranks see alike, the norm of the reduced gradients, so it is the same on every rank. Nothing is
    fetched from a GPU.
    """

    def __init__(self, device: torch.device) -> None:
        self.value = torch.full((1,), INITIAL_SCALE, device=device)
        self._good_steps = torch.zeros(1, dtype=torch.int32, device=device)

    def update(self, found_inf: Tensor) -> None:
        """After a step; `found_inf` is 1 where a gradient was not finite on any rank, else 0."""
        found_inf = found_inf.float().reshape(1)
        torch._amp_update_scale_(self.value, self._good_steps, found_inf, 2.0, 0.5, GROWTH_INTERVAL)
        self.value.clamp_(min=1.0)

    def state(self) -> dict[str, Tensor]:
        """What a checkpoint keeps of it."""
        return {LOSS_SCALE: self.value, GOOD_STEPS: self._good_steps}

    def load(self, saved: Mapping[str, Tensor]) -> None:
        """Go on from a checkpoint; one that was written in another precision has none, and the scale stays as it is."""
        if LOSS_SCALE in saved and GOOD_STEPS in saved:
            self.value.copy_(saved[LOSS_SCALE])
            self._good_steps.copy_(saved[GOOD_STEPS])
