"""Images and texts to features: texts sorted by length and trimmed, work divided over ranks, nothing twice."""

from __future__ import annotations

from collections.abc import Callable, Iterable, Iterator, Sequence
from dataclasses import dataclass
from typing import Any, Literal, Protocol

import torch
import torch.nn.functional as F
from torch import Tensor

from evatool.core.errors import NumericalError
from evatool.distributed import collectives
from evatool.eval.lockstep import gather_rows, stepped_batches

# T texts, L tokens of a text, B samples of a batch, K images of a sample, S input side, E embedding, W ranks

Tokenizer = Callable[[list[str]], Tensor]
_TEXTS_TOKENISED = 8192  # at once: 8,192 rows of 77 int64 are 5 MiB
_TOKENS_ON_CPU, _TOKENS_ON_GPU = 2**12, 2**17  # of one forward pass, padding included

ImageReduction = Literal["mean", "none"]
"""How the features of a sample that is several images are reduced: to their mean at unit length, or not at all."""


class ClipModel(Protocol):
    """The part of a loaded CLIP that evaluation calls."""

    def encode_image(self, image: Tensor) -> Tensor:
        """(B, 3, S, S) images as (B, E) features, not normalised."""
        ...

    def encode_text(self, tokens: Tensor) -> Tensor:
        """(B, L) int64 tokens as (B, E) features, not normalised."""
        ...


@dataclass(frozen=True)
class ImageGroups:
    """A batch whose samples are several images each, not always the same number of them.

    Attributes:
        images: all images of the batch, sample after sample, (sum of `counts`, 3, S, S).
        counts: (B,) int64, images of each sample, at least one.
    """

    images: Tensor
    counts: Tensor


Images = Tensor | ImageGroups
"""One image a sample (B, 3, S, S), K images a sample (B, K, 3, S, S), or groups of different sizes."""


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
    """Unit features (E,) of images by digest, of one model and transform: sets that share images share the work.

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
    encode: Callable[[Tensor], Tensor],
    loader: Iterable[tuple[Images, Any]],
    how: Encoding,
    *,
    where: str,
    what: str = "image features",
    check: Callable[[Any], None] | None = None,
    memory: ImageMemory | None = None,
    reduction: ImageReduction = "mean",
) -> Iterator[tuple[Any, Any]]:
    """This rank's batches as (unit features, targets); a batch is one forward pass, however many images it is.

    Features are float32 on the model's device. A sample that is one image has a row of (B, E). For samples of several
    images, `reduction` "mean" gives (B, E) too, the mean of a sample's unit features at unit length; "none" gives
    (B, K, E), or for `ImageGroups` a list of B tensors (images of the sample, E).

    Args:
        encode: images (n, 3, S, S) as features (n, ..., E), not normalised.
        where, what: name of the set and of the features, for messages.
        check: called with a batch's targets before the model runs.
        memory: features of images that this model has seen; they are neither decoded nor encoded again. Not used
            in lockstep, nor with loaders that give no digests.
    Raises: NumericalError for features that are not finite; what the loader and `check` raise.
    """
    unknown = getattr(loader, "unknown", None)
    if memory is not None and unknown is not None and not how.lockstep:
        yield from _remembered_batches(encode, unknown(memory), how, where, what, check, memory)
        return
    side = getattr(getattr(loader, "transform", None), "size", 1)
    shape = [3, side, side]  # of an image, for the passes that are made up

    def forward(images: Images) -> Any:
        flat, counts = _flattened(images)
        shape[:] = flat.shape[1:]
        features = unit(encode(flat.to(how.device, non_blocking=True)), where, what)
        if isinstance(images, Tensor) and counts is not None and reduction == "none":
            return features.unflatten(0, images.shape[:2])
        return features if counts is None else reduce_groups(features, counts, reduction)

    def made_up() -> None:
        encode(torch.zeros(1, *shape, dtype=torch.uint8, device=how.device))

    yield from stepped_batches(loader, forward, made_up, lockstep=how.lockstep, check=check)


def _flattened(images: Images) -> tuple[Tensor, Tensor | None]:
    """The images of a batch in one row, and how many belong to each sample; None where each is a sample."""
    if isinstance(images, ImageGroups):
        return images.images, images.counts
    if images.ndim == 5:
        return images.flatten(0, 1), torch.full((len(images),), images.shape[1])
    return images, None


def reduce_groups(features: Tensor, counts: Tensor, reduction: ImageReduction) -> Tensor | list[Tensor]:
    """Unit features of all images of a batch, as the features of its samples.

    Args:
        features: (sum of `counts`, E), sample after sample.
    Returns: "mean": (B, E), the mean of each sample's rows at unit length; "none": B tensors (count, E).
    """
    groups = features.split(counts.tolist())
    match reduction:
        case "mean":
            return F.normalize(torch.stack([group.mean(dim=0) for group in groups]), dim=-1)
        case "none":
            return list(groups)


def _remembered_batches(
    encode: Callable[[Tensor], Tensor],
    batches: Iterable[tuple[list[bytes], dict[bytes, Tensor], Any]],
    how: Encoding,
    where: str,
    what: str,
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
                rows = dict(zip(new, unit(encode(images), where, what).cpu(), strict=True))
            features = torch.stack([rows[digest] if digest in rows else memory[digest] for digest in digests])
            memory.take(rows)
            yield features.to(how.device), targets


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
