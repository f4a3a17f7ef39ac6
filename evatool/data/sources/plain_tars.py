"""How many samples plain tars hold: by counts that other tools left beside them, else by a scan whose index is kept.

Counts stand in a `sizes.json` of a folder ({tar name: samples}, as open_clip and webdataset's tools have it), or in the
`00000_stats.json` that img2dataset writes beside each tar. Such a count can be of another download, so some of the tars
are scanned all the same; where one of those has another number of samples, no count of its folder is believed.
"""

from __future__ import annotations

import hashlib
import logging
import os
from collections.abc import Mapping, Sequence
from concurrent.futures import ThreadPoolExecutor
from dataclasses import dataclass, field, replace
from pathlib import Path
from typing import Any

from evatool.core.atomic_io import write_bytes_atomically
from evatool.core.bounded_json import parse_json, read_json
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import FetchError, Patience, display_url, fetch_bytes, is_remote, local_path
from evatool.data.tar.index import WHOLE_TAR, ShardMembers, index_json, read_index, read_index_head, scan_file
from evatool.data.tar.open_files import is_too_many
from evatool.data.tar.scan import CAUSES

log = logging.getLogger(__name__)

NUM_CHECKED = 16
"""Local tars of a source that are scanned although something beside them gives their counts."""

SIZES, STATS = "sizes.json", "_stats.json"

_MAX_SIZES_BYTES = 2**28
_MAX_STATS_BYTES = 2**20
_NUM_FETCHERS = 16


@dataclass
class Counted:
    """What was found out about plain tars, in their order.

    Attributes:
        counts: samples of each tar; 0 where it could not be read.
        sizes: bytes of each tar; -1 where nobody looked, because something beside it gives its count.
        indexes: paths of kept indexes; None where there is none.
        lost: tars that could not be read, with the cause.
    """

    counts: list[int] = field(default_factory=list)
    sizes: list[int] = field(default_factory=list)
    indexes: list[str | None] = field(default_factory=list)
    lost: dict[str, str] = field(default_factory=dict)


@dataclass
class _Scanned:
    index: Path | None
    num_samples: int
    num_bytes: int
    is_damaged: bool = False


def count_samples(name: str, urls: Sequence[str], cache: ShardCache, patience: Patience) -> Counted:
    """Samples of each tar, from what stands beside the tars or by scans.

    Args:
        name: the source's, for the log.
    """
    told = _told_counts(name, urls, patience)
    found = Counted()
    scanned: dict[str, _Scanned | str] = {}
    with cache.alone():  # the other ranks wait, and then find the indexes
        for url in _chosen([url for url in urls if url in told and not is_remote(url)]):
            scanned[url] = _scan_or_cause(url, cache)
        told = _believed(name, told, scanned)
        for url in urls:
            known = None if url in told else scanned.get(url) or _scan_or_cause(url, cache)
            if isinstance(known, str):
                found.lost[url] = known
            kept = scanned.get(url) if known is None else known
            index = kept.index if isinstance(kept, _Scanned) else None
            found.indexes.append(None if index is None else str(index))
            found.counts.append(told[url] if known is None else 0 if isinstance(known, str) else known.num_samples)
            found.sizes.append(known.num_bytes if isinstance(known, _Scanned) else -1)
    return found


def read_members(tar: Path, index: str | None, is_kept: bool) -> ShardMembers:
    """The samples of a tar, from its index or by a scan.

    Args:
        is_kept: the index was made by a scan, so that one which is damaged is replaced.
    Raises: OSError.
    """
    if index is not None:
        try:
            return read_index(Path(index))
        except FileNotFoundError:
            log.info("%s: its index is gone, the tar is scanned", tar.name)
        except (OSError, ValueError) as err:
            if is_too_many(err):
                raise  # the index is as good as before: whoever asks makes room
            log.warning("%s: its index cannot be used, the tar is scanned: %s", tar.name, err)
    members = scan_file(tar)
    if index is not None and is_kept:
        _keep_index(members, tar, [Path(index)])
    return members


# ----------------------------------------------------------------------------------------------- counts beside the tars


def _told_counts(name: str, urls: Sequence[str], patience: Patience) -> dict[str, int]:
    """Counts by tar, of those tars for which a file beside them gives one; says so where it gives nonsense."""
    folders = dict.fromkeys(_folder(url) for url in urls)
    sizes = {folder: _read_sizes(folder, patience) for folder in folders}
    told: dict[str, int] = {}
    for url in urls:
        folder, file = _folder(url), url.rpartition("/")[2]
        if file in sizes[folder]:
            _take(told, name, url, sizes[folder][file], SIZES)
    others = [url for url in urls if url.rpartition("/")[2] not in sizes[_folder(url)]]
    if others and _read_stats(others[0], patience):
        with ThreadPoolExecutor(_NUM_FETCHERS) as pool:
            for url, stats in zip(others, pool.map(lambda url: _read_stats(url, patience), others), strict=True):
                if "successes" in stats:
                    _take(told, name, url, stats["successes"], f"its {STATS}")
    if told and len(told) < len(urls):
        log.info("source %s: nothing gives the counts of %d tars: they are scanned", name, len(urls) - len(told))
    return told


def _take(told: dict[str, int], name: str, url: str, count: Any, where: str) -> None:
    is_number = not isinstance(count, bool) and isinstance(count, int | float)
    if is_number and 0 <= count < 2**40 and count == int(count):
        told[url] = int(count)
    else:
        shown = f"{count!r:.40}"
        log.warning("source %s: %s gives %s as number of samples: %s is scanned", name, where, shown, display_url(url))


