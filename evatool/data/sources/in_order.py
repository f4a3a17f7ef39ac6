"""A stream that is read in order, behind the contract of sources that are read by number."""

from __future__ import annotations

import os
from collections import OrderedDict
from collections.abc import Collection, Iterator
from typing import Any

from evatool.data.sources.base import Fields, SequentialSource, Source, UnreadableSample

LOOK_BACK = 128
"""Samples behind the newest one that stay in memory: replacements of bad samples are taken from among them."""


class InOrder(Source):
    """Gives the samples of a stream by number: forward by reading on, a little backward out of memory.

    A number that lies further back opens the stream anew and skips to it, which is also how a new epoch begins. So the
    answer depends on the number alone, and reading costs least where numbers rise, as `SequentialOrder` makes them.

    Args:
        stream: the source to read; a reading of it that is no longer needed is dropped.
    """

    def __init__(self, stream: SequentialSource) -> None:
        self.stream = stream
        self._reading: Iterator[tuple[str, Fields]] | None = None
        self._next = 0
        self._recent: OrderedDict[int, tuple[str, Fields]] = OrderedDict()
        self._failure: UnreadableSample | None = None  # what ended this reading before its time
        self._process = os.getpid()

    @property
    def name(self) -> str:
        return self.stream.name

    @property
    def num_samples(self) -> int:
        return self.stream.num_samples

    def describe(self) -> str:
        return f"{self.stream.describe()}, in their order"

    def fingerprint(self) -> str:
        return f"in-order {self.stream.fingerprint()}"

    def key(self, index: int) -> str:
        try:
            return self._at(index)[0]
        except UnreadableSample:
            return super().key(index)

    def read(self, index: int, fields: Collection[str]) -> Fields:
        return self._at(index)[1]

    def _at(self, index: int) -> tuple[str, Fields]:
        """Key and fields of a sample. Raises: UnreadableSample where the stream ends before it."""
        if index in self._recent:
            return self._recent[index]
        if self._reading is None or index < self._next or self._process != os.getpid():
            # A reading belongs to the process that began it: after a fork, two would take samples from each other.
            self._process = os.getpid()
            self._reading, self._next = self.stream.open(), 0
            self._recent.clear()
            self._failure = None
        while self._next <= index:
            if self._failure is not None:
                raise self._failure
            try:
                found = next(self._reading, None)
            except UnreadableSample as err:
                self._failure = err
                raise
            if found is None:
                raise UnreadableSample("stream-ended", f"{self.name} ends after {self._next} samples")
            self._recent[self._next] = found
            self._next += 1
            if len(self._recent) > LOOK_BACK:
                self._recent.popitem(last=False)
        return self._recent[index]

    def __getstate__(self) -> dict[str, Any]:
        return {**self.__dict__, "_reading": None, "_next": 0, "_recent": OrderedDict(), "_failure": None}
