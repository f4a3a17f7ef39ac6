"""The sources of a recipe's `[data]`: tars that it names, and sources of one's own that stand in for some of them."""

from __future__ import annotations

import math
from collections.abc import Sequence

from evatool.core.errors import RecipeError
from evatool.data.sources.base import SequentialSource, Source
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import Patience
from evatool.data.sources.in_order import InOrder
from evatool.data.sources.shard_list import ShardList, open_shard_list
from evatool.data.sources.stream import TarStream
from evatool.data.sources.tar_source import TarSource
from evatool.recipe.schema import DataSource, TrainDataSection

ONLY_SOURCE = "train"
"""Name of the source where the recipe gives `data.train` and no list of sources."""


def open_sources(
    section: TrainDataSection, global_batch_size: int, own: Sequence[Source | SequentialSource] = ()
) -> list[Source]:
    """The sources of a recipe in its order.

    Args:
        section: the recipe's `[data]`.
        global_batch_size: samples of a step, which tell how many fetched shards are needed at once.
        own: sources that are read in place of the shards which the section lists under the same names; where it gives
            `data.train`, one that is called "train".
    Raises: RecipeError where a source of `own` is named nowhere, or the cache cannot hold what is read at once;
        DataError where shards are not what they should be.
    """
    named = section.sources or [DataSource(name=ONLY_SOURCE, shards=str(section.train))]
    own_by_name = {source.name: source for source in own}
    unknown = sorted(set(own_by_name) - {listed.name for listed in named})
    if unknown or len(own_by_name) < len(own):
        raise RecipeError(
            f"sources of one's own are called {', '.join(source.name for source in own)}",
            where="the arguments of build_train_loader",
            expected=f"different names out of those of the section: {', '.join(listed.name for listed in named)}",
            fix="list the source in data.sources under its name",
        )
    remote = section.remote
    patience = Patience(
        remote.attempts, remote.timeout_sec, remote.backoff_sec, allow_private_redirects=remote.allow_private_redirects
    )
    cache: ShardCache | None = None
    found: list[Source] = []
    for listed in named:
        match own_by_name.get(listed.name):
            case Source() as source:
                found.append(source)
            case SequentialSource() as stream:
                found.append(InOrder(stream))
            case _:
                cache = cache or ShardCache(remote.cache_dir, remote.cache_bytes, patience)
                found.append(_open_listed(listed, section, global_batch_size, cache, patience))
    return found


def _open_listed(
    listed: DataSource, section: TrainDataSection, batch: int, cache: ShardCache, patience: Patience
) -> InOrder | TarSource:
    """The tars that a source of the recipe names, to be read by number or in order."""
    specs = [listed.shards] if isinstance(listed.shards, str) else listed.shards
    if listed.sequential or listed.allow_pipe:
        return InOrder(TarStream(listed.name, specs, listed.num_samples, cache, section.max_wait_sec))
    shards = open_shard_list(
        listed.name, specs, cache=cache, patience=patience, max_bad_fraction=section.max_bad_fraction
    )
    source = TarSource(shards, cache, patience)
    _check_cache(shards, window_of(source, section.window_shards), section, batch)
    return source


def window_of(source: Source, asked: int | None) -> int:
    """Shards of a source that are shuffled together.

    Args:
        asked: the recipe's `data.window_shards`; None leaves it to the source.
    """
    num_shards = len(source.shard_counts)
    return min(asked or source.default_window or num_shards, num_shards)


def _check_cache(shards: ShardList, window: int, section: TrainDataSection, global_batch_size: int) -> None:
    """Raises: RecipeError where the shards that are read at once do not fit the cache of fetched ones."""
    known = shards.sizes[shards.sizes >= 0]
    if not shards.has_remote or not len(known):
        return
    # Two batches are under way in each worker. Beside their windows: the next one, and the one that spares come from.
    ahead = 2 * max(1, section.num_workers) * global_batch_size / section.streams
    windows = 2 + math.ceil(ahead * len(shards.urls) / (shards.num_samples * window))
    num_shards = min(windows * window, len(shards.urls))
    needed = int(known.max()) * num_shards
    if needed > section.remote.cache_bytes:
        raise RecipeError(
            f"data.remote.cache_bytes = {section.remote.cache_bytes} does not hold the {num_shards} shards that are "
            f"read at once ({windows} windows of {window})",
            where=f"source {shards.name!r}, whose largest shard has {int(known.max())} bytes",
            expected=f"at least {needed}",
            fix="raise data.remote.cache_bytes, or lower data.window_shards or data.num_workers",
        )
