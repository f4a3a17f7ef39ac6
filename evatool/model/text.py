"""Text towers without work on padding.

A causal tower that pools at the end-of-text token never looks at what stands behind it, so columns beyond a caption
can be left out and nothing changes. Captions of a batch go through the tower in a few groups of like length, each cut
to its longest: web captions fill 15 of 77 columns on average, while the longest of a batch fills nearly all.
Parity: tests/objective/test_text.py.
"""

# B this rank's batch, L text tokens, E embedding

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor, nn
from torch.func import functional_call

from evatool.distributed.collectives import world_size

MAX_GROUPS = 6
"""Passes through the tower a batch. Web captions then leave a fifth to a quarter of padding, against 4 x trimmed."""


def encode_text(
    model: nn.Module, tokens: Tensor, lengths: Tensor | None = None, max_groups: int = MAX_GROUPS
) -> Tensor:
    """Text features (B, E), not normalised, without work on padding where the tower allows; others get all columns.

    Args:
        tokens: (B, L) int64, zero-padded after the end-of-text token, which is the largest id.
        lengths: (B,) tokens of each caption, on the CPU; found out when absent, which makes a GPU wait.
        max_groups: passes through the tower; 1 where ranks with sharded weights have other numbers of captions.
    """
    tower = model.text
    assert isinstance(tower, nn.Module)
    if not is_trimmable(tower):
        whole: Tensor = model.encode_text(tokens)  # type: ignore[operator]
        return whole
    if lengths is None:
        lengths = tokens.argmax(dim=-1).cpu() + 1
    by_length = lengths.argsort(stable=True)
    rising = lengths[by_length].tolist()
    counts = group_sizes(lengths.numpy(), max_groups)
    if world_size() > 1:
        # Sharded weights come together in each pass, so every rank must make as many.
        counts = split_up(counts, min(max_groups, len(lengths)))
    on_device = by_length.to(tokens.device, non_blocking=True)
    longest = [rising[last - 1] for last in np.cumsum(counts).tolist()]
    runs: Sequence[Tensor] = tokens[on_device].split(counts)
    groups = [run[:, :length] for run, length in zip(runs, longest, strict=True)]
    # Embedded in one go: each look-up has a gradient as large as the whole table.
    flat = tower.token_embedding(torch.cat([group.flatten() for group in groups]))  # type: ignore[operator]
    embedded = flat.split([group.numel() for group in groups])
    parts = [_encode_group(tower, group, given) for group, given in zip(groups, embedded, strict=True)]
    return torch.cat(parts)[on_device.argsort()]


def _encode_group(tower: nn.Module, tokens: Tensor, embedded: Tensor) -> Tensor:
    """Features (b, E) of (b, l) tokens whose embeddings (b l, D) are there already."""
    own = tower.token_embedding
    tower.token_embedding = _Given(embedded.view(*tokens.shape, -1))
    try:
        return encode_cut_tokens(tower, tokens)
    finally:
        tower.token_embedding = own


def encode_cut_tokens(tower: nn.Module, tokens: Tensor) -> Tensor:
    """Features (B, E) of tokens (B, L) of any L up to the context, through the tower's own call.

    Args:
        tower: one that `is_trimmable`.
    """
    length = tokens.shape[1]
    # open_clip slices the position table to the text but not the causal mask, so the mask is handed in sliced.
    mask = {"attn_mask": tower.attn_mask[:length, :length]}  # type: ignore[index]
    features: Tensor = functional_call(tower, mask, (tokens,))
    return features


class _Given(nn.Module):
    """Stands in the place of a module whose output is known."""

    def __init__(self, output: Tensor) -> None:
        super().__init__()
        self.output = output

    def forward(self, tokens: Tensor) -> Tensor:
        return self.output


def group_sizes(lengths: NDArray[np.int64], most: int) -> list[int]:
    """Sizes of the groups of captions for which the fewest columns are computed.

    Sorted by length, a group is a run of captions, each padded to the longest of its run; the area under the steps is
    what the tower computes, the area above the captions' own lengths is waste. With two groups and with three:

        columns                #              columns                #
            ^              ....#                  ^               ...#
            |              ..###                  |             ..|###
            |    .........|#####                  |  ......#### |####
            |    ....##########                   |  ..###|#########
            +---------------------> captions      +---------------------> captions

    Dynamic programming over the distinct lengths l_1 < l_2 < ..., with c_k captions of at most length l_k: the fewest
    columns of the captions up to l_e in g groups are

        cost_1(e) = c_e l_e,        cost_g(e) = min over s < e of cost_(g-1)(s) + (c_e - c_s) l_e

    Args:
        lengths: of the captions, in any order.
        most: groups at most.
    Returns: from the shortest captions to the longest; captions of one length stay together.
    """
    longest, counts = np.unique(lengths, return_counts=True)
    ends = counts.cumsum()
    is_earlier = np.tri(len(ends), k=-1, dtype=bool).T  # [s, e]: s < e
    cost, starts = ends * longest, []  # cost_1, and where the last group starts for each turn and end
    for _ in range(1, min(most, len(ends))):
        options = cost[:, None] + (ends - ends[:, None]) * longest
        options = np.where(is_earlier, options, np.iinfo(np.int64).max)
        starts.append(np.where(options.min(0) < cost, options.argmin(0), -1))  # -1: one more group saves nothing
        cost = np.minimum(cost, options.min(0))
    # Back from the last caption: each turn's start is the end of the group before it.
    sizes, end = [], len(ends) - 1
    for start in reversed(starts):
        if start[end] >= 0:
            sizes.append(int(ends[end] - ends[start[end]]))
            end = start[end]
    return [*sizes, int(ends[end])][::-1]


def split_up(sizes: list[int], count: int) -> list[int]:
    """At least `count` groups instead, by halving the largest; no column more is computed."""
    found = list(sizes)
    while len(found) < count and max(found) > 1:
        at = found.index(max(found))
        found[at : at + 1] = [found[at] // 2, found[at] - found[at] // 2]
    return found


def is_trimmable(tower: nn.Module | Tensor) -> bool:
    """True for a causal text tower that pools at the largest id, which open_clip's `TextTransformer` is by default."""
    return (
        getattr(tower, "attn_mask", None) is not None
        and getattr(tower, "pool_type", None) == "argmax"
        and getattr(tower, "cls_emb", None) is None
    )


def fit_tokens(tokens: Tensor, context_length: int) -> Tensor:
    """Tokens (B, L) at another context length, as the tokenizer would have made them.

    Padding is added or dropped; a caption that is too long is cut and ends with its end-of-text token (the largest id).
    """
    missing = context_length - tokens.shape[1]
    if missing >= 0:
        return F.pad(tokens, (0, missing))
    end, cut = tokens.amax(dim=-1), tokens[:, :context_length].clone()
    is_cut = tokens.argmax(dim=-1) >= context_length
    cut[:, -1] = torch.where(is_cut, end, cut[:, -1])
    return cut
