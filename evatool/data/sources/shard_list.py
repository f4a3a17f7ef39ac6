"""Where a source's shards are and how many samples each holds, from what a recipe names.

A source is a folder or manifest that `data-prepare` wrote, or plain tars: a path, URL, glob or brace list. Counts of
plain tars come from a `sizes.json` beside them, else every tar is scanned once and its index kept.
"""

from __future__ import annotations

import hashlib
import itertools
import logging
import os
import re
from collections.abc import Sequence
from dataclasses import dataclass, field
from difflib import get_close_matches
from glob import escape, has_magic, iglob
from typing import Any

import numpy as np

from evatool.core.bounded_json import parse_json
from evatool.core.errors import BadDataLimitError, DataError
from evatool.data.image.header import MAX_PIXELS
from evatool.data.sources.braces import MAX_EXPANDED, MAX_PATTERN_CHARS, expand_braces, too_long, too_many
from evatool.data.sources.cache import ShardCache
from evatool.data.sources.fetch import FetchError, Patience, display_url, fetch_bytes, is_remote, local_path
from evatool.data.sources.plain_tars import count_samples
from evatool.data.tar.manifest import FORMAT, MANIFEST, MAX_MANIFEST_BYTES, read_shard_manifest

log = logging.getLogger(__name__)

MAX_LOOKED_AT = 10_000
"""Local tars whose size is looked at before a run begins; each is looked at when it is read."""

MAX_NAMED = 100
"""Shards of a source that get a line of their own in the log when it is opened."""

MAX_STARS = 20
"""Stars in a pattern."""

_COMPRESSED = re.compile(r"\.(?:tar\.|t)(gz|bz2|bz|xz|zst|lz4|lzma|Z)$")
_UNPACK = {"gz": "gzip -d", "bz2": "bzip2 -d", "xz": "xz -d", "zst": "zstd -d"}


@dataclass
class ShardList:
    """The shards of one source.

    Attributes:
        urls: local paths or URLs.
        counts: samples of each shard, int64.
        sizes: bytes of each shard, int64; -1 where not known.
        sha256: checksum of each tar; None where not known.
        indexes: local index files beside or for the tars, as paths; None where there is none.
        keeps_indexes: the indexes were made by scans, so that one which is damaged may be replaced.
        max_pixels: limit on a picture's size.
        decoded_bytes: all pictures as uint8 RGB; None where not known.
        lost: shards that could not be read when their samples were to be counted, with the cause.
    """

    name: str
    urls: list[str]
    counts: np.ndarray
    sizes: np.ndarray
    sha256: list[str | None]
    indexes: list[str | None]
    keeps_indexes: bool = False
    max_pixels: int = MAX_PIXELS
    decoded_bytes: int | None = None
    lost: dict[str, str] = field(default_factory=dict)

    @property
    def num_samples(self) -> int:
        """Samples in all shards."""
        return int(self.counts.sum())

    @property
    def has_remote(self) -> bool:
        """True if any shard has to be fetched."""
        return any(is_remote(url) for url in self.urls)

    def digest(self) -> str:
        """A hash of what the order of samples depends on: names and counts of the shards, wherever they lie."""
        digest = hashlib.sha256(np.ascontiguousarray(self.counts).tobytes())
        for url in self.urls:
            digest.update(url.rpartition("/")[2].encode("utf-8", "surrogatepass") + b"\0")
        return digest.hexdigest()[:16]

    def content_digest(self) -> str:
        """A hash that also covers the contents as far as they are known: checksums where there are any, else sizes."""
        known = [sha or size for sha, size in zip(self.sha256, self.sizes.tolist(), strict=True)]
        return hashlib.sha256(f"{self.digest()} {known}".encode()).hexdigest()[:16]


