from __future__ import annotations

import math
import random

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.core.errors import RecipeError
from evatool.data.train import shuffle
from evatool.data.train.masking import BlockMaskGenerator, MaskSpec


def released_mask(rng: random.Random, rows: int, columns: int, target: int, min_block: int) -> list[list[int]]:
    """The released generator written out from its description (docs/reference/eva.md#masks), cell by cell, without
    numpy.
    """
    mask = [[0] * columns for _ in range(rows)]
    count = 0
    while count < target:
        room = min(target - count, target)
        delta = 0
        for _ in range(10):
            area = rng.uniform(min_block, room)
            aspect = math.exp(rng.uniform(math.log(0.3), math.log(1 / 0.3)))
            h, w = round(math.sqrt(area * aspect)), round(math.sqrt(area / aspect))
            if h < rows and w < columns:
                top, left = rng.randint(0, rows - h), rng.randint(0, columns - w)
                cells = [(i, j) for i in range(top, top + h) for j in range(left, left + w)]
                new = [(i, j) for i, j in cells if not mask[i][j]]
                if 0 < len(new) <= room:
                    for i, j in new:
                        mask[i][j] = 1
                    delta = len(new)
                    break
        if delta == 0:
            break
        count += delta
    return mask


@pytest.mark.parity
def test_16x16_is_the_released_generator() -> None:
    generator = MaskSpec((16, 16), 0.41, 0.0625).generator()
    assert (generator.num_masked, generator.min_block) == (105, 16)
    ours, theirs = random.Random(7), random.Random(7)
    counts = []
    for _ in range(300):
        mask = generator(ours)
        assert mask.reshape(16, 16).tolist() == released_mask(theirs, 16, 16, 105, 16)
        counts.append(int(mask.sum()))
    assert ours.getstate() == theirs.getstate()
    # At most 105 and not always: the released generator's own habit.
    assert max(counts) == 105
    assert len(set(counts)) > 3


@pytest.mark.parity
def test_masks_keyed_by_sample_have_the_released_distribution() -> None:
    """A loader draws each mask from a generator of its own, the release all from one: the distribution is the same."""
    num = 4000
    generator = MaskSpec((16, 16), 0.41, 0.0625).generator()
    keys = shuffle.sample_keys(3, np.zeros(num, dtype=np.int64), np.arange(num))
    seeds = shuffle.random_bits(keys, shuffle.STREAM_MASK, 1)[:, 0].tolist()
    ours = np.stack([generator(random.Random(seed)) for seed in seeds])
    one = random.Random(11)
    theirs = np.stack([np.array(released_mask(one, 16, 16, 105, 16), dtype=bool).reshape(-1) for _ in range(num)])
    counts, released = ours.sum(1), theirs.sum(1)
    assert counts.max() == released.max() == 105
    assert len(set(counts.tolist())) > 5
    # Kolmogorov-Smirnov: two samples of 4,000 of one distribution differ by more than 0.0436 once in a thousand times.
    grid = np.arange(106)
    apart = abs((counts[:, None] <= grid).mean(0) - (released[:, None] <= grid).mean(0)).max()
    assert apart < 0.0436
    # How often each patch is masked: standard error of a difference 0.011, 256 patches.
    assert abs(ours.mean(0) - theirs.mean(0)).max() < 0.05
    assert abs(counts.mean() - released.mean()) < 0.3
    # Neighbours go together alike: the share of equal pairs along each row.
    together = [
        float((m.reshape(-1, 16, 16)[:, :, 1:] == m.reshape(-1, 16, 16)[:, :, :-1]).mean()) for m in (ours, theirs)
    ]
    assert abs(together[0] - together[1]) < 0.01


@pytest.mark.parity
@pytest.mark.parametrize("grid", [(4, 4), (6, 6), (14, 14), (3, 7)], ids=str)
def test_other_grids_follow_the_same_loop(grid: tuple[int, int]) -> None:
    generator = MaskSpec(grid, 0.41, 0.0625).generator()
    for seed in range(100):
        theirs = released_mask(random.Random(seed), *grid, generator.num_masked, generator.min_block)
        if np.any(theirs):  # an empty mask is drawn again, which the release does not do
            assert generator(random.Random(seed)).reshape(grid).tolist() == theirs


@given(
    rows=st.integers(2, 20),
    columns=st.integers(2, 20),
    ratio=st.floats(0.05, 0.9),
    block=st.floats(0.001, 0.3),
    seed=st.integers(0, 2**32),
)
@settings(max_examples=200, deadline=None)
def test_masks_are_never_empty_and_never_above_the_target(
    rows: int, columns: int, ratio: float, block: float, seed: int
) -> None:
    spec = MaskSpec((rows, columns), ratio, block)
    target, smallest = max(1, round(ratio * rows * columns)), max(1, round(block * rows * columns))
    if smallest > target or target == rows * columns:
        with pytest.raises(RecipeError, match="no block mask can be drawn"):
            spec.generator()
        return
    try:
        mask = spec.generator()(random.Random(seed))
    except RecipeError:
        # Refused only where a block hardly fits with both of its sides short of the grid's.
        assert min(rows, columns) < 2 * math.sqrt(smallest)
        return
    assert mask.shape == (rows * columns,)
    assert mask.dtype == np.bool_
    assert 1 <= mask.sum() <= target
    assert not mask.all()


def test_a_seed_gives_one_mask() -> None:
    generator = BlockMaskGenerator((6, 6), 15, 2)
    assert (generator(random.Random(3)) == generator(random.Random(3))).all()
    assert len({generator(random.Random(s)).tobytes() for s in range(50)}) > 40


@pytest.mark.parametrize(
    ("grid", "num_masked", "min_block"),
    [((1, 1), 1, 1), ((1, 9), 3, 1), ((4, 4), 16, 1), ((4, 4), 0, 1), ((4, 4), 3, 5)],
    ids=["one-patch", "one-row", "all", "none", "block-above-target"],
)
def test_impossible_grids_are_refused(grid: tuple[int, int], num_masked: int, min_block: int) -> None:
    with pytest.raises(RecipeError, match="no block mask can be drawn"):
        BlockMaskGenerator(grid, num_masked, min_block)


def test_a_block_that_never_fits_is_an_error_and_not_an_empty_mask() -> None:
    generator = BlockMaskGenerator((2, 2), 3, 3)  # sides must be 1: one patch, rounded from an area of 3, never
    with pytest.raises(RecipeError, match="no block fitted"):
        generator(random.Random(0))


def test_random_masks_hide_equally_many_patches_each_equally_often() -> None:
    """EVA-L's 192 of 256; every patch within 5 standard deviations of its chance."""
    generator = MaskSpec((16, 16), 0.75, 0.0625, "random").generator()
    masks = np.stack([generator(random.Random(seed)) for seed in range(2000)])
    assert generator.num_masked == 192
    assert (masks.sum(axis=1) == 192).all()
    assert np.abs(masks.mean(axis=0) - 0.75).max() < 5 * (0.75 * 0.25 / 2000) ** 0.5
    assert (generator(random.Random(3)) == masks[3]).all()
    with pytest.raises(RecipeError, match="4 of 4 patches"):
        MaskSpec((2, 2), 0.9, 0.0625, "random").generator()
