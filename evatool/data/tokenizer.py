"""CLIP's byte-pair tokenizer: the ids of open_clip's `SimpleTokenizer`, several times faster.

Most of that tokenizer's time goes into looking for text to repair (ftfy), and into dividing and merging the same words
again and again. Here words are remembered together with the finding that they need no repair. Text that may need it is
cleaned as open_clip cleans it.
"""

from __future__ import annotations

import re
import unicodedata
from collections.abc import Callable, Sequence
from functools import cache
from itertools import chain, pairwise, repeat
from typing import Any

import numpy as np
import torch
from torch import Tensor

Tokenizer = Callable[[list[str]], Tensor]
"""Captions to ids (B, L) int64, zero-padded after the end-of-text token."""

MAX_WORDS = 2**18
"""Words of each kind whose ids are remembered; then all of them are forgotten and learned anew. A word takes about 250
bytes, so that the memories of a process stay below 200 MB, with English captions below 100 MB."""

_LONGEST_WORD = 64  # characters; longer ones (addresses, scripts without spaces) rarely come again
_NO_MERGE = 2**31

# B captions, L context length


@cache
def build_tokenizer(context_length: int) -> ClipTokenizer:
    """The ids of open_clip's `SimpleTokenizer` at this context length: longer captions are cut, keeping the
    end-of-text token."""
    return ClipTokenizer(context_length)


class ClipTokenizer:
    """Captions to ids as `open_clip.tokenizer.SimpleTokenizer` with its default cleaning makes them.

    Args:
        context_length: L.
    Attributes:
        sot_token_id, eot_token_id, vocab_size: as open_clip's tokenizer has them.
    """

    def __init__(self, context_length: int = 77) -> None:
        from open_clip.tokenizer import SimpleTokenizer

        reference = SimpleTokenizer(context_length=context_length)
        self.context_length = context_length
        self.sot_token_id: int = reference.sot_token_id
        self.eot_token_id: int = reference.eot_token_id
        self.vocab_size: int = reference.vocab_size
        self.decode: Callable[[Sequence[int]], str] = reference.decode
        self._clean: Callable[[str], str] = reference.clean_fn
        self._pieces = _Pieces(reference)
        self._cleaned = _Cleaned(reference.pat.findall, self._pieces)
        self._sound = _Sound(self._cleaned)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids (B, L) int64, zero-padded after the end-of-text token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        rows = np.zeros((len(texts), length), dtype=np.int64)
        for row, text in zip(rows, texts, strict=True):
            ids = [self.sot_token_id, *self.encode(text), self.eot_token_id]
            if len(ids) > length:
                del ids[length:]
                ids[-1] = self.eot_token_id
            row[: len(ids)] = ids
        return torch.from_numpy(rows)

    def encode(self, text: str) -> list[int]:
        """Ids of one text of any length, without the tokens of its start and end."""
        # No token reaches over a space, nor does a repair of printable text, but for the search for badly decoded text.
        if text.isprintable():
            try:
                return list(chain.from_iterable(map(self._sound.__getitem__, text.split())))
            except _MayNeedRepair as doubt:
                if doubt.is_sound_unless_bad and not self._sound.is_bad(text):
                    ids = self._sound.ids_unless_bad(text.split())
                    if ids is not None:
                        return ids
        return list(chain.from_iterable(map(self._cleaned.__getitem__, self._clean(text).split())))


class _MayNeedRepair(Exception):
    """A word is not known to stay as it is.

    Args:
        is_sound_unless_bad: it does stay as it is unless ftfy takes the text around it for badly decoded.
    """

    def __init__(self, is_sound_unless_bad: bool) -> None:
        self.is_sound_unless_bad = is_sound_unless_bad


class _Sound(dict[str, tuple[int, ...]]):
    """Ids by printable word as it stands in a caption, for words that cleaning only puts into lower case.

    Such a word has no `&` (nothing to unescape), is in normal form C, and ftfy changes none of its characters alone.
    ftfy changes characters together only in text that `ftfy.badness.is_bad` finds; words with characters that its
    pattern names are kept apart.

    Raises on look-up: _MayNeedRepair.
    """

    def __init__(self, cleaned: _Cleaned) -> None:
        super().__init__()
        from ftfy import badness, fix_text

        self._fix_text, self.is_bad = fix_text, badness.is_bad
        self._cleaned = cleaned
        self._unless_bad: dict[str, tuple[int, ...]] = {}
        self._named = _characters_named(badness.BADNESS_RE.pattern)
        self._is_kept: dict[str, bool] = {}  # by character

    def __missing__(self, word: str) -> tuple[int, ...]:
        is_named = not self._named.isdisjoint(word)
        if is_named and word in self._unless_bad:
            raise _MayNeedRepair(True)
        if not self._needs_no_repair(word):
            raise _MayNeedRepair(False)
        ids = self._cleaned[word.lower()]
        _remember(self._unless_bad if is_named else self, word, ids)
        if is_named:
            raise _MayNeedRepair(True)
        return ids

    def ids_unless_bad(self, words: list[str]) -> list[int] | None:
        """Ids of the words of a text that is not badly decoded; None where one may need repair nevertheless."""
        known = self._unless_bad
        try:
            return list(chain.from_iterable(map(known.__getitem__, words)))
        except KeyError:
            pass  # some are learned now, sound ones among them
        for word in words:
            if word not in known:
                if not self._needs_no_repair(word):
                    return None
                _remember(known, word, self._cleaned[word.lower()])
        return list(chain.from_iterable(known[w] if w in known else self._cleaned[w.lower()] for w in words))

    def _needs_no_repair(self, word: str) -> bool:
        if "&" in word:
            return False
        if word.isascii():
            return True
        return unicodedata.is_normalized("NFC", word) and all(map(self._stays, word))

    def _stays(self, character: str) -> bool:
        if character not in self._is_kept:
            self._is_kept[character] = self._fix_text(character) == character
        return self._is_kept[character]


