"""Peak memory of evaluation beyond model and features: retrieval tiles, and classification without kept logits.

    python tests/benchmarks/eval_memory.py [--images 100000] [--texts 500000] [--width 16] [--rows 108754 --classes 397]

`--rows 0` or `--images 0` leaves one of them out. Features are random. Gates: peaks below `--limit` MB (1,000) beyond
the features; ranks of 64 texts and of 64 pictures equal float64.
"""

from __future__ import annotations

import argparse
import resource
import time

import numpy as np
import torch

from evatool.eval.encoder import SetEncoder
from evatool.eval.tasks.retrieval_ranks import retrieval_ranks
from evatool.eval.tasks.zero_shot import ZeroShotClassification

CHECKED = 64


class Features:
    """A model whose pictures are their own features, and whose class k has the k-th row of `text`."""

    def __init__(self, text: torch.Tensor) -> None:
        self.text = text

    def encode_image(self, image: torch.Tensor) -> torch.Tensor:
        return image.flatten(1)

    def encode_text(self, tokens: torch.Tensor) -> torch.Tensor:
        return self.text[tokens[:, 0]]


class Rows:
    """A set of random pictures, made batch by batch."""

    name, kind, templates = "rows", "classification", ["{c}"]

    def __init__(self, rows: int, classes: int, width: int) -> None:
        self.rows, self.width = rows, width
        self.classnames = [str(k) for k in range(classes)]

    @property
    def loader(self):
        g = torch.Generator().manual_seed(0)
        for start in range(0, self.rows, 256):
            size = min(256, self.rows - start)
            labels = torch.randint(len(self.classnames), (size,), generator=g)
            yield torch.randn(size, self.width, 1, 1, generator=g), labels


def peak() -> int:
    """Largest resident memory so far, in bytes."""
    return 1024 * resource.getrusage(resource.RUSAGE_SELF).ru_maxrss


def unit_rows(rows: int, width: int, seed: int) -> torch.Tensor:
    """Random unit vectors, made in blocks so that no second copy of them ever exists."""
    out = torch.empty(rows, width)
    g = torch.Generator().manual_seed(seed)
    for start in range(0, rows, 10_000):
        block = torch.randn(min(10_000, rows - start), width, generator=g)
        out[start : start + len(block)] = torch.nn.functional.normalize(block, dim=1)
    return out


def classification(rows: int, classes: int, width: int, limit: float) -> None:
    """Peak of a set of many samples and classes."""
    text = torch.randn(classes, width, generator=torch.Generator().manual_seed(1))
    before = peak()
    started = time.perf_counter()
    tokens = lambda names: torch.tensor([[int(n)] for n in names])  # noqa: E731
    answers = ZeroShotClassification().run(SetEncoder(Features(text), tokens), Rows(rows, classes, width)).predictions
    beyond = peak() - before
    assert len(answers.labels) == rows
    assert beyond < limit, f"{beyond / 1e6:.0f} MB"
    taken = time.perf_counter() - started
    print(f"classification {rows:,} x {classes}: {beyond / 1e6:.0f} MB beyond the model, {taken:.1f} s")
    print(f"  all logits in float32 would be {4 * rows * classes / 1e6:.0f} MB")


def retrieval(images: int, texts: int, width: int, limit: float) -> None:
    """Peak of ranks both ways, and equality with float64 for some queries."""
    text, image = unit_rows(texts, width, 0), unit_rows(images, width, 1)
    pairs = np.stack([np.arange(texts) % images, np.arange(texts)], axis=1)
    pairs = pairs[np.lexsort((pairs[:, 1], pairs[:, 0]))]
    before = peak()
    started = time.perf_counter()
    of_text, of_image = retrieval_ranks(text, image, pairs)
    taken = time.perf_counter() - started
    beyond = peak() - before
    rng = np.random.default_rng(0)
    for t in rng.choice(texts, CHECKED, replace=False):
        scores = image.double() @ text[t].double()
        right = t % images
        assert int((scores >= scores[right]).sum()) - 1 == of_text[t]
    for i in rng.choice(images, CHECKED, replace=False):
        scores = text.double() @ image[i].double()
        own = np.arange(i, texts, images)
        best = scores[own].max()
        scores[own] = -torch.inf
        assert int((scores >= best).sum()) == of_image[i]
    assert beyond < limit, f"{beyond / 1e6:.0f} MB"
    print(f"retrieval {images:,} x {texts:,}, width {width}: {beyond / 1e6:.0f} MB beyond the features, {taken:.1f} s")
    print(f"  the matrix in float32 would be {4 * images * texts / 1e9:.0f} GB")


def main() -> None:
    """Both measurements."""
    parser = argparse.ArgumentParser()
    for name, default in (("images", 100_000), ("texts", 500_000), ("width", 16), ("rows", 108_754), ("classes", 397)):
        parser.add_argument(f"--{name}", type=int, default=default)
    parser.add_argument("--limit", type=float, default=1000, help="MB beyond the features")
    asked = parser.parse_args()
    if asked.rows:
        classification(asked.rows, asked.classes, asked.width, 1e6 * asked.limit)
    if asked.images:
        retrieval(asked.images, asked.texts, asked.width, 1e6 * asked.limit)


if __name__ == "__main__":
    main()
