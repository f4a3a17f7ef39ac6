"""Contracts of training data: `Source`, whose samples are read by number, and `SequentialSource`, read in order.

The loader, mixing, the sample decoder and stored features know nothing else of where samples come from. Shards in tars
are one kind (`evatool.data.sources.tar_source`); a list in memory, a folder or a table is another, and needs no more
than the five abstract members of `Source` (docs/extending.md). A source is given to the loader under the name that the
recipe's `[[data.sources]]` gives it: `build_train_loader(section, ..., sources=[MySource()])`.
"""

from __future__ import annotations

from abc import ABC, abstractmethod
from collections.abc import Collection, Iterator, Mapping, Sequence
from functools import cached_property

import numpy as np

from evatool.data.image.header import MAX_PIXELS

Fields = Mapping[str, bytes]
"""A sample as it is stored: its fields by name, as the members of a webdataset sample are named by their extension.
The encoded image is under one of `evatool.data.image.header.IMAGE_MEMBERS`, or under the name that the recipe's
`data.image` gives (its bytes, not the name, say which format it has), the caption as UTF-8 under "txt" or inside a JSON
object under "json", arrays under names that end in "npy" or "safetensors"."""


class UnreadableSample(Exception):
    """A sample that its source cannot give. The loader replaces it by another one and counts it by its cause.

    Args:
        cause: a word or two for the counts, for instance "truncated-shard".
        detail: the value or place that was found wrong.
        is_whole_shard: True where every sample of the shard is lost with it.
    """

    def __init__(self, cause: str, detail: str, *, is_whole_shard: bool = False) -> None:
        super().__init__(f"{cause}: {detail}")
        self.cause, self.detail, self.is_whole_shard = cause, detail, is_whole_shard


class MissingField(UnreadableSample):
    """A sample that lacks a field which the recipe reads; its source can say more (`Source.explain`)."""


class Source(ABC):
    """Samples that can be read by number, in any order and from several processes.

    A source holds no position and draws no random numbers: the loader decides which sample is where in the run, so that
    a batch is a pure function of seed and position whatever the source is. Loader processes get a copy of it (by fork,
    or pickled); files that it opens must be opened in the process that reads them.

    Attributes:
        max_pixels: an image with more pixels is a bad sample.
        decoded_bytes: size of all images as uint8 RGB, where it is known; decoded samples of small sources are kept in
            memory.
        default_window: shards shuffled together where the recipe gives no `data.window_shards`; None for all.
        can_prefetch: True where `prefetch` does something.
    """

    max_pixels: int = MAX_PIXELS
    decoded_bytes: int | None = None
    default_window: int | None = None
    can_prefetch: bool = False

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that the recipe's `[[data.sources]]`, logs and metrics call the source by."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Number of samples, readable or not; it must not change while a run lasts."""

    @abstractmethod
    def read(self, index: int, fields: Collection[str]) -> Fields:
        """The stored fields of one sample.

        Args:
            index: 0 to `num_samples` - 1.
            fields: names that the recipe reads. Others may be left out, and are ignored where they are not.
        Raises: UnreadableSample where this sample cannot be had; any other exception ends the run.
        """

    @abstractmethod
    def describe(self) -> str:
        """Half a line for the log on what the source holds, for instance "400 samples in 7 shards"."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that is equal for two sources if and only if a run may go on from one with the other.

        It covers what the order of samples depends on: their number, how they are grouped into shards, and names that
        tell the shards (or the samples) apart. It is computed once, when a loader is built.
        """

    def content_fingerprint(self) -> str:
        """A fingerprint that also covers the contents as far as they are known; stored features are keyed by it."""
        return self.fingerprint()

    @property
    def shard_counts(self) -> np.ndarray:
        """Samples of each shard, int64; a shard is a run of samples that are best read close together in time.

        The order of an epoch takes `window` shards at a time and shuffles the samples of those. Without an override the
        source is one shard: all of its samples are shuffled together.
        """
        return np.array([self.num_samples], dtype=np.int64)

    def key(self, index: int) -> str:
        """The name of one sample, for batches and messages. Raises: nothing, even where the sample cannot be read."""
        return f"{self.name}-{index}"

    def shard_name(self, shard: int) -> str:
        """The name of one shard, for messages: for instance a path that a reader of the log can open."""
        return self.name

    def explain(self, index: int, error: MissingField) -> UnreadableSample:
        """The error to report of a sample that lacks a field; a source may add which fields there are, and why."""
        return error

    def doubt(self, index: int) -> bool:
        """Called where a sample proved unreadable: True if the source had read it wrongly and is to be asked again.

        A source that answers True must not do so for ever: it has mended what was wrong with its own notes.
        """
        return False

    def prefetch(self, shards: Sequence[int]) -> None:  # noqa: B027 - most sources have nothing to do here
        """Begin to make these shards quick to read, and return at once. Called when a window is entered."""

    def locate(self, index: int) -> tuple[int, int]:
        """The shard of a sample, and the sample's number within it."""
        shard = int(np.searchsorted(self._first, index, side="right")) - 1
        return shard, index - int(self._first[shard])

    @cached_property
    def _first(self) -> np.ndarray:
        """Number of the first sample of each shard, and behind the last one the number of samples."""
        return np.concatenate([[0], np.cumsum(self.shard_counts)])


class SequentialSource(ABC):
    """Samples that can only be read one after the other: a pipe, a stream over the network, a generator.

    The loader reads it through `evatool.data.sources.in_order.InOrder`, in the order in which it comes: nothing is
    shuffled, epoch after epoch is the same stream, and a resumed run skips what it has read. Every loader process of
    every rank reads the whole stream and decodes its own share of the samples.
    """

    @property
    @abstractmethod
    def name(self) -> str:
        """The name that the recipe's `[[data.sources]]`, logs and metrics call the source by."""

    @property
    @abstractmethod
    def num_samples(self) -> int:
        """Samples of one reading, which make an epoch; a stream that ends earlier has unreadable samples."""

    @abstractmethod
    def open(self) -> Iterator[tuple[str, Fields]]:
        """Key and stored fields of each sample, from the first one on; it must come in the same order each time."""

    @abstractmethod
    def describe(self) -> str:
        """Half a line for the log on what the source holds."""

    @abstractmethod
    def fingerprint(self) -> str:
        """A short text that is equal for two sources if and only if a run may go on from one with the other."""
