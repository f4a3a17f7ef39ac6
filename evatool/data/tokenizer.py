"""CLIP's byte-pair tokenizer, with memory for the captions it has seen."""

from __future__ import annotations

from collections.abc import Callable, Sequence
from functools import cache

from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]
"""Captions to ids (B, L) int64, zero-padded after the end-of-text token."""


@cache
def build_tokenizer(context_length: int) -> Tokenizer:
    """open_clip's `SimpleTokenizer` at this context length: longer captions are cut, keeping the end-of-text token."""
    from open_clip.tokenizer import SimpleTokenizer

    tokenizer: Tokenizer = SimpleTokenizer(context_length=context_length)
    return tokenizer


class CaptionMemory:
    """Token rows by caption: the BPE runs once a caption as long as the set of captions is small.

    Args:
        tokenizer: captions to ids.
        max_rows: captions remembered (a row of 77 ids is 616 bytes); then everything is forgotten and learned anew.
    """

    def __init__(self, tokenizer: Tokenizer, max_rows: int = 100_000) -> None:
        self.tokenizer, self.max_rows = tokenizer, max_rows
        self._rows: dict[str, Tensor] = {}

    def __call__(self, captions: Sequence[str]) -> Tensor:
        """Ids (B, L) int64."""
        import torch

        missing = list(dict.fromkeys(c for c in captions if c not in self._rows))
        if missing:
            if len(self._rows) + len(missing) > self.max_rows:
                self._rows.clear()
                missing = list(dict.fromkeys(captions))
            self._rows.update(zip(missing, self.tokenizer(missing).unbind(0), strict=True))
        return torch.stack([self._rows[c] for c in captions])