def open_shard_list(
    name: str,
    shards: str | Sequence[str],
    *,
    cache: ShardCache,
    patience: Patience,
    max_bad_fraction: float,
) -> ShardList:
    """The shards that a recipe's source names.

    Args:
        max_bad_fraction: share of shards that may be unreadable when plain tars are scanned.
    Raises: DataError where nothing is found or something is not what it should be; BadDataLimitError.
    """
    specs = [shards] if isinstance(shards, str) else list(shards)
    for spec in specs:
        _check_spec(name, spec)
    if len(specs) == 1 and not _names_tars(specs[0]):
        found = _open_folder(name, specs[0], patience)
        if isinstance(found, ShardList):
            _check_present(found, max_bad_fraction)
            return found
        urls = found
    else:
        urls = list(dict.fromkeys(url for spec in specs for url in expand(spec)))
    if not urls:
        raise DataError(f"source {name!r} names no shard", where=", ".join(specs), fix="correct the glob or the list")
    others = [url for url in urls if not _names_tars(url)]
    if others:
        raise DataError(
            f"source {name!r} names {others[0]!r}, which is no tar",
            expected="one folder or manifest of `evatool data-prepare`, or .tar files only",
        )
    return _from_tars(name, urls, cache, patience, max_bad_fraction)


def _check_spec(name: str, spec: str) -> None:
    """Raises: DataError for what other tools read and this one does not, naming what to write instead."""
    if not is_remote(spec) and os.path.lexists(local_path(spec)) and not _COMPRESSED.search(spec):
        return
    where = f"the shards of source {name!r}: {display_url(spec)}"
    if spec.startswith("pipe:"):
        raise DataError("a command is not read here", where=where, fix="set sequential and allow_pipe in the source")
    if "::" in spec:
        raise DataError(
            "`::` is not read",
            where=where,
            expected="webdataset's `a::b` as a list, shards = ['a', 'b']; fsspec's `simplecache::s3://...` as "
            "`s3://...`, which is kept in data.remote.cache_dir anyway",
        )
    compressed = _COMPRESSED.search(spec.partition("?")[0] if is_remote(spec) else spec)
    if compressed:
        raise DataError(
            "the tars are compressed: their samples cannot be reached at random",
            where=where,
            fix=f"unpack them to plain tars ({_UNPACK.get(compressed[1], 'with the program that made them')}), or set "
            "sequential = true in the source, which reads them in their order",
        )
    if is_remote(spec):
        check_protocol(spec)


def check_protocol(url: str) -> None:
    """Raises: DataError where nothing can read URLs of this protocol."""
    protocol = url.partition("://")[0]
    if protocol in ("http", "https"):
        return
    from fsspec import available_protocols

    if protocol not in available_protocols():
        near = get_close_matches(protocol, available_protocols(), n=1, cutoff=0.5)
        raise DataError(
            f"no protocol is called {protocol!r}",
            where=display_url(url),
            expected=f"a path, http(s)://, or what fsspec reads{f': did you mean {near[0]}://?' if near else ''}",
        )


def expand(spec: str) -> list[str]:
    """URLs that a pattern names: `{000..123}` and `{a,b}` first, then globs (`?` only in local ones). Sorted by glob.

    Raises: DataError where a glob cannot be listed, or the pattern names more than `MAX_EXPANDED` shards.
    """
    if len(spec) > MAX_PATTERN_CHARS:
        raise too_long(spec)
    if not is_remote(spec):
        return _expand_local(str(local_path(spec)))
    check_protocol(spec)
    urls: list[str] = []
    for pattern in expand_braces(spec):
        urls += _remote_glob(pattern) if "*" in pattern or "[" in pattern else [pattern]
    return urls


def _expand_local(spec: str) -> list[str]:
    """Paths that a pattern names; what exists as it is written is no pattern, whatever is in its name."""
    urls = []
    existing, pattern = _existing_part(spec)
    for rest in expand_braces(pattern):
        path, magic = _existing_part(os.path.join(existing, rest) if rest else existing)
        if not has_magic(magic):
            urls.append(os.path.join(path, magic) if magic else path)
        else:
            urls += _sorted_glob(os.path.join(escape(path), magic))
        if len(urls) > MAX_EXPANDED:
            raise too_many(spec, f"more than {MAX_EXPANDED}")
    return urls


def _sorted_glob(pattern: str) -> list[str]:
    if pattern.count("*") > MAX_STARS:  # each star in a name multiplies the ways to match it
        raise too_long(pattern)
    return sorted(itertools.islice(iglob(pattern), MAX_EXPANDED + 1))


