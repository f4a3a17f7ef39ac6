"""How many samples each shard had when a run was begun, and what is said where a resumed run finds others. No torch.

The order of samples is arithmetic on these counts, so with others the run would go on in another order. A run writes
them down once; older runs have only the hash in their checkpoints, which says that something differs and not what.
"""

from __future__ import annotations

import json
import logging
from collections.abc import Mapping, Sequence
from itertools import zip_longest
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import read_json
from evatool.data.sources.base import Source
from evatool.data.tar.index import VERSION

log = logging.getLogger(__name__)

FILE = "data_samples.json"
"""Name of the file in a run folder."""

DRIFT_KEY = "data.samples"
"""What `--accept-drift` calls a difference in the samples of shards."""

MAX_FILE_BYTES = 2**28

Counts = Mapping[str, Sequence[Sequence[Any]]]
"""By source: file name and number of samples of each shard, in their order."""

_MAX_SHOWN = 10


def counts_of(sources: Sequence[Source]) -> dict[str, list[tuple[str, int]]]:
    """The counts of today's shards."""
    return {
        source.name: [
            (source.shard_name(shard).rpartition("/")[2], count)
            for shard, count in enumerate(source.shard_counts.tolist())
        ]
        for source in sources
    }


def write_counts(folder: Path, counts: Counts) -> None:
    """Write the counts into a run folder. Raises: OSError."""
    value = {"grouping": VERSION, "sources": counts}
    # Names of files need not be UTF-8: JSON's own escapes hold what they are.
    write_bytes_atomically(folder / FILE, (json.dumps(value, separators=(",", ":")) + "\n").encode())


def read_counts(folder: Path) -> Counts | None:
    """The counts that a run was begun with; None where it wrote none, or they cannot be read."""
    try:
        sources = read_json(folder / FILE, MAX_FILE_BYTES, memory_per_byte=20)["sources"]
        return {str(name): [(str(shard), int(count)) for shard, count in shards] for name, shards in sources.items()}
    except FileNotFoundError:
        return None
    except (OSError, ValueError, KeyError, TypeError, AttributeError) as err:
        log.warning("%s cannot be read: %s", folder / FILE, err)
        return None


def count_differences(before: Counts, now: Counts) -> list[str]:
    """A line for each shard whose number of samples is another one, or that came or went; the first of many."""
    lines = []
    for name in dict.fromkeys((*before, *now)):
        if name not in now or name not in before:
            lines.append(f"source {name}: {'is gone' if name in before else 'is new'}")
            continue
        for old, new in zip_longest(before[name], now[name]):
            if old is None or new is None or old[0] != new[0]:
                was, is_now = (f"{shard[1]} samples in {shard[0]}" if shard else "nothing" for shard in (old, new))
                lines.append(f"source {name}: {was} then, {is_now} now")
            elif old[1] != new[1]:
                lines.append(f"source {name}: {old[0]} had {old[1]} samples and has {new[1]}")
    more = len(lines) - _MAX_SHOWN
    return [*lines[:_MAX_SHOWN], *([f"and {more} more"] if more > 0 else [])]
