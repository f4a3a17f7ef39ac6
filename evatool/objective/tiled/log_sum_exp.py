"""The logarithm of a sum of exponentials whose terms come a tile at a time.

For exponents x_1, x_2, ... kept as m = max x and s = sum exp(x - m), which never overflows. A tile with maximum m'
changes them to

    n = max(m, m')        s <- s exp(m - n) + sum over the tile of exp(x - n)        log sum exp(x) = n + log s

Source: online normaliser calculation for softmax (arXiv 1805.02867).
"""

# b samples, t side of a tile

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass
class RunningSum:
    """Sum of exponentials of each of b samples so far, kept as its largest exponent and the rest.

    Attributes:
        largest: (b,) the largest exponent so far; -inf before the first.
        exp_sum: (b,) sum of exp(exponent - largest).
        weighted: (b,) the same sum with each term times the value that came with it, for `mean`; None without values.
    """

    largest: Tensor
    exp_sum: Tensor
    weighted: Tensor | None = None

    @classmethod
    def none_yet(cls, features: Tensor, *, has_values: bool = False) -> RunningSum:
        """The sums before any tile, for (b, E) features."""
        zeros = features.new_zeros(features.shape[:1])
        return cls(torch.full_like(zeros, -torch.inf), zeros, zeros.clone() if has_values else None)

    @property
    def tensors(self) -> list[Tensor]:
        """The tensors that travel from rank to rank; `shared_sums` reads them back and shares their memory."""
        return [self.largest, self.exp_sum, *([] if self.weighted is None else [self.weighted])]

    def see(self, tile: Tensor, dim: int, span: slice, values: Tensor | None = None) -> None:
        """Take in a tile of exponents.

        Args:
            dim: the tile's axis that is summed over.
            span: which of the b samples lie along the other.
            values: one for each exponent, for `mean`.
        """
        before = self.largest[span].clone()
        self.largest[span] = torch.maximum(before, tile.amax(dim))
        self.add(tile, dim, span, before, values)

    def add(self, tile: Tensor, dim: int, span: slice, before: Tensor, values: Tensor | None = None) -> None:
        """Take in a tile whose largest exponents are in `largest` already, which was `before` until then."""
        now = self.largest[span]
        terms = (tile - now.unsqueeze(dim)).exp_()
        shrunk = (before - now).exp_()
        self.exp_sum[span] = self.exp_sum[span] * shrunk + terms.sum(dim)
        if values is not None:
            assert self.weighted is not None
            self.weighted[span] = self.weighted[span] * shrunk + terms.mul_(values).sum(dim)

    def log(self) -> Tensor:
        """(b,) logarithm of each sum."""
        return self.largest + self.exp_sum.log()

    def mean(self) -> Tensor:
        """(b,) mean of the values under the softmax of the exponents."""
        assert self.weighted is not None
        return self.weighted / self.exp_sum


def shared_sums(tensors: Sequence[Tensor]) -> RunningSum:
    """The sums whose memory these tensors are, in the order of `RunningSum.tensors`."""
    return RunningSum(*tensors)