def _chosen(urls: Sequence[str]) -> list[str]:
    """At most `NUM_CHECKED` of these, evenly spread, the first and the last among them."""
    if len(urls) <= NUM_CHECKED:
        return list(urls)
    return [urls[i * (len(urls) - 1) // (NUM_CHECKED - 1)] for i in range(NUM_CHECKED)]


def _believed(name: str, told: Mapping[str, int], scanned: Mapping[str, _Scanned | str]) -> dict[str, int]:
    """The counts of `told` without those of folders in which a scan found another number."""
    wrong: dict[str, str] = {}
    for url, found in scanned.items():
        # A damaged tar has lost samples, and what was told is how many there should be.
        if isinstance(found, _Scanned) and found.num_samples != told[url] and not _is_damaged(found):
            wrong.setdefault(_folder(url), f"{told[url]} samples in {display_url(url)}, which has {found.num_samples}")
    for folder, text in wrong.items():
        log.warning(
            "source %s: the counts beside the tars in %s are wrong (%s): the tars are scanned",
            name,
            display_url(folder) or ".",
            text,
        )
    believed = {url: count for url, count in told.items() if _folder(url) not in wrong}
    if believed:
        log.info("source %s: %d tars are counted by files beside them", name, len(believed))
    return believed


def _is_damaged(found: _Scanned) -> bool:
    """True where a tar could not be scanned to its end, by its index where it was scanned in an earlier start."""
    if found.index is None:
        return found.is_damaged
    try:
        return _has_damage(read_index(found.index))
    except (OSError, ValueError):
        return found.is_damaged


def _has_damage(members: ShardMembers) -> bool:
    # A tar that ends without its mark may be whole; but not where it should have more samples.
    return any(problem.cause in WHOLE_TAR or problem.cause == "no-end-mark" for problem in members.problems)


def _folder(url: str) -> str:
    return url.rpartition("/")[0]


def _read_sizes(folder: str, patience: Patience) -> dict[str, Any]:
    found = _read_json(f"{folder}/{SIZES}" if folder else SIZES, patience, _MAX_SIZES_BYTES)
    return found if isinstance(found, dict) else {}


def _read_stats(url: str, patience: Patience) -> dict[str, Any]:
    found = _read_json(url.removesuffix(".tar") + STATS, patience, _MAX_STATS_BYTES)
    return found if isinstance(found, dict) else {}


def _read_json(url: str, patience: Patience, max_bytes: int) -> Any:
    """A JSON file beside the tars; None where there is none that can be read."""
    try:
        if is_remote(url):
            return parse_json(fetch_bytes(url, replace(patience, attempts=2, backoff_sec=0.1), max_bytes))
        path = local_path(url)
        return read_json(path, max_bytes) if path.is_file() else None
    except (FetchError, OSError, ValueError) as err:
        log.debug("%s is not read: %s", display_url(url), err)
        return None


# --------------------------------------------------------------------------------------------------------------- scans


def _scan_or_cause(url: str, cache: ShardCache) -> _Scanned | str:
    """What a tar holds, or why it cannot be read."""
    try:
        return _scan(url, cache)
    except (FetchError, OSError, ValueError) as err:  # a path with a zero byte is a ValueError
        return str(err)


def _scan(url: str, cache: ShardCache) -> _Scanned:
    """What a tar holds, by its kept index where that is of this very tar. Raises: FetchError, OSError."""
    remote = is_remote(url)
    tar = cache.path(url) if remote else local_path(url).resolve()
    readable, writable = _index_paths(url, tar, cache)
    for path in readable:
        found = _read_kept(path, None if remote else tar.stat())
        if found is not None:
            return found
    if remote:
        tar = cache.get(url)
    members = scan_file(tar)
    for problem in members.problems[:10]:
        log.warning("%s: %s: %s", display_url(url), problem, CAUSES[problem.cause])
    return _Scanned(_keep_index(members, tar, writable), len(members), tar.stat().st_size, _has_damage(members))


def _index_paths(url: str, tar: Path, cache: ShardCache) -> tuple[list[Path], list[Path]]:
    """Where the index of a tar may be read, and where it may be written; the first that works is taken.

    A shard that is a link, or lies in a linked folder, belongs to someone else's data set: nothing is written there.
    """
    if is_remote(url):
        kept = cache.index_folder() / f"{cache.path(url).stem}.json"
        return [kept], [kept]
    kept = cache.index_folder() / f"{hashlib.sha256(os.fsencode(tar)).hexdigest()[:32]}.json"
    beside = tar.with_name(f"{tar.name}.index.json")
    path = local_path(url)
    is_linked = path.is_symlink() or path.parent.is_symlink()
    return [beside, kept], [kept] if is_linked else [beside, kept]


def _read_kept(path: Path, tar: os.stat_result | None) -> _Scanned | None:
    """What an index says; it must fit the local tar, while a remote one is not asked. None where there is none."""
    try:
        head = read_index_head(path)
    except OSError:
        return None
    if head is None:
        log.info("%s is of another version, or damaged: the tar is scanned", path)
        return None
    if tar is not None and (head.tar_bytes, head.tar_mtime_ns) != (tar.st_size, tar.st_mtime_ns):
        return None
    return _Scanned(path, head.num_samples, head.tar_bytes)


def _keep_index(members: ShardMembers, tar: Path, paths: Sequence[Path]) -> Path | None:
    """The first of `paths` that the index could be written to; None where no folder can be written."""
    stat = tar.stat()
    data = index_json(members, tar_bytes=stat.st_size, tar_mtime_ns=stat.st_mtime_ns)
    for path in paths:
        try:
            path.parent.mkdir(exist_ok=True)
            write_bytes_atomically(path, data)
            return path
        except OSError as err:
            log.debug("no index at %s: %s", path, err)
    return None
