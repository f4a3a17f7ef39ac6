"""Masks for masked image modelling: blocks, or single patches anywhere.

A block of area a (drawn from the smallest block up to what is still to be masked) and aspect r (log-uniform between
0.3 and 1 / 0.3) has height round(sqrt(a r)) and width round(sqrt(a / r)), and may overlap those before it:

    . . . . . . . .      Blocks are added until the target is reached or ten draws in a row fail. A draw fails where
    . 1 1 1 . . . .      a side is as long as the grid's, where all of the block is masked already, or where it would
    . 1 1 1 2 2 . .      mask more patches than are still to be masked. So a mask never exceeds its target.
    . . . 2 2 2 . .      (2 adds five patches: the sixth was masked by 1.)

Source: BEiT's generator of blocks as EVA runs it (docs/reference/eva.md#masks; EVA-02/asuka/masking_generator.py), with
the grid as parameter; MAE's random patches for EVA-L (docs/reference/eva.md#mim-student).
"""

from __future__ import annotations

import math
import random
from dataclasses import dataclass
from typing import Literal, Protocol

import numpy as np

from evatool.core.errors import RecipeError

_LOG_ASPECT = math.log(1 / 0.3)
_TRIES_PER_BLOCK = 10
_TRIES_PER_MASK = 100


@dataclass(frozen=True)
class MaskSpec:
    """Which masks to draw: for a `grid` (rows, columns) of patches, with the recipe's shares of it."""

    grid: tuple[int, int]
    mask_ratio: float
    min_block_fraction: float
    masking: Literal["blocks", "random"] = "blocks"

    def generator(self) -> MaskGenerator:
        """The generator for this grid: target round(mask_ratio N), smallest block round(min_block_fraction N)."""
        num_patches = self.grid[0] * self.grid[1]
        num_masked = max(1, round(self.mask_ratio * num_patches))
        if self.masking == "random":
            return RandomMaskGenerator(num_patches, num_masked)
        return BlockMaskGenerator(self.grid, num_masked, max(1, round(self.min_block_fraction * num_patches)))


class MaskGenerator(Protocol):
    """Draws masks of at most `num_masked` patches, bool (N,), row by row, True where masked."""

    num_masked: int

    def __call__(self, rng: random.Random) -> np.ndarray: ...


class RandomMaskGenerator:
    """Draws exactly `num_masked` patches, each set of them with the same chance.

    Raises: RecipeError where no patch would be left, or none masked.
    """

    def __init__(self, num_patches: int, num_masked: int) -> None:
        self.num_patches, self.num_masked = num_patches, num_masked
        if not 1 <= num_masked < num_patches:
            raise RecipeError(
                f"{num_masked} of {num_patches} patches masked: at least one must be masked and one visible",
                where="objective.mask_ratio and the model's patch grid",
                fix="lower objective.mask_ratio, or use smaller patches or larger pictures",
            )

    def __call__(self, rng: random.Random) -> np.ndarray:
        """A mask as bool (N,), row by row, True where masked."""
        mask = np.zeros(self.num_patches, dtype=bool)
        mask[rng.sample(range(self.num_patches), self.num_masked)] = True
        return mask


class BlockMaskGenerator:
    """Draws masks made of rectangles. At 16x16, target 105 and smallest block 16 it is the released generator.

    A mask has at most `num_masked` patches, and how many differs from one to the next; at least one. (The released
    loop can end with none where its ten draws all fail; such a mask is drawn again here, because a picture without
    masked patches has no loss.)

    Args:
        grid: patches (rows, columns).
        num_masked: target, reached at most.
        min_block: smallest area drawn for a block. The side lengths are rounded, so a block can be smaller.
    Raises: RecipeError where no block can ever be placed.
    """

    def __init__(self, grid: tuple[int, int], num_masked: int, min_block: int) -> None:
        self.grid, self.num_masked, self.min_block = grid, num_masked, min_block
        rows, columns = grid
        problem = None
        if min(rows, columns) < 2:
            problem = f"a grid of {rows} x {columns} patches has no room for a block: both sides must be at least 2"
        elif not 1 <= num_masked < rows * columns:
            problem = f"{num_masked} of {rows * columns} patches masked: at least one must be masked and one visible"
        elif not 1 <= min_block <= num_masked:
            problem = f"the smallest block of {min_block} patches does not fit the {num_masked} that may be masked"
        if problem:
            raise RecipeError(
                f"no block mask can be drawn: {problem}",
                where="objective.mask_ratio, objective.min_block_fraction and the model's patch grid",
                fix="use smaller patches or larger pictures, or lower the two shares",
            )

    def __call__(self, rng: random.Random) -> np.ndarray:
        """A mask as bool (N,), row by row, True where masked."""
        for _ in range(_TRIES_PER_MASK):
            mask = self._draw(rng)
            if mask.any():
                return mask.reshape(-1)
        raise RecipeError(
            f"no block fitted a grid of {self.grid[0]} x {self.grid[1]} patches in {_TRIES_PER_MASK} masks",
            where="objective.mask_ratio and objective.min_block_fraction",
            expected=f"blocks of at least {self.min_block} patches with both sides shorter than the grid's",
            fix="lower objective.min_block_fraction",
        )

    def _draw(self, rng: random.Random) -> np.ndarray:
        mask = np.zeros(self.grid, dtype=bool)
        count = 0
        while count < self.num_masked:
            added = self._add_block(mask, self.num_masked - count, rng)
            if added == 0:
                break
            count += added
        return mask

    def _add_block(self, mask: np.ndarray, room: int, rng: random.Random) -> int:
        """Mask one block of at most `room` new patches in place; how many are new, 0 after ten failed draws."""
        rows, columns = self.grid
        for _ in range(_TRIES_PER_BLOCK):
            # With room < min_block the bounds are reversed, as in the release: uniform(a, b) then draws from [b, a].
            area = rng.uniform(self.min_block, room)
            aspect = math.exp(rng.uniform(-_LOG_ASPECT, _LOG_ASPECT))
            height = round(math.sqrt(area * aspect))
            width = round(math.sqrt(area / aspect))
            if not (height < rows and width < columns):  # strict, as in the release: never a full side
                continue
            top = rng.randint(0, rows - height)
            left = rng.randint(0, columns - width)
            block = mask[top : top + height, left : left + width]
            new = block.size - int(np.count_nonzero(block))
            if 0 < new <= room:
                block[:] = True
                return new
        return 0
