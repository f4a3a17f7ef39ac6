"""A step whose loss jumps far above the last ones is kept from the weights, as one that is not finite."""

from __future__ import annotations

import math
from collections.abc import Sequence

import torch
from torch import Tensor

from evatool.distributed.collectives import all_reduce_mean


class SpikeGate:
    """Closes on a loss more than `sigma` standard deviations above the mean of the last `window` losses.

    Losses are means over ranks, so every rank decides alike, and nothing is fetched from a GPU. It stays open until the
    window is full; losses on which it closed, or which are not finite, do not enter it.

    Args:
        sigma: None never closes, and exchanges nothing.
        recent: the window where a resumed run left it.
    Source: OLMo-core `SkipStepOptimizer` (6 sigma of 128 losses); docs/faults.md#r13.
    """

    def __init__(self, sigma: float | None = 6.0, window: int = 128, recent: Sequence[float] = ()) -> None:
        self._sigma, self._window = sigma, window
        self._recent: Tensor | None = None
        self._first = list(recent)
        self.is_closed: Tensor | None = None  # bool (), on the last loss

    def __call__(self, loss: Tensor) -> Tensor:
        """The factor on the gradient of this loss, 1 or NaN; every rank calls it once a step, with its own loss."""
        if self._sigma is None:
            return torch.ones_like(loss)
        mean_loss = all_reduce_mean(loss.detach().double())
        recent = self._ring(mean_loss)
        # NaN where the window is not full, and a comparison with NaN is False.
        limit = recent.mean() + self._sigma * recent.std()
        self.is_closed = mean_loss > limit
        enters = torch.isfinite(mean_loss) & ~self.is_closed
        self._recent = torch.where(enters, torch.cat([recent[1:], mean_loss.reshape(1)]), recent)
        return torch.where(self.is_closed, math.nan, 1.0).to(loss.dtype)

    def _ring(self, like: Tensor) -> Tensor:
        if self._recent is None:
            known = self._first[-self._window :]
            filled = [math.nan] * (self._window - len(known)) + known
            self._recent = torch.tensor(filled, dtype=torch.float64, device=like.device)
        return self._recent

    def state(self) -> list[float]:
        """The losses in the window, the oldest first, for a checkpoint."""
        recent = self._first if self._recent is None else self._recent.tolist()
        return [value for value in recent if not math.isnan(value)]

    def reset(self, recent: Sequence[float]) -> None:
        """Go back to a window."""
        self._first, self._recent = list(recent), None
