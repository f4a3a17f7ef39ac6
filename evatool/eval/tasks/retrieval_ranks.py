"""How many wrong candidates come before the right one, without ever holding the matrix of similarities.

Every similarity is computed once, in float32, a tile at a time, and serves both directions:

                     images ->
                 +-----------+-----------+
        texts    |   tile    |   tile    |   rows beaten    -> rank of each text among images (summed over tiles)
          |      +-----------+-----------+
          v      |   tile    |   tile    |
                 +-----------+-----------+
                 columns beaten           -> rank of each image among texts

    rank of text t  =  #{ wrong image i : <t, i> >= best right score of t }

Whatever lies within the rounding error of the score it is compared with is computed again in float64, so the counts
are those of float64:

    ---- below: not counted ----|-- near: again in float64 --|---- above: counted ---->   score in float32
                           best - error        best        best + error
"""

from __future__ import annotations

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor

from evatool.distributed import collectives

# T texts, I images, P right pairs, E embedding

_ROWS, _COLUMNS = 256, 4096  # of a tile: 4 MiB in float32, which stay in a core's cache
_ROWS_ON_GPU = 2048
_CELLS = 2**21  # products held at once when scores are computed again: 32 MiB in float64
_IN_A_BYTE = 128  # marks; up to 255 would fit, a power of two is added faster
_MANY = 0.02  # share of a tile beyond which doing it again as a whole is cheaper


def retrieval_ranks(
    text: Tensor, image: Tensor, pairs: NDArray[np.int64], *, device: str = "cpu"
) -> tuple[NDArray[np.int32], NDArray[np.int32]]:
    """Wrong candidates that score at least as high as the best right one, for each text and for each image.

    Args:
        text, image: (T, E) and (I, E) float32, at most unit length (cosines); on any device.
        pairs: (P, 2) right pairs (image, text), each once; every text and every image is in one.
        device: where the tiles are computed.
    Returns: (T,) ranks among images, (I,) ranks among texts. Every rank of the job must call it; each does its share.
    """
    by_text = torch.from_numpy(pairs[np.lexsort((pairs[:, 0], pairs[:, 1]))][:, ::-1].copy())  # (text, image)
    text, image = text.to(device), image.to(device)
    best_text, best_image = _best_right(text, image, by_text)
    counts_text = torch.zeros(len(text), dtype=torch.int64, device=device)
    counts_image = torch.zeros(len(image), dtype=torch.int64, device=device)
    num_rows = _ROWS if torch.device(device).type == "cpu" else _ROWS_ON_GPU
    starts = range(0, len(text), num_rows)
    for start in starts[collectives.rank() :: collectives.world_size()]:
        rows = slice(start, min(start + num_rows, len(text)))
        first, last = np.searchsorted(by_text[:, 0].numpy(), [rows.start, rows.stop])
        own = by_text[first:last]
        for left in range(0, len(image), _COLUMNS):
            columns = slice(left, min(left + _COLUMNS, len(image)))
            inside = own[(own[:, 1] >= columns.start) & (own[:, 1] < columns.stop)]
            tile = _Tile(text[rows], image[columns], inside - torch.tensor([rows.start, columns.start]))
            counts_text[rows] += tile.at_least(best_text[rows], 0)
            counts_image[columns] += tile.at_least(best_image[columns], 1)
    counts_text, counts_image = collectives.all_reduce_sum(counts_text), collectives.all_reduce_sum(counts_image)
    return counts_text.cpu().numpy().astype(np.int32), counts_image.cpu().numpy().astype(np.int32)


def _best_right(text: Tensor, image: Tensor, by_text: Tensor) -> tuple[Tensor, Tensor]:
    """Float64 scores of each text's and each image's best right counterpart."""
    pairs = by_text.to(text.device)
    scores = _dots(text, image, pairs[:, 0], pairs[:, 1])
    lowest_text, lowest_image = (scores.new_full((len(rows),), -torch.inf) for rows in (text, image))
    return (
        lowest_text.scatter_reduce(0, pairs[:, 0], scores, reduce="amax"),
        lowest_image.scatter_reduce(0, pairs[:, 1], scores, reduce="amax"),
    )


def _dots(a: Tensor, b: Tensor, rows: Tensor, columns: Tensor) -> Tensor:
    """Float64 dot products of chosen rows; equal rows give equal products, whatever they are computed beside."""
    step = max(1, _CELLS // a.shape[1])
    parts = [
        (a[rows[i : i + step]].double() * b[columns[i : i + step]].double()).sum(dim=1)
        for i in range(0, len(rows), step)
    ]
    return torch.cat(parts) if parts else torch.zeros(0, dtype=torch.float64, device=a.device)


class _Tile:
    """Scores of some texts (rows) and some images (columns), with right pairs out of the count."""

    def __init__(self, text: Tensor, image: Tensor, right: Tensor) -> None:
        self.text, self.image, self.right = text, image, right.to(text.device)
        self.error, self.scores = self._scores(torch.float32)

    def at_least(self, best: Tensor, axis: int) -> Tensor:
        """Wrong candidates with at least the float64 score `best`, for each row (axis 0) or each column (axis 1)."""
        low, high = self._bounds(best, axis)
        counts = _count(self.scores > high, 1 - axis)
        near = _count(self.scores >= low, 1 - axis) - counts
        num_near = int(near.sum())
        if num_near == 0:
            return counts
        if self.error > 1e-12 and num_near > _MANY * self.scores.numel():
            self.error, self.scores = self._scores(torch.float64)
            return self.at_least(best, axis)
        (lines,) = near.nonzero(as_tuple=True)  # a look at few rows or columns instead of at the whole tile
        scores = self.scores.index_select(axis, lines)
        low, high = low.index_select(axis, lines), high.index_select(axis, lines)
        found = list(((scores >= low) & (scores <= high)).nonzero(as_tuple=True))
        found[axis] = lines[found[axis]]
        exact = _dots(self.text, self.image, found[0], found[1]) >= best[found[axis]]
        return counts + torch.bincount(found[axis][exact], minlength=len(best))

    def _bounds(self, best: Tensor, axis: int) -> tuple[Tensor, Tensor]:
        """Between them a computed score does not tell on which side of `best` the true one lies."""
        level = best[:, None] if axis == 0 else best[None]
        return (level - self.error).to(self.scores.dtype), (level + self.error).to(self.scores.dtype)

    def _scores(self, dtype: torch.dtype) -> tuple[float, Tensor]:
        scores = self.text.to(dtype) @ self.image.to(dtype).T
        scores[self.right[:, 0], self.right[:, 1]] = -torch.inf
        # |computed - true| of a dot product of unit vectors is below E u; twice that also covers rounding the level
        return 2 * (self.text.shape[1] + 2) * torch.finfo(dtype).eps, scores


def _count(marks: Tensor, dim: int) -> Tensor:
    """How many marks lie along `dim` of a (R, C) bool tensor, as int64.

    `marks.sum` turns each mark into eight bytes first, which took most of the time of a tile; 128 of them fit a byte:

        1011 ... 1 | 0110 ... 0 | 101       a row of 259 marks
        -- 128 --    -- 128 --   rest
           uint8  +     uint8  + int64      each group summed in a byte, then the groups in int64
    """
    length = marks.shape[dim]
    whole = length - length % _IN_A_BYTE
    rest = marks.narrow(dim, whole, length - whole).sum(dim)
    if not whole:
        return rest
    groups: Tensor = marks.view(torch.uint8).narrow(dim, 0, whole).unflatten(dim, (-1, _IN_A_BYTE))
    return rest + groups.sum(dim + 1, dtype=torch.uint8).sum(dim)