def _characters_named(pattern: str) -> frozenset[str]:
    """Characters outside ASCII that a regular expression names, alone or within a range."""
    named = {character for character in pattern if not character.isascii()}
    for first, last in re.findall("([^\x00-\x7f])-([^\x00-\x7f])", pattern):
        named.update(map(chr, range(ord(first), ord(last) + 1)))
    return frozenset(named)


class _Cleaned(dict[str, tuple[int, ...]]):
    """Ids by word of a cleaned text.

    Args:
        find_pieces: divides a word, as open_clip's pattern does.
        pieces: ids of those.
    """

    def __init__(self, find_pieces: Callable[[str], list[str]], pieces: _Pieces) -> None:
        super().__init__()
        self._find_pieces, self._pieces = find_pieces, pieces

    def __missing__(self, word: str) -> tuple[int, ...]:
        ids = tuple(chain.from_iterable(map(self._pieces.__getitem__, self._find_pieces(word))))
        _remember(self, word, ids)
        return ids


class _Pieces(dict[str, tuple[int, ...]]):
    """Ids by piece of a word: letters, one digit, or other signs.

    Args:
        reference: open_clip's tokenizer, for its vocabulary and merges.
    """

    def __init__(self, reference: Any) -> None:
        super().__init__()
        encoder, letters = reference.encoder, reference.byte_encoder
        self._bytes = [encoder[letters[byte]] for byte in range(256)]
        self._last_bytes = [encoder[letters[byte] + "</w>"] for byte in range(256)]
        self._ranks = {(encoder[a], encoder[b]): rank for (a, b), rank in reference.bpe_ranks.items()}
        self._merged = [encoder[a + b] for a, b in reference.bpe_ranks]
        self._special = {token: (encoder[token],) for token in ("<start_of_text>", "<end_of_text>")}

    def __missing__(self, piece: str) -> tuple[int, ...]:
        ids = self._special.get(piece) or tuple(self._merge(piece.encode("utf-8")))
        _remember(self, piece, ids)
        return ids

    def _merge(self, encoded: bytes) -> list[int]:
        """Byte-pair encoding: of all neighbours, those of the lowest rank are merged, until none has a rank."""
        ids = [self._bytes[byte] for byte in encoded]
        ids[-1] = self._last_bytes[encoded[-1]]
        rank_of = self._ranks.get
        ranks = list(map(rank_of, pairwise(ids), repeat(_NO_MERGE)))  # of each id and the one after it
        while ranks and (lowest := min(ranks)) != _NO_MERGE:
            merged, i = self._merged[lowest], -1
            for _ in range(ranks.count(lowest)):
                try:
                    i = ranks.index(lowest, i + 1)
                except ValueError:  # the last of them overlapped with the one before
                    break
                ids[i : i + 2] = [merged]
                del ranks[i]
                if i > 0:
                    ranks[i - 1] = rank_of((ids[i - 1], merged), _NO_MERGE)
                if i < len(ranks):
                    ranks[i] = rank_of((merged, ids[i + 1]), _NO_MERGE)
        return ids


def _remember(memory: dict[str, tuple[int, ...]], word: str, ids: tuple[int, ...]) -> None:
    if len(memory) >= MAX_WORDS:
        memory.clear()
    if len(word) <= _LONGEST_WORD:
        memory[word] = ids


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
        missing = list(dict.fromkeys(c for c in captions if c not in self._rows))
        if missing:
            if len(self._rows) + len(missing) > self.max_rows:
                self.forget()
                missing = list(dict.fromkeys(captions))
            self._rows.update(zip(missing, self.tokenizer(missing).unbind(0), strict=True))
        return torch.stack([self._rows[c] for c in captions])

    def forget(self) -> None:
        """Learn all captions anew."""
        self._rows.clear()
