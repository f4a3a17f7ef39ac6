"""CLIP's byte-pair tokenizer: the ids of open_clip's `SimpleTokenizer`, several times faster.

Why not that tokenizer: it takes 88.0 us a caption where this one takes 8.3 (docs/benchmarks.md). Most of
its time goes into looking for text to repair (ftfy), and into dividing and merging the same words
again and again. Here words are remembered together with the finding that they need no repair. Text that may need it is
cleaned as open_clip cleans it.
"""

from __future__ import annotations

import hashlib
import re
import unicodedata
from array import array
from collections.abc import Callable, Sequence
from functools import cache
from itertools import pairwise, repeat
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
_ID_BYTES = np.dtype(np.int64).itemsize
_JOINERS = dict.fromkeys(map(ord, "\u200b\u200c\u200d"))  # within words of many scripts; cleaning keeps them

_LOCAL_BADNESS = "9dcc0f2ac90d9ae3c85eb7b9b2c0b8a8e8126153847c2b30c91a0bb263f3b8c4"
"""SHA-256 of the pattern by which ftfy 6.3 knows badly decoded text. In text whose only white space are spaces a match
holds letters of one word, the spaces beside it and, before a lone `Ã` or `Â`, the last letter of the word before.
The one exception begins with `_SPLIT_MOJIBAKE`. For another pattern nothing of the kind is known: then whole captions
are searched."""

_SPLIT_MOJIBAKE = "\u0413\u045e\u0412\u0402\u0412"

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
        sot_token_id, eot_token_id, vocab_size: those of open_clip's tokenizer.
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
        self._sot, self._eot = _packed([self.sot_token_id]), _packed([self.eot_token_id])
        self._pieces = _Pieces(reference)
        self._sound = _Sound(self._pieces.encode)

    def __call__(self, texts: str | Sequence[str], context_length: int | None = None) -> Tensor:
        """Ids (B, L) int64, zero-padded after the end-of-text token."""
        texts = [texts] if isinstance(texts, str) else texts
        length = context_length or self.context_length
        num_bytes = _ID_BYTES * length
        rows = bytearray()
        for text in texts:
            row = self._sot + self._encode(text) + self._eot
            if len(row) > num_bytes:
                row = row[: num_bytes - _ID_BYTES] + self._eot
            rows += row.ljust(num_bytes, b"\0")
        return torch.from_numpy(np.ndarray((len(texts), length), np.int64, rows))

    def encode(self, text: str) -> list[int]:
        """Ids of one text of any length, without the tokens of its start and end."""
        ids: list[int] = np.frombuffer(self._encode(text), np.int64).tolist()
        return ids

    def _encode(self, text: str) -> bytes:
        # No token reaches over a space, nor does a repair of printable text that is nowhere suspicious.
        if text.isprintable() or text.translate(_JOINERS).isprintable():
            try:
                return b"".join(map(self._sound.__getitem__, text.split()))
            except _MayNeedRepair:
                pass
        return self._pieces.encode(self._clean(text))


def _packed(ids: Sequence[int]) -> bytes:
    return array("q", ids).tobytes()  # as numpy's int64 has them


class _MayNeedRepair(Exception):
    """A word is not known to be repaired alone as it is among others."""


class _Sound(dict[str, bytes]):
    """Ids by word as it stands in a caption, for words that open_clip's cleaning treats alone as among others.

    Such a word has no `&` (nothing to unescape), is in normal form C before and after what ftfy does to each of its
    characters, and does not look badly decoded beside any other word: then ftfy repairs characters one by one.

    Args:
        encode: ids of a cleaned text.
    Raises on look-up: _MayNeedRepair.
    """

    def __init__(self, encode: Callable[[str], bytes]) -> None:
        super().__init__()
        from ftfy import badness

        self._encode, self._is_bad = encode, badness.is_bad
        self._is_local = hashlib.sha256(badness.BADNESS_RE.pattern.encode()).hexdigest() == _LOCAL_BADNESS
        self._named = _characters_named(badness.BADNESS_RE.pattern)
        self._fixed = _Fixed()

    def __missing__(self, word: str) -> bytes:
        fixed = word
        if word.isascii():
            if "&" in word:
                raise _MayNeedRepair
        else:
            fixed = word.translate(self._fixed)
            if not self._is_sound(word) or (fixed != word and not self._is_final(fixed)):
                raise _MayNeedRepair
        ids = self._encode(fixed.lower())
        _remember(self, word, ids)
        return ids

    def _is_final(self, word: str) -> bool:
        """True if a second pass changes nothing, and the word is still one."""
        return self._is_sound(word) and " " not in word and word.translate(self._fixed) == word

    def _is_sound(self, word: str) -> bool:
        if "&" in word or not unicodedata.is_normalized("NFC", word):
            return False
        if self._named.isdisjoint(word):
            return True
        # With what other words can add to a match: see `_LOCAL_BADNESS`.
        return self._is_local and _SPLIT_MOJIBAKE not in word and not self._is_bad(f"a {word} ")


def _characters_named(pattern: str) -> frozenset[str]:
    """Characters outside ASCII that a regular expression names, alone or within a range."""
    named = {character for character in pattern if not character.isascii()}
    for first, last in re.findall("([^\x00-\x7f])-([^\x00-\x7f])", pattern):
        named.update(map(chr, range(ord(first), ord(last) + 1)))
    return frozenset(named)


class _Fixed(dict[int, str]):
    """Each character as ftfy leaves it after one pass of its steps, in text where nothing looks badly decoded."""

    def __init__(self) -> None:
        super().__init__()
        from ftfy import fixes

        self._steps = (
            fixes.fix_latin_ligatures,
            fixes.fix_character_width,
            fixes.uncurl_quotes,
            fixes.remove_control_chars,
        )

    def __missing__(self, codepoint: int) -> str:
        fixed = chr(codepoint)
        for step in self._steps:
            fixed = step(fixed)
        self[codepoint] = fixed
        return fixed


class _Pieces(dict[str, bytes]):
    """Ids by piece of a word: letters, one digit, or other signs.

    Args:
        reference: open_clip's tokenizer, for its pattern, vocabulary and merges.
    """

    def __init__(self, reference: Any) -> None:
        super().__init__()
        encoder, letters = reference.encoder, reference.byte_encoder
        self._find_pieces: Callable[[str], list[str]] = reference.pat.findall
        self._bytes = [encoder[letters[byte]] for byte in range(256)]
        self._last_bytes = [encoder[letters[byte] + "</w>"] for byte in range(256)]
        self._ranks = {(encoder[a], encoder[b]): rank for (a, b), rank in reference.bpe_ranks.items()}
        self._merged = [encoder[a + b] for a, b in reference.bpe_ranks]
        self._special = {token: _packed([encoder[token]]) for token in ("<start_of_text>", "<end_of_text>")}

    def encode(self, text: str) -> bytes:
        """Ids of a cleaned text."""
        return b"".join(map(self.__getitem__, self._find_pieces(text)))

    def __missing__(self, piece: str) -> bytes:
        ids = self._special.get(piece) or _packed(self._merge(piece.encode("utf-8")))
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


def _remember(memory: dict[str, bytes], word: str, ids: bytes) -> None:
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
