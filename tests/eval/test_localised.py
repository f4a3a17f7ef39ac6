"""Patches against counting by hand, scenes that are always the same, and a model that knows where things are."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import Any

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import ToyClip, ToySet, encoder_of

from evatool.core.errors import DataError
from evatool.data.eval.scenes import SceneSamples
from evatool.data.image.eval_transforms import EvalTransform
from evatool.data.image.header import encode_png
from evatool.eval.tasks.localization import Localization
from evatool.eval.tasks.patch_scores import patch_labels

# 2 x 2 quadrants of a 8 x 8 mask; classes are ids less one
MASK = torch.zeros(8, 8, dtype=torch.int32)
MASK[:4, :4], MASK[:4, 4:], MASK[4:, 1:4] = 1, 2, 3  # the last quadrant is empty, the third nearly full


class Patches(ToyClip):
    """Pictures hold their own 2 x 2 patch tokens."""

    def patch_tokens(self, image: Tensor) -> Tensor:
        return image.flatten(2).transpose(1, 2).float()


def score(tokens: Tensor) -> Any:
    """`tokens` (4, E): of the quadrants, row by row; texts of class k are the k-th unit vector."""
    images = tokens.T.reshape(1, -1, 2, 2)
    toy = ToySet(kind="localisation", classnames=["a", "b", "c", "d"], loader=[(images, MASK[None])])
    model = Patches(torch.eye(4))
    return Localization().run(encoder_of(model, patch_tokens=model.patch_tokens), toy).predictions


def test_a_model_that_knows_where_things_are_scores_one() -> None:
    found = score(torch.eye(4)[[0, 1, 2, 3]])
    assert found.scores["patch_top1"].tolist() == [1]
    assert found.scores["patch_retrieval@1"].tolist() == [1, 1, 1]
    assert found.scores["segmentation_miou"][0] > 0.95  # bilinear edges between quadrants
    assert found.chance["patch_top1"] == pytest.approx(1 / 3)
    assert found.chance["patch_retrieval@1"] == pytest.approx(1 / 3)


def test_swapped_patches_score_nothing_where_they_are_wrong() -> None:
    found = score(torch.eye(4)[[1, 0, 2, 3]])
    assert found.scores["patch_top1"][0] == pytest.approx(1 / 3, abs=1e-3)
    assert found.scores["patch_retrieval@1"].tolist() == [0, 0, 1]


def test_equal_patches_find_nothing_by_luck() -> None:
    found = score(torch.ones(4, 4))
    assert found.scores["patch_retrieval@1"].tolist() == [0, 0, 0]


def test_patch_classes_equal_counting() -> None:
    masks = torch.randint(0, 3, (5, 12, 12), generator=torch.Generator().manual_seed(0), dtype=torch.int32)
    masks[0, :6, :6] = 2
    labels = patch_labels(masks, 4)
    for i in range(5):
        for p in range(16):
            cell = masks[i, 3 * (p // 4) : 3 * (p // 4) + 3, 3 * (p % 4) : 3 * (p % 4) + 3].flatten().tolist()
            most = max(set(cell), key=cell.count)
            assert labels[i, p] == (most - 1 if 2 * cell.count(most) > 9 else -1)


def test_masks_that_show_nothing_are_refused() -> None:
    toy = ToySet(kind="localisation", classnames=["a"], loader=[(torch.ones(1, 1, 2, 2), torch.zeros(1, 8, 8).int())])
    model = Patches(torch.ones(1, 1))
    with pytest.raises(DataError, match="shows no class"):
        Localization().run(encoder_of(model, patch_tokens=model.patch_tokens), toy)


# ---------------------------------------------------------------------------------------------------------- scenes


@dataclass
class Drawings:
    """Black squares of rising size on white, with a white hole."""

    n: int = 9
    keys: list[str] = field(default_factory=list)
    fingerprint: str = "f"
    stamp: str = "s"

    def __len__(self) -> int:
        return self.n

    def image(self, i: int) -> bytes:
        pixels = np.full((64, 64, 3), 255, np.uint8)
        pixels[8 : 40 + i, 8 : 40 + i] = 0
        pixels[20:30, 20:30] = 255
        return encode_png(pixels)

    def label(self, i: int) -> int:
        return i

    def where(self, i: int) -> str:
        return "0.tar"


def test_scenes_show_each_picture_once_with_its_outline() -> None:
    scenes = SceneSamples(Drawings(), side=2, seed=0)
    assert len(scenes) == 2  # 9 pictures fill two scenes of four
    shown: list[int] = []
    for i in range(2):
        mask = scenes.mask(i)
        assert mask.shape == (128, 128)
        assert mask.dtype == np.int32
        classes = np.unique(mask[mask > 0]) - 1
        shown += classes.tolist()
        for k in classes:
            assert (mask == k + 1).sum() == (32 + k) ** 2  # the hole belongs to the drawing
    assert len(shown) == len(set(shown)) == 8


def test_scenes_are_the_same_every_time_and_others_with_another_seed() -> None:
    one, two, other = (SceneSamples(Drawings(), side=2, seed=s) for s in (0, 0, 1))
    assert one.image(1) == two.image(1)
    assert np.array_equal(one.mask(1), two.mask(1))
    assert one.fingerprint == two.fingerprint != other.fingerprint


def test_too_few_pictures_for_a_scene_are_refused() -> None:
    with pytest.raises(DataError, match="3 pictures do not fill a scene of 2 x 2"):
        SceneSamples(Drawings(3), side=2, seed=0)


@pytest.mark.parametrize("resize", ["shortest", "squash"])
@pytest.mark.parametrize("shape", [(40, 64), (64, 40), (32, 32)], ids=["wide", "tall", "square"])
def test_a_mask_is_cut_as_its_picture_is(shape: tuple[int, int], resize: Any) -> None:
    mask = np.zeros(shape, np.int32)
    mask[shape[0] // 4 : shape[0] // 2, shape[1] // 4 : shape[1] // 2] = 1
    image = encode_png(np.repeat((mask * 255).astype(np.uint8)[:, :, None], 3, axis=2))
    transform = EvalTransform(32, resize)
    assert ((transform(image)[0] > 127).int() - transform.mask(mask)).abs().float().mean() < 0.02
