"""Similarities of the global batch, one tile at a time: the common part of all losses between samples.

Neither the N x N similarities nor a gathered copy of the features is ever held. This rank's images meet the captions
of one rank after another (`around_ring`), and of those one tile at a time; what is known about a caption so far travels
with it. The backward pass computes each tile anew, so a tile costs four matrix products in all, against six where
every rank scores its own rows in both directions.

    captions of     rank 0    rank 1    rank 2          turn 0: rank r meets its own captions (the diagonal)
    images 0      [ turn 0 ][ turn 2 ][ turn 1 ]        after each turn the captions, and with them their running
    images 1      [ turn 1 ][ turn 0 ][ turn 2 ]        sums or gradients, move on to the next rank; after W turns
    images 2      [ turn 2 ][ turn 1 ][ turn 0 ]        they are home again, with what all images had to say

    one block (b x b) in tiles (t x t):   +---+---+-+     row sums stay with this rank's images, column sums travel
                                          |   |   | |     with the captions; the last row and column of tiles may be
                                          +---+---+-+     smaller
                                          |   |   | |
                                          +---+---+-+

Source: Inf-CL (arXiv 2410.17243), tiled softmax; SigLIP (arXiv 2303.15343, section 3.3), captions round a ring.
"""

# b this rank's samples, W ranks, N = W b the global batch, E embedding, t side of a tile

from __future__ import annotations

from collections.abc import Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass

import torch
from torch import Tensor

from evatool.distributed.collectives import all_gather_rows, rank
from evatool.recipe.schema.objective import TILE_SIDE


def tile_side(device: torch.device) -> int:
    """Rows and columns of a tile on this kind of device."""
    return TILE_SIDE.get(device.type, TILE_SIDE["cpu"])


def spans(size: int, side: int) -> list[slice]:
    """`size` rows or columns cut into pieces of `side`; the last may be shorter."""
    return [slice(start, min(start + side, size)) for start in range(0, size, side)]


def tiles(size: int, side: int) -> Iterator[tuple[slice, slice]]:
    """Rows and columns of every tile of a (size, size) block, row by row; those on its diagonal are square."""
    for rows in spans(size, side):
        for columns in spans(size, side):
            yield rows, columns


def exact(device: torch.device) -> AbstractContextManager[object]:
    """No autocast: similarities in bf16 would be off by 0.4 at a scale of 100."""
    return torch.autocast(device.type, enabled=False)


# -------------------------------------------------------------------------------------------------------- positives


@dataclass
class Positives:
    """Which captions are right for which pictures: the own one, or with `caption_id` every equal one.

    Attributes:
        caption_id: (b,) int64 of this rank's samples; None: only the own caption is right.
        everyone: (N,) the ids of all ranks.
        counts: (b,) how many captions of the global batch are right for each of this rank's samples.
    """

    caption_id: Tensor | None = None
    everyone: Tensor | None = None
    counts: Tensor | None = None

    @property
    def ids(self) -> list[Tensor]:
        """The tensors that travel with a block of captions to tell whose they are; none if only partners are right."""
        return [] if self.caption_id is None else [self.caption_id]

    def equal(self, ids: Tensor, rows: slice, columns: slice) -> Tensor:
        """(t, t) bool of one tile, between this rank's samples and captions with `ids`."""
        assert self.caption_id is not None
        return self.caption_id[rows, None] == ids[None, columns]

    def shares(self, ids: Tensor, rows: slice, columns: slice, dtype: torch.dtype) -> Tensor:
        """(t, t) each pair's share in the target of its row, which is its share in that of its column too."""
        assert self.counts is not None
        return self.equal(ids, rows, columns).to(dtype).div_(self.counts[rows, None])

    def are_hit(self, best: Tensor) -> Tensor:
        """True where the best of the global batch for a sample of this rank is right: (b,) int64 -> (b,) bool."""
        if self.caption_id is None or self.everyone is None:
            return best == torch.arange(len(best), device=best.device) + rank() * len(best)
        return self.everyone[best.clamp(max=len(self.everyone) - 1)] == self.caption_id


def find_positives(caption_id: Tensor | None) -> Positives:
    """The positives of this rank's samples; all ranks must call it, each with ids or each without.

    Args:
        caption_id: (b,) int64, equal if and only if the captions are; None: only the own caption is right.
    """
    if caption_id is None:
        return Positives()
    everyone = all_gather_rows(caption_id)
    in_order = everyone.sort().values
    counts = torch.searchsorted(in_order, caption_id, right=True) - torch.searchsorted(in_order, caption_id)
    return Positives(caption_id, everyone, counts)


# ------------------------------------------------------------------------------------------------------------- best


@dataclass
class Best:
    """The best partner so far of each of b samples, across tiles and ranks; equally good ones: the first of the batch.

    Attributes:
        value: (b,) its similarity.
        index: (b,) its position in the global batch.
    """

    value: Tensor
    index: Tensor

    @classmethod
    def none_yet(cls, features: Tensor) -> Best:
        """The state before any tile, for (b, E) features."""
        value = features.new_full(features.shape[:1], -torch.inf)
        return cls(value, torch.full_like(value, torch.iinfo(torch.int64).max, dtype=torch.int64))

    @property
    def tensors(self) -> list[Tensor]:
        """Value and index; they travel from rank to rank."""
        return [self.value, self.index]

    def see(self, tile: Tensor, dim: int, span: slice, first: int) -> None:
        """Take in a tile.

        Args:
            dim: the tile's axis along which the partners lie.
            span: which of the b samples lie along the other.
            first: position of the first partner in the global batch.
        """
        value, index = tile.max(dim=dim)
        index += first
        old_value, old_index = self.value[span], self.index[span]
        is_better = (value > old_value) | ((value == old_value) & (index < old_index))
        self.index[span] = torch.where(is_better, index, old_index)
        self.value[span] = torch.maximum(value, old_value)


def accuracy(best: Best, positives: Positives) -> Tensor:
    """Share of this rank's samples whose best partner is right."""
    return positives.are_hit(best.index).float().mean()


def own_diagonal(owner: int, rows: slice, columns: slice) -> bool:
    """True for a tile that holds, on its diagonal, this rank's samples with their own partners."""
    return owner == rank() and rows == columns