def _existing_part(path: str) -> tuple[str, str]:
    """The longest beginning of a path, in whole components, that exists as it is written; and the rest."""
    parts = path.split("/")
    for count in range(len(parts), 0, -1):
        beginning = "/".join(parts[:count]) or "/"
        if os.path.lexists(beginning):
            return beginning, "/".join(parts[count:])
    return "", path


def _remote_glob(pattern: str) -> list[str]:
    if pattern.startswith(("http://", "https://")):
        raise DataError(
            "a web server cannot list its files",
            where=display_url(pattern),
            expected="a brace list, e.g. https://host/{00000..00123}.tar, or a manifest.json",
        )
    import fsspec

    try:
        found = fsspec.core.get_fs_token_paths(pattern)
        return sorted(found[0].unstrip_protocol(path) for path in found[2])
    except (OSError, ImportError, ValueError) as err:
        raise DataError(f"the shards cannot be listed: {err}", where=display_url(pattern)) from err


def _names_tars(spec: str) -> bool:
    return spec.partition("?")[0].endswith((".tar", "}", "*", "]")) if is_remote(spec) else not _is_manifest(spec)


def _open_folder(name: str, spec: str, patience: Patience) -> ShardList | list[str]:
    """What the manifest of a folder lists; where it has none, its tars, as img2dataset and others leave them.

    Raises: DataError.
    """
    if not is_remote(spec):
        folder = local_path(spec)
        has_manifest = folder.name == MANIFEST or not folder.is_dir() or (folder / MANIFEST).exists()
        tars = [] if has_manifest else sorted(str(path) for path in folder.iterdir() if path.name.endswith(".tar"))
        # `data-prepare` writes its manifest last: a folder of its shards without one is not finished.
        is_ours = any(os.path.exists(f"{tar.removesuffix('.tar')}.index.json") for tar in tars)
        return _from_manifest(name, spec, patience) if is_ours or not tars else tars
    try:
        return _from_manifest(name, spec, patience)
    except DataError as err:
        is_missing = isinstance(err.__cause__, FetchError) and err.__cause__.cause == "missing-shard"
        can_list = not spec.startswith(("http://", "https://")) and not spec.endswith(MANIFEST)
        found = _remote_glob(f"{spec.rstrip('/')}/*.tar") if is_missing and can_list else []
        if not found:
            raise
        return found


def _is_manifest(spec: str) -> bool:
    path = local_path(spec)
    return path.name == MANIFEST or path.is_dir() or not (spec.endswith(".tar") or has_magic(spec) or "{" in spec)


# ------------------------------------------------------------------------------------------------------ manifests


def _from_manifest(name: str, spec: str, patience: Patience) -> ShardList:
    if is_remote(spec):
        base = spec.rstrip("/").removesuffix(f"/{MANIFEST}")
        manifest = _remote_json(f"{base}/{MANIFEST}", patience)
        if not isinstance(manifest, dict) or manifest.get("format") != FORMAT:
            raise DataError(
                f"the manifest is not of format {FORMAT!r}",
                where=display_url(spec),
                expected="a folder of shards as `evatool data-prepare` writes it, or .tar files",
            )
        prefix, is_local = base, False
    else:
        folder = local_path(spec)
        folder = folder.parent if folder.name == MANIFEST else folder
        manifest = read_shard_manifest(folder)
        prefix, is_local = str(folder), True
    try:
        shards = manifest["shards"]
        found = ShardList(
            name=name,
            urls=[f"{prefix}/{_plain_name(shard['file'])}" for shard in shards],
            counts=np.array([shard["num_samples"] for shard in shards], dtype=np.int64),
            sizes=np.array([shard["bytes"] for shard in shards], dtype=np.int64),
            sha256=[shard.get("sha256") for shard in shards],
            indexes=[f"{prefix}/{_plain_name(shard['index'])}" for shard in shards]
            if is_local
            else [None] * len(shards),
            max_pixels=int(manifest.get("max_pixels", MAX_PIXELS)),
            decoded_bytes=int(manifest["decoded_bytes"]) if "decoded_bytes" in manifest else None,
        )
        if found.counts.shape != (len(shards),) or found.sizes.shape != (len(shards),):
            raise ValueError("num_samples or bytes of a shard is no number")
    except (KeyError, TypeError, ValueError, AttributeError, OverflowError) as err:
        raise DataError(f"the manifest cannot be read: {err!r}", where=display_url(spec)) from err
    if found.num_samples <= 0 or (found.counts < 0).any():
        raise DataError("the manifest lists no samples", where=display_url(f"{prefix}/{MANIFEST}"))
    return found


