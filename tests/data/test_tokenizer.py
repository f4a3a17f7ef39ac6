from __future__ import annotations

import pytest
import torch

from evatool.data.tokenizer import CaptionMemory, build_tokenizer

CAPTIONS = [
    "penguin",
    "a drawing of penguin",
    "penguin",
    "Jack-O-Lantern, ghost",
    "  spaced   out ",
    "über größe 猫",
    "",
]


@pytest.mark.parity
@pytest.mark.parametrize("context_length", [16, 77])
def test_ids_are_open_clips(context_length: int) -> None:
    from open_clip.tokenizer import SimpleTokenizer

    expected = SimpleTokenizer(context_length=context_length)(CAPTIONS)
    memory = CaptionMemory(build_tokenizer(context_length))
    for _ in range(2):  # learned, then remembered
        assert torch.equal(memory(CAPTIONS), expected)
    assert expected.dtype == torch.int64


def test_long_captions_keep_the_end_of_text_token() -> None:
    (row,) = build_tokenizer(8)(["one two three four five six seven eight nine ten"])
    assert row[0] == 49406
    assert row[-1] == 49407


def test_memory_is_bounded() -> None:
    memory = CaptionMemory(build_tokenizer(8), max_rows=3)
    expected = build_tokenizer(8)(["a", "b", "c", "d"])
    assert torch.equal(memory(["a", "b"]), expected[:2])
    assert torch.equal(memory(["a", "c", "d"]), expected[[0, 2, 3]])
    assert len(memory._rows) <= 3
