"""The logarithm of a sum of exponentials whose terms come a tile at a time."""

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
        weighted: (b,) the same sum with each term times what came with it; what a softmax's mean of that is made of.
    """

    largest: Tensor
    exp_sum: Tensor
    weighted: Tensor

    @classmethod
    def none_yet(cls, features: Tensor) -> RunningSum:
        """Before any tile, for (b, E) features."""
        zeros = features.new_zeros(features.shape[:1])
        return cls(torch.full_like(zeros, -torch.inf), zeros, zeros.clone())

    @property
    def tensors(self) -> list[Tensor]:
        """What travels from rank to rank; `RunningSum(*tensors)` reads it back and shares its memory."""
        return [self.largest, self.exp_sum, self.weighted]

    def see(self, tile: Tensor, dim: int, span: slice, values: Tensor | None = None) -> None:
        """Take in a tile of exponents.

        Args:
            dim: the tile's axis that is summed over.
            span: which of the b samples lie along the other.
            values: one for each exponent, for `mean`.
        """
        before = self.largest[span].clone()
        now = torch.maximum(before, tile.amax(dim))
        terms = (tile - now.unsqueeze(dim)).exp_()
        shrunk = (before - now).exp_()
        self.largest[span] = now
        self.exp_sum[span] = self.exp_sum[span] * shrunk + terms.sum(dim)
        if values is not None:
            self.weighted[span] = self.weighted[span] * shrunk + terms.mul_(values).sum(dim)

    def log(self) -> Tensor:
        """(b,) logarithm of each sum."""
        return self.largest + self.exp_sum.log()

    def mean(self) -> Tensor:
        """(b,) mean of the values under the softmax of the exponents."""
        return self.weighted / self.exp_sum


def shared_of(tensors: Sequence[Tensor]) -> RunningSum:
    """The sums whose memory these tensors are."""
    return RunningSum(*tensors)
