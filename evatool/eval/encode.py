"""Pictures and texts to features: texts sorted by length and trimmed, work divided over ranks, nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from contextlib import contextmanager
from dataclasses import dataclass
from typing import Any

import numpy as np
import torch
import torch.nn.functional as F
from torch import Tensor

from evatool.core.errors import EvatoolError, NumericalError
from evatool.distributed import collectives
from evatool.eval.tasks.base import ClipModel

# T texts, L tokens of a text, B of a batch, E embedding, W ranks

Tokenizer = Callable[[list[str]], Tensor]
_TEXTS_TOKENISED = 8192  # at once: 8,192 rows of 77 int64 are 5 MiB
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2**12, 2**17  # of one forward pass, padding included


@dataclass(frozen=True)
class Encoding:
    """How a model is run.

    Args:
        device: where the model is.
        trim_text: cut each batch of texts after its longest end-of-text token. Exact for a causal text tower that
            pools at that token, as CLIP's and EVA's; not for others.
        lockstep: every rank runs every batch, with a made-up one where it has none left: a model whose weights are
            divided over the ranks gathers them with collectives that all ranks must join.
    """

    device: str = "cpu"
    trim_text: bool = False
    lockstep: bool = False


class ImageMemory(dict[bytes, Tensor]):
    """Unit features (E,) of pictures by digest, of one model and transform: sets that share pictures share the work.

    Args:
        limit: bytes of features; what would go beyond it is not kept, and nothing is ever dropped.
    """

    def __init__(self, limit: int = 2**28) -> None:
        super().__init__()
        self._left = limit

    def take(self, rows: dict[bytes, Tensor]) -> None:
        """Keep the rows of a batch, all or none."""
        size = sum(row.nbytes for row in rows.values())
        if size <= self._left:
            self._left -= size
            self.update(rows)


def text_batches(
    model: ClipModel, tokenizer: Tokenizer, texts: Sequence[str], how: Encoding, *, where: str
) -> Iterator[tuple[Tensor, Tensor]]:
    """This rank's share of the texts: (numbers (B,) int64, unit features (B, E) float32 on the model's device).

    Texts of about one length share a batch, so that little of it is padding. Each text is encoded on one rank.
    Raises: NumericalError for features that are not finite.
    """
    tokens = _tokens(tokenizer, texts)
    lengths = tokens.argmax(dim=1) + 1 if how.trim_text else torch.full((len(tokens),), tokens.shape[1])
    budget = _TOKENS_ON_GPU if how.device.startswith("cuda") else _TOKENS_ON_CPU
    batches = _by_length(lengths, budget)
    own = batches[collectives.rank() :: collectives.world_size()]
    with torch.no_grad():
        for numbers in own:
            rows = tokens[numbers, : int(lengths[numbers].max())].to(how.device)
            yield numbers, unit(model.encode_text(rows), where, "text features")
        if how.lockstep and len(own) < len(batches[:: collectives.world_size()]):
            model.encode_text(tokens[:1].to(how.device))


def encode_texts(model: ClipModel, tokenizer: Tokenizer, texts: Sequence[str], how: Encoding, *, where: str) -> Tensor:
    """(T, E) unit features in float32 on the CPU, in the order of `texts`; every rank must call it."""
    found = list(text_batches(model, tokenizer, texts, how, where=where))
    numbers = torch.cat([n for n, _ in found]) if found else torch.zeros(0, dtype=torch.int64)
    rows = torch.cat([f.cpu() for _, f in found]) if found else torch.zeros(0, 0)
    return gather_rows(rows, numbers.numpy(), len(texts))


def image_batches(
    model: ClipModel,
    loader: Iterable[tuple[Tensor, Any]],
    how: Encoding,
    *,
    where: str,
    check: Callable[[Any], None] | None = None,
    memory: ImageMemory | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """This rank's batches as (unit features (B, E) float32 on the model's device, what the loader says of them).

    Args:
        check: called with what the loader says of a batch before the model runs.
        memory: features of pictures this model has seen; they are neither decoded nor encoded again. Not used where
            ranks work in step, nor with loaders that give no digests.
    """
    unknown = getattr(loader, "unknown", None)
    if memory is not None and unknown is not None and not how.lockstep:
        yield from _remembered_batches(model, unknown(memory), how, where, check, memory)
        return
    yield from stepped_batches(model.encode_image, loader, how, where=where, what="image features", check=check)


def stepped_batches(
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Tensor, Any]],
    how: Encoding,
    *,
    where: str,
    what: str,
    check: Callable[[Any], None] | None = None,
) -> Iterator[tuple[Tensor, Any]]:
    """This rank's batches as (`encode` of the pictures at unit length, what the loader says of them).

    Where ranks work in step, one whose picture cannot be read goes on with made-up ones before it raises: the others
    wait for it in every pass.
    """
    failure: Exception | None = None
    side, done = getattr(getattr(loader, "transform", None), "size", 1), 0
    with torch.no_grad():
        batches = iter(loader)
        while True:
            try:
                images, targets = next(batches)
                if check:
                    check(targets)
                side, done = images.shape[-1], done + 1
                features = unit(encode(images.to(how.device, non_blocking=True)), where, what)
            except StopIteration:
                break
            except Exception as error:
                failure = error
                break
            yield features, targets
        missing = getattr(loader, "most_batches", done) - done if how.lockstep else 0
        for _ in range(missing):  # a rank may have one batch less than another, or none where the set is tiny
            encode(torch.zeros(1, 3, side, side, dtype=torch.uint8, device=how.device))
    if failure is not None:
        raise failure


def _remembered_batches(
    model: ClipModel,
    batches: Iterable[tuple[list[bytes], dict[bytes, Tensor], Any]],
    how: Encoding,
    where: str,
    check: Callable[[Any], None] | None,
    memory: ImageMemory,
) -> Iterator[tuple[Tensor, Any]]:
    with torch.no_grad():
        for digests, decoded, targets in batches:
            if check:
                check(targets)
            new = {digest: image for digest, image in decoded.items() if digest not in memory}
            rows: dict[bytes, Tensor] = {}
            if new:
                images = torch.stack(list(new.values())).to(how.device, non_blocking=True)
                rows = dict(zip(new, unit(model.encode_image(images), where, "image features").cpu(), strict=True))
            features = torch.stack([rows[digest] if digest in rows else memory[digest] for digest in digests])
            memory.take(rows)
            yield features.to(how.device), targets


@contextmanager
def fail_on_all_ranks() -> Iterator[None]:
    """Work that may fail on one rank: then it fails on all, instead of leaving the others waiting.

    Every rank must enter and leave it. Raises: the rank's own exception, or EvatoolError in another rank's words.
    """
    failure: Exception | None = None
    try:
        yield
    except Exception as error:
        failure = error
    if collectives.world_size() > 1:
        messages = collectives.gather_objects(None if failure is None else f"{type(failure).__name__}: {failure}")
        others = [f"rank {rank}: {message}" for rank, message in enumerate(messages) if message is not None]
        if failure is None and others:
            raise EvatoolError(others[0])
    if failure is not None:
        raise failure


def own_numbers(loader: Any, count: int) -> np.ndarray:
    """(count,) numbers in the set of the pictures that the loader gave; in order where it knows of no ranks."""
    indices = getattr(loader, "indices", None)
    return np.arange(count) if indices is None else indices


def gather_rows(rows: Tensor, numbers: np.ndarray, total: int) -> Tensor:
    """Rows of all ranks by their number; every rank must call it and gets all of them.

    Args:
        rows: (n, E) float32, this rank's.
        numbers: (n,) which of the `total` rows they are; each number is on exactly one rank.
    """
    parts = collectives.gather_objects((numbers, rows.numpy())) if collectives.world_size() > 1 else [(numbers, rows)]
    first = next((r for n, r in parts if len(n)), None)
    if first is None:
        return torch.zeros(0, 0)
    out = torch.empty((total, first.shape[1]), dtype=torch.float32)
    seen = 0
    for own, values in parts:
        if len(own):
            out[torch.from_numpy(np.asarray(own))] = torch.as_tensor(values)
            seen += len(own)
    assert seen == total, f"{seen} rows came from the ranks instead of {total}"
    return out


def gather_arrays(arrays: dict[str, np.ndarray], numbers: np.ndarray) -> dict[str, np.ndarray]:
    """Per-sample arrays of all ranks in the order of the set; every rank must call it and gets all of them."""
    if collectives.world_size() == 1:
        return arrays
    parts = collectives.gather_objects((numbers, arrays))
    order = np.argsort(np.concatenate([n for n, _ in parts]), kind="stable")
    return {name: np.concatenate([a[name] for n, a in parts if len(n)])[order] for name in _filled(parts)}


def unit(features: Tensor, where: str, what: str) -> Tensor:
    """Features at unit length, float32. Raises: NumericalError where they are not finite."""
    scaled = F.normalize(features.float(), dim=-1)
    if not bool(torch.isfinite(scaled).all()):
        raise NumericalError(
            f"the model gives {what} that are not finite on {where}",
            expected="finite numbers",
            fix="evaluate an earlier checkpoint, or with eval.precision = 'fp32'; else the weights are not finite",
        )
    return scaled


def _filled(parts: list[Any]) -> list[str]:
    """Names of the arrays of a rank that has samples: one without has arrays of no width."""
    return next((list(arrays) for numbers, arrays in parts if len(numbers)), [])


def _tokens(tokenizer: Tokenizer, texts: Sequence[str]) -> Tensor:
    chunks = [tokenizer(list(texts[i : i + _TEXTS_TOKENISED])) for i in range(0, len(texts), _TEXTS_TOKENISED)]
    return torch.cat(chunks) if chunks else torch.zeros(0, 1, dtype=torch.int64)


def _by_length(lengths: Tensor, budget: int) -> list[Tensor]:
    """Numbers of texts in batches of rising length whose padded size stays within the budget (at least one text)."""
    order = torch.sort(lengths, stable=True).indices
    batches, start = [], 0
    ordered = lengths[order].tolist()
    for end in range(1, len(ordered) + 1):
        if end == len(ordered) or ordered[end] * (end + 1 - start) > budget:
            batches.append(order[start:end])
            start = end
    return batches
