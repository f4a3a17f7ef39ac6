"""Samples that could not be read: named once, counted by cause, and limited."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable
from dataclasses import dataclass

from evatool.data.fetch import TRANSIENT_CAUSES
from evatool.errors import BadDataLimitError, EvatoolError, TransientError

log = logging.getLogger(__name__)

LIMIT_FLOOR = 1000
"""Samples tried before a share of bad ones means anything, where the set has so many."""

LIMIT_FLOOR_SHARDS = 100
"""Where shards are read a window at a time, a lost one comes as many bad samples at once: the same in shards."""

_NAMED = 1000  # bad samples that get a line of their own; then every thousandth
_KEPT = 100  # kept with all details, for messages


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read; with `is_whole_shard`, as all of its shard."""

    source: int
    sample: int
    shard: str
    key: str
    cause: str
    detail: str
    is_whole_shard: bool = False

    def __str__(self) -> str:
        name = "(all samples)" if self.is_whole_shard else self.key
        return f"{self.shard} {name}: {self.cause} ({self.detail})"


class BadSamples:
    """What one rank has met.

    Args:
        num_samples: samples in all sources together.
        floor: samples tried before the limit holds.
        max_fraction: the recipe's `data.max_bad_fraction`.

    Attributes:
        causes: distinct bad samples by cause.
        num_spares: slots of batches that were filled by a spare, each time.
        first: the first bad samples met, with details.
    """

    def __init__(self, num_samples: int, floor: int, max_fraction: float) -> None:
        self.num_samples, self.floor, self.max_fraction = num_samples, floor, max_fraction
        self.causes: Counter[str] = Counter()
        self.num_spares = 0
        self.first: list[BadSample] = []
        self._seen: set[tuple[int, int]] = set()  # some 150 bytes each, for at most the allowed share of the set
        self._lost_shards: set[str] = set()
        self._num_tried = 0

    def __len__(self) -> int:
        return len(self._seen)

    def add(self, found: Iterable[BadSample], num_tried: int, num_spares: int) -> None:
        """Count what a batch met. New ones go to the log with shard and key."""
        self._num_tried += num_tried
        self.num_spares += num_spares
        for bad in found:
            if (bad.source, bad.sample) in self._seen:
                continue
            self._seen.add((bad.source, bad.sample))
            self.causes[bad.cause] += 1
            if len(self.first) < _KEPT:
                self.first.append(bad)
            self._log(bad)

    def check(self, *, no_spare: bool = False) -> None:
        """Raises: BadDataLimitError beyond the limit, or where no spare was found; TransientError where most of it
        comes of a store that did not answer."""
        base = min(self.num_samples, max(self._num_tried, self.floor))
        if no_spare or len(self._seen) > int(self.max_fraction * base + 1e-9):
            raise self._beyond(base)

    def figures(self) -> dict[str, float]:
        """For the metrics; empty while there is nothing to tell."""
        if not self._seen:
            return {}
        by_cause = {f"data/bad/{cause}": float(count) for cause, count in sorted(self.causes.items())}
        return {"data/bad_samples": float(len(self._seen)), "data/spares": float(self.num_spares), **by_cause}

    def summary(self) -> str:
        """One line: how many, by cause."""
        counted = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
        return f"{len(self._seen)} bad samples ({counted}), {self.num_spares} places filled by spares"

    def _log(self, bad: BadSample) -> None:
        if bad.is_whole_shard:
            if bad.shard not in self._lost_shards:
                self._lost_shards.add(bad.shard)
                log.warning("shard cannot be read, its samples are replaced: %s", bad)
        elif len(self._seen) <= _NAMED or len(self._seen) % _NAMED == 0:
            log.warning("bad sample replaced: %s", bad)
            if len(self._seen) == _NAMED:
                log.warning("%d bad samples: from here on every %dth is named", _NAMED, _NAMED)

    def _beyond(self, base: int) -> EvatoolError:
        counted = ", ".join(f"{count} {cause}" for cause, count in self.causes.most_common())
        transient = sum(count for cause, count in self.causes.items() if cause in TRANSIENT_CAUSES)
        kind = TransientError if transient * 2 > len(self._seen) else BadDataLimitError
        named = dict.fromkeys(str(bad) for bad in self.first)
        return kind(
            f"{len(self._seen)} of {base} samples cannot be read ({counted})",
            where="\n  ".join(list(named)[:5]),
            expected=f"at most data.max_bad_fraction = {self.max_fraction} of them",
            fix="run the same command with --resume when the store answers again"
            if kind is TransientError
            else "prepare the data again with `evatool data-prepare`, or raise data.max_bad_fraction",
        )