def _check_present(shards: ShardList, max_bad_fraction: float) -> None:
    """Compare the sizes of local tars with the manifest's before a long run begins.

    Raises: BadDataLimitError where too much is gone already.
    """
    # All of them where they are not too many; else evenly spread ones, which stand for the others.
    step = -(-len(shards.urls) // MAX_LOOKED_AT)
    missing, problems = 0.0, []
    looked_at = zip(shards.urls[::step], shards.sizes[::step].tolist(), shards.counts[::step].tolist(), strict=True)
    for url, size, count in looked_at:
        if is_remote(url):
            continue
        try:
            found = os.stat(url).st_size
        except OSError:
            found = 0
        if found != size:
            missing += step * count * max(0.0, 1 - found / max(1, size))
            problems.append(f"{url}: {f'{found} bytes instead of {size}' if found else 'missing'}")
    for problem in problems[:MAX_NAMED]:
        log.warning("source %s: %s", shards.name, problem)
    if len(problems) > MAX_NAMED:
        log.warning("source %s: and %d more", shards.name, len(problems) - MAX_NAMED)
    if missing > max_bad_fraction * shards.num_samples:
        raise BadDataLimitError(
            f"about {round(missing)} of {shards.num_samples} samples of source {shards.name!r} are gone",
            where="\n  ".join(problems[:5]),
            expected=f"at most data.max_bad_fraction = {max_bad_fraction} of them",
            fix="copy the shards again, or run `evatool data-prepare` again into a new folder",
        )


def _plain_name(name: str) -> str:
    if "\0" in name:
        raise ValueError(f"{name!r} is no name of a file")
    try:
        os.fsencode(name)  # JSON can hold half a character
    except UnicodeEncodeError as err:
        raise ValueError(f"{name!r} is no name of a file") from err
    if name.startswith("/") or (".." in name and ".." in name.split("/")):
        raise ValueError(f"{name!r} leads out of the folder")
    return name


def _remote_json(url: str, patience: Patience) -> Any:
    try:
        return parse_json(fetch_bytes(url, patience, MAX_MANIFEST_BYTES), memory_per_byte=20)
    except FetchError as err:
        raise DataError(f"{url.rpartition('/')[2]} cannot be fetched: {err}", where=display_url(url)) from err
    except ValueError as err:
        raise DataError(f"{url.rpartition('/')[2]} is no JSON: {err}", where=display_url(url)) from err


# ------------------------------------------------------------------------------------------------------ plain tars


def _from_tars(name: str, urls: Sequence[str], cache: ShardCache, patience: Patience, max_bad: float) -> ShardList:
    """Raises: DataError, BadDataLimitError."""
    found = count_samples(name, urls, cache, patience)
    _check_lost(name, urls, found.lost, max_bad)
    if not sum(found.counts):
        raise DataError(
            f"the shards of source {name!r} hold no samples",
            where=", ".join(map(display_url, urls[:5])),
            expected="tars, not compressed, whose members have names such as 00000.jpg",
        )
    return ShardList(
        name,
        list(urls),
        np.array(found.counts, np.int64),
        np.array(found.sizes, np.int64),
        [None] * len(urls),
        found.indexes,
        keeps_indexes=True,
        lost=found.lost,
    )


def _check_lost(name: str, urls: Sequence[str], lost: dict[str, str], max_bad_fraction: float) -> None:
    for url, cause in list(lost.items())[:MAX_NAMED]:
        log.warning("source %s: %s cannot be read and is left out: %s", name, display_url(url), cause)
    if len(lost) > max_bad_fraction * len(urls):
        shown = [f"{display_url(url)}: {cause}" for url, cause in list(lost.items())[:5]]
        raise BadDataLimitError(
            f"{len(lost)} of {len(urls)} shards of source {name!r} cannot be read",
            where="\n  ".join(shown),
            expected=f"at most data.max_bad_fraction = {max_bad_fraction} of them",
            fix="correct the list of shards, or raise data.max_bad_fraction",
        )
