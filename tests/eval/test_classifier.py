"""Text classifiers: trimmed and sorted batches give what whole ones give, and what is kept is never stale."""

from __future__ import annotations

import os
from pathlib import Path

import pytest
import torch
from torch import Tensor
from toys import ToyClip

from evatool.eval.cache import FingerprintCache, TensorCache
from evatool.eval.encode import Encoding, encode_texts
from evatool.eval.text_classifier import ClassifierMemory, text_classifier
from evatool.inference.loaded_clip import load_clip
from evatool.model.presets import resolve_preset
from evatool.model.text import encode_text

NAMES = ["cat", "a very long name of a thing that fills many tokens", "dog", "traffic light"]
TEMPLATES = ["{c}", "a photo of a {c}.", "an origami {c}, folded by someone who has never seen a {c}"]


class Clip:
    """The debug preset with 77 tokens and random weights, as evaluation calls it; counts the tokens it encodes."""

    def __init__(self) -> None:
        torch.manual_seed(0)
        config = resolve_preset("EVA02-CLIP-debug").to_json()
        config["text_cfg"] = config["text_cfg"] | {"context_length": 77}
        self.clip = load_clip("random weights", config)
        self.tokens = 0

    def encode_image(self, image: Tensor) -> Tensor:
        return self.clip.encode_image(image)

    def encode_text(self, tokens: Tensor) -> Tensor:
        self.tokens += tokens.numel()
        return encode_text(self.clip.model, tokens)


@pytest.fixture(scope="module")
def clip() -> Clip:
    return Clip()


def build(clip: Clip, trim: bool, **extra: object) -> Tensor:
    how = Encoding(trim_text=trim)
    return text_classifier(clip, clip.clip.tokenizer, NAMES, TEMPLATES, how, name="toy", **extra)  # type: ignore[arg-type]


def test_trimmed_prompts_give_the_same_classifier_for_fewer_tokens(clip: Clip) -> None:
    clip.tokens = 0
    whole = build(clip, trim=False)
    of_whole, clip.tokens = clip.tokens, 0
    trimmed = build(clip, trim=True)
    torch.testing.assert_close(trimmed, whole, atol=1e-6, rtol=0)
    assert clip.tokens < 0.5 * of_whole


@pytest.mark.parity
def test_the_classifier_is_clip_benchmarks(clip: Clip) -> None:
    from clip_benchmark.metrics.zeroshot_classification import zero_shot_classifier

    theirs = zero_shot_classifier(clip.clip, clip.clip.tokenizer, NAMES, TEMPLATES, "cpu", amp=False)
    torch.testing.assert_close(build(clip, trim=True), theirs, atol=2e-6, rtol=0)  # measured: 2.4e-7


def test_texts_come_back_in_their_order(clip: Clip) -> None:
    texts = [f"{'word ' * (i % 7)}{i}" for i in range(40)]
    together = encode_texts(clip, clip.clip.tokenizer, texts, Encoding(trim_text=True), where="toy")
    alone = torch.cat([clip.clip.encode_text(clip.clip.tokenizer([t]), normalize=True) for t in texts])
    torch.testing.assert_close(together, alone, atol=1e-6, rtol=0)


def test_a_kept_classifier_is_not_built_again(clip: Clip, tmp_path: Path) -> None:
    store = TensorCache(tmp_path, "classifiers", "weights-a", "tokenizer")
    first = build(clip, trim=True, stores=[store])
    clip.tokens = 0
    assert torch.equal(build(clip, trim=True, stores=[ClassifierMemory(), store]), first)
    assert clip.tokens == 0


@pytest.mark.parametrize("origin", [("weights-b", "tokenizer"), ("weights-a", "other")], ids=["weights", "tokenizer"])
def test_other_weights_or_another_tokenizer_never_meet_it(clip: Clip, tmp_path: Path, origin: tuple[str, str]) -> None:
    build(clip, trim=True, stores=[TensorCache(tmp_path, "classifiers", "weights-a", "tokenizer")])
    clip.tokens = 0
    build(clip, trim=True, stores=[TensorCache(tmp_path, "classifiers", *origin)])
    assert clip.tokens > 0


def test_other_prompts_are_built(clip: Clip, tmp_path: Path) -> None:
    store = TensorCache(tmp_path, "classifiers", "w", "t")
    build(clip, trim=True, stores=[store])
    other = text_classifier(
        clip, clip.clip.tokenizer, NAMES[::-1], TEMPLATES, Encoding(trim_text=True), name="toy", stores=[store]
    )
    torch.testing.assert_close(other.flip(1), build(clip, trim=True), atol=1e-6, rtol=0)


def test_a_damaged_file_of_the_cache_is_built_again(clip: Clip, tmp_path: Path) -> None:
    store = TensorCache(tmp_path, "classifiers", "w", "t")
    first = build(clip, trim=True, stores=[store])
    (path,) = tmp_path.rglob("*.npy")
    content = bytearray(path.read_bytes())
    content[-3] ^= 1
    path.write_bytes(content)
    assert store.get("any") is None
    assert torch.equal(build(clip, trim=True, stores=[store]), first)
    assert path.read_bytes() != bytes(content)


def test_a_fingerprint_is_remembered_until_its_file_is_written(tmp_path: Path) -> None:
    weights = tmp_path / "model.safetensors"
    weights.write_bytes(b"one")
    cache = FingerprintCache(tmp_path / "cache")
    cache.put("print of one", [weights], "fp32")
    assert cache.get([weights], "fp32") == "print of one"
    assert cache.get([weights], "bf16") is None
    os.utime(weights, ns=(1, 1))
    assert cache.get([weights], "fp32") is None
    weights.write_bytes(b"longer")
    assert cache.get([weights], "fp32") is None


def test_a_store_of_a_toy_counts_what_is_encoded() -> None:
    model = ToyClip(torch.randn(12, 4, generator=torch.Generator().manual_seed(0)))
    memory = ClassifierMemory()
    for _ in range(2):
        text_classifier(model, model.tokenizer, NAMES, TEMPLATES, Encoding(), name="toy", stores=[memory])
    assert model.texts_encoded == 12
