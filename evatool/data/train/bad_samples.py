"""Samples that could not be read, named once, counted by cause and limited; pictures that were converted, counted."""

from __future__ import annotations

import logging
from collections import Counter
from collections.abc import Iterable, Mapping
from dataclasses import dataclass

from evatool.core.errors import BadDataLimitError, EvatoolError, TransientError
from evatool.data.bad_limit import count_by_cause, num_allowed
from evatool.data.sources.fetch import TRANSIENT_CAUSES

log = logging.getLogger(__name__)

LIMIT_FLOOR = 1000
"""Samples tried before a share of bad ones means anything, where the set has so many."""

LIMIT_FLOOR_SHARDS = 100
"""Shards' worth of samples tried before a share means anything, where shards are read a window at a time: a lost shard
comes as many bad samples at once."""

_NAMED = 1000  # bad samples that get a line of their own; then every thousandth
_KEPT = 100  # kept with all details, for messages
_NAMED_CONVERTED = 5  # pictures of each cause that get a line in the log

_FIXES = {
    "split-sample": "sort the tars, so that the members of a sample stand together: unpack each into an empty folder "
    "and pack it again there with `tar --sort=name -cf ../NEW.tar *`",
    "no-picture": "name the image's member with data.image, or raise data.max_bad_fraction",
    "no-caption": "name the caption's member with data.caption, or raise data.max_bad_fraction",
    "too-many-files": "allow the process more open files (`ulimit -n 4096`) and run the same command with --resume",
}
_OTHER_FIX = "prepare the data again with `evatool data-prepare`, or raise data.max_bad_fraction"


@dataclass(frozen=True)
class BadSample:
    """A sample that could not be read; with `is_whole_shard`, no sample of its shard could."""

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


@dataclass(frozen=True)
class Converted:
    """A picture of a batch that was not an ordinary one and was converted."""

    cause: str
    shard: str
    key: str


class BadSamples:
    """The bad samples and converted pictures that one rank has met, and the limit on them.

    Args:
        num_samples: samples in all sources together.
        floor: samples tried before the limit holds.
        max_fraction: the recipe's `data.max_bad_fraction`.

    Attributes:
        causes: distinct bad samples by cause.
        num_replacements: slots of batches that were filled by a spare, each time.
        first: the first bad samples met, with details.
        converted: pictures that were converted, by cause, each time one stood in a batch; they count against no limit.
        before: `counts` of the run before it was resumed, where this rank is to tell them; the limit begins anew.
    """

    def __init__(self, num_samples: int, floor: int, max_fraction: float) -> None:
        self.num_samples, self.floor, self.max_fraction = num_samples, floor, max_fraction
        self.causes: Counter[str] = Counter()
        self.num_replacements = 0
        self.first: list[BadSample] = []
        self.converted: Counter[str] = Counter()
        self.before: Mapping[str, float] = {}
        self._named_converted: set[Converted] = set()
        self._seen: set[tuple[int, int]] = set()  # some 150 bytes each, for at most the allowed share of the set
        self._lost_shards: set[str] = set()
        self._num_tried = 0

    def __len__(self) -> int:
        return len(self._seen)

    def add(
        self, found: Iterable[BadSample], num_tried: int, num_replacements: int, converted: Iterable[Converted] = ()
    ) -> None:
        """Count what a batch met. New bad samples, and the first converted ones, go to the log with shard and key."""
        self._num_tried += num_tried
        self.num_replacements += num_replacements
        for bad in found:
            if (bad.source, bad.sample) in self._seen:
                continue
            self._seen.add((bad.source, bad.sample))
            self.causes[bad.cause] += 1
            if len(self.first) < _KEPT:
                self.first.append(bad)
            self._log(bad)
        for each in converted:
            self.converted[each.cause] += 1
            named = [other for other in self._named_converted if other.cause == each.cause]
            if each not in named and len(named) < _NAMED_CONVERTED:
                self._named_converted.add(each)
                log.warning("picture converted: %s %s: %s", each.shard, each.key, each.cause)

    def check(self, *, no_replacement: bool = False) -> None:
        """Raises: BadDataLimitError beyond the limit, or where no spare was found; TransientError where most of it
        comes of a store that did not answer."""
        base = min(self.num_samples, max(self._num_tried, self.floor))
        if no_replacement or len(self._seen) > num_allowed(self.max_fraction, base):
            raise self._beyond(base)

    def counts(self) -> dict[str, float]:
        """For the metrics, with those from `before`; empty while there is nothing to tell."""
        found: Counter[str] = Counter()
        found.update(self.before)
        if self._seen:
            found.update({"data/bad_samples": len(self._seen), "data/spares": self.num_replacements})
            found.update({f"data/bad/{cause}": count for cause, count in self.causes.items()})
        if self.converted:
            found["data/converted"] += self.converted.total()
            found.update({f"data/converted/{cause}": count for cause, count in self.converted.items()})
        return {key: float(count) for key, count in sorted(found.items())}

    def summary(self) -> list[str]:
        """How many since this process began, by cause: a line for the bad, and one for the converted; none for none."""
        lines = []
        if self._seen:
            lines.append(
                f"{len(self._seen)} bad samples ({count_by_cause(self.causes.most_common())}), "
                f"{self.num_replacements} places filled by spares"
            )
        if self.converted:
            lines.append(
                f"{self.converted.total()} converted pictures read ({count_by_cause(self.converted.most_common())})"
            )
        return lines

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
        transient = sum(count for cause, count in self.causes.items() if cause in TRANSIENT_CAUSES)
        kind = TransientError if transient * 2 > len(self._seen) else BadDataLimitError
        named = dict.fromkeys(str(bad) for bad in self.first)
        return kind(
            f"{len(self._seen)} of {base} samples cannot be read ({count_by_cause(self.causes.most_common())})",
            where="\n  ".join(list(named)[:5]),
            expected=f"at most data.max_bad_fraction = {self.max_fraction} of them",
            fix="run the same command with --resume when the store answers again"
            if kind is TransientError
            else _FIXES.get(self.causes.most_common(1)[0][0] if self.causes else "", _OTHER_FIX),
        )
