"""Sets that share pictures: each is decoded and encoded once for all of them, and the answers stay what they were."""

from __future__ import annotations

from pathlib import Path

import numpy as np
import pytest
import torch
from torch import Tensor
from toys import ToyClip, classify, encoder_of

from evatool.data.eval.eval_set import EvalSet, open_eval_set
from evatool.eval.encode import Encoding, ImageMemory, image_batches
from evatool.eval.tasks.retrieval_features import encode_pairs

SIDE = 2


class Counted:
    """Encoded pictures (their first bytes are the pixels) to tensors, counted."""

    def __init__(self) -> None:
        self.decoded = 0

    def __call__(self, data: bytes) -> Tensor:
        self.decoded += 1
        return torch.frombuffer(bytearray(data[: 3 * SIDE * SIDE]), dtype=torch.uint8).view(3, SIDE, SIDE).float()


class CountingClip(ToyClip):
    """Counts pictures encoded."""

    encoded = 0

    def encode_image(self, image: Tensor) -> Tensor:
        self.encoded += len(image)
        return super().encode_image(image)


def folder_of(root: Path, images: list[bytes], num_classes: int) -> Path:
    """An image folder whose picture i has class i % num_classes."""
    for i, data in enumerate(images):
        path = root / f"class_{i % num_classes}" / f"{i:03d}.png"
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_bytes(data)
    (root / "zeroshot_classification_templates.txt").write_text("{c}")
    return root


def opened(folder: Path, transform: Counted, **ranks: int) -> EvalSet:
    return open_eval_set(folder, transform=transform, batch_size=4, num_threads=2, **ranks)


@pytest.fixture
def images() -> list[bytes]:
    return [row.tobytes() for row in np.random.default_rng(0).integers(0, 255, (22, 3 * SIDE * SIDE), dtype=np.uint8)]


def model() -> CountingClip:
    return CountingClip(torch.randn(5, 3 * SIDE * SIDE, generator=torch.Generator().manual_seed(0)))


def test_shared_pictures_are_decoded_and_encoded_once(tmp_path: Path, images: list[bytes]) -> None:
    folders = [folder_of(tmp_path / "two", images[:20], 2), folder_of(tmp_path / "three", images, 3)]
    transform, memory, clip = Counted(), ImageMemory(), model()
    shared = [classify(clip, clip.tokenizer, opened(f, transform), memory=memory) for f in folders]
    assert transform.decoded == clip.encoded == len(images)
    assert len(memory) == len(images)
    alone = model()
    for folder, predictions in zip(folders, shared, strict=True):
        expected = classify(alone, alone.tokenizer, opened(folder, Counted()))
        np.testing.assert_array_equal(predictions.top, expected.top)
        np.testing.assert_array_equal(predictions.labels, expected.labels)
        np.testing.assert_allclose(predictions.margin, expected.margin, atol=1e-4)
    assert alone.encoded == 20 + len(images)


def test_a_picture_that_comes_twice_in_a_set_is_encoded_once(tmp_path: Path, images: list[bytes]) -> None:
    folder = folder_of(tmp_path / "set", images[:3] * 4, 2)
    clip = model()
    found = list(
        image_batches(
            clip.encode_image,
            opened(folder, Counted()).loader,
            Encoding(),
            where="set",
            memory=(memory := ImageMemory()),
        )
    )
    assert clip.encoded == len(memory) == 3
    plain = list(image_batches(model().encode_image, opened(folder, Counted()).loader, Encoding(), where="set"))
    for (ours, labels), (expected, expected_labels) in zip(found, plain, strict=True):
        torch.testing.assert_close(ours, expected)
        assert torch.equal(labels, expected_labels)


def test_a_full_memory_keeps_what_it_has_and_answers_stay_right(tmp_path: Path, images: list[bytes]) -> None:
    folder = folder_of(tmp_path / "set", images, 2)
    row = 4 * 3 * SIDE * SIDE
    memory = ImageMemory(limit=6 * row)  # room for one batch of four, not for two
    for again in range(2):
        clip = model()
        plain = classify(clip, clip.tokenizer, opened(folder, Counted()))
        clip = model()
        found = classify(clip, clip.tokenizer, opened(folder, Counted()), memory=memory)
        np.testing.assert_array_equal(found.top, plain.top)
        assert sum(r.nbytes for r in memory.values()) <= 6 * row
        assert clip.encoded == (len(images) if again == 0 else len(images) - len(memory))


def test_ranks_that_work_in_step_run_every_batch(tmp_path: Path, images: list[bytes]) -> None:
    """Weights divided over ranks come together in collectives: no rank may leave a batch out."""
    loader = opened(folder_of(tmp_path / "set", images[:3] * 4, 2), Counted()).loader
    clip, memory = model(), ImageMemory()
    list(image_batches(clip.encode_image, loader, Encoding(lockstep=True), where="set", memory=memory))
    assert clip.encoded == 12
    assert not memory


def test_retrieval_takes_features_of_a_classified_set(tmp_path: Path, images: list[bytes]) -> None:
    first = opened(folder_of(tmp_path / "set", images, 2), Counted())
    memory, clip = ImageMemory(), model()
    classify(clip, clip.tokenizer, first, memory=memory)

    class Captioned:
        name, kind = "pairs", "retrieval"

        class loader:
            @staticmethod
            def unknown(known: ImageMemory):
                for digests, new, labels in first.loader.unknown(known):
                    yield digests, new, [[f"caption {int(label)}"] for label in labels]

    features = encode_pairs(encoder_of(clip, memory=memory), Captioned())  # type: ignore[arg-type]
    assert clip.encoded == len(images) == len(features.image)


def test_a_corrupt_picture_is_still_named(tmp_path: Path, images: list[bytes]) -> None:
    from evatool.core.errors import DataError
    from evatool.data.image.eval_transforms import EvalTransform

    folder = folder_of(tmp_path / "set", images[:2], 2)
    broken = open_eval_set(folder, transform=EvalTransform(8), batch_size=4)
    with pytest.raises(DataError, match=r"class_0/000\.png"):
        classify(model(), model().tokenizer, broken, memory=ImageMemory())
