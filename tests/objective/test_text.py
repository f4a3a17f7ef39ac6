"""Leaving out padding changes nothing, and little of it is left."""

from __future__ import annotations

import itertools

import numpy as np
import pytest
import torch
from hypothesis import given
from hypothesis import strategies as st
from tiny_clip import EOT, make_batch, tiny_clip

from evatool.model.clip import build_clip
from evatool.model.presets import resolve_preset
from evatool.model.text import MAX_GROUPS, encode_text, fit_tokens, group_sizes, split_up


def columns(lengths: list[int], sizes: list[int]) -> int:
    ends = np.cumsum(sizes)
    return sum(size * sorted(lengths)[end - 1] for size, end in zip(sizes, ends, strict=True))


def test_groups_give_the_same_features_and_gradients_in_the_callers_order() -> None:
    model, batch = tiny_clip().double(), make_batch(30)
    assert len(group_sizes(batch.text_lengths.numpy(), 4)) >= 4
    results = []
    for encode in (model.encode_text, lambda tokens: encode_text(model, tokens, batch.text_lengths)):
        output = encode(batch.tokens)
        gradients = torch.autograd.grad((output**3).sum(), list(model.text.parameters()))
        results.append([output.detach(), *gradients])
    for whole, grouped in zip(*results, strict=True):
        torch.testing.assert_close(grouped, whole, rtol=1e-11, atol=1e-13)
    assert model.text.attn_mask.shape == (12, 12), "the tower keeps its mask"


@pytest.mark.parametrize("longest", [3, 16], ids=["short captions", "a caption of full length"])
def test_exact_in_the_real_text_tower_with_lengths_found_out(longest: int) -> None:
    config = resolve_preset("EVA02-CLIP-debug")
    torch.manual_seed(0)
    model = build_clip(config)
    ends = torch.tensor([3, 2, 3, 2, 3, longest]) - 1
    tokens = make_batch(6, context_length=config.context_length).tokens
    tokens = torch.where(torch.arange(config.context_length) < ends[:, None], tokens.clamp(min=1, max=49406), 0)
    tokens[torch.arange(6), ends] = EOT
    with torch.no_grad():
        torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=1e-5, atol=1e-6)


def test_a_tower_that_sees_padding_gets_all_columns() -> None:
    model, tokens = tiny_clip(), make_batch(6).tokens
    model.text.attn_mask = None
    torch.testing.assert_close(encode_text(model, tokens), model.encode_text(tokens), rtol=0, atol=0)


@given(st.lists(st.integers(2, 12), min_size=1, max_size=9), st.integers(1, 4))
def test_groups_are_the_cheapest(lengths: list[int], most: int) -> None:
    sizes = group_sizes(np.array(lengths), most)
    assert sum(sizes) == len(lengths)
    assert 1 <= len(sizes) <= most
    cuts = itertools.chain.from_iterable(
        itertools.combinations(range(1, len(lengths)), k) for k in range(min(most, len(lengths)))
    )
    every_way = ([b - a for a, b in itertools.pairwise([0, *cut, len(lengths)])] for cut in cuts)
    assert columns(lengths, sizes) == min(columns(lengths, way) for way in every_way)


def test_web_captions_leave_little_padding() -> None:
    """Lengths as of web captions, mean 15 of 77: trimming to the longest would leave most of the padding."""
    generator = np.random.default_rng(0)
    lengths = np.clip(generator.lognormal(np.log(11), 0.7, 256), 3, 77).astype(np.int64)
    sizes = group_sizes(lengths, MAX_GROUPS)
    assert columns(lengths.tolist(), sizes) < 1.3 * lengths.sum() < 0.3 * 256 * lengths.max()


def test_tokens_at_another_context_length() -> None:
    tokens = make_batch(6).tokens
    assert torch.equal(fit_tokens(tokens, 20)[:, :12], tokens)
    assert not fit_tokens(tokens, 20)[:, 12:].any()
    cut = fit_tokens(tokens, 4)
    assert cut.shape == (6, 4)
    assert (cut.argmax(-1) + 1).tolist() == make_batch(6).text_lengths.clamp(max=4).tolist()
    assert (cut.amax(-1) == EOT).all()


@pytest.mark.parametrize(("sizes", "expected"), [([8], 6), ([1, 7], 6), ([1, 1, 1], 3), ([9, 1, 1, 1, 1, 1], 6)])
def test_every_rank_makes_as_many_passes(sizes, expected):
    found = split_up(sizes, 6)
    assert len(found) == expected
    assert sum(found) == sum(sizes)
    assert set(np.cumsum(sizes)) <= set(np.cumsum(found)), "no group mixes captions of two others"
