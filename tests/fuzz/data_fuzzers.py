"""Fuzzers of training data: tars, their indexes, manifests with counts beside them, captions and arrays."""

from __future__ import annotations

import io
import json
import random
import tarfile
from collections.abc import Sequence
from functools import cache
from pathlib import Path
from typing import Any

from tests.fuzz.harness import Fuzzer

NAMES = ("a.jpg", "a.txt", "b/c.png", "b/c.json", "._a.jpg", "README", "d" * 120 + ".txt", "é.TXT", "b/c.seg.png")


def tar_of(names: Sequence[str], form: int = tarfile.GNU_FORMAT) -> bytes:
    """A small tar with these members."""
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for number, name in enumerate(names):
            entry = tarfile.TarInfo(name)
            entry.size = 40 * number
            tar.addfile(entry, io.BytesIO(bytes(entry.size)))
    return out.getvalue()


# ------------------------------------------------------------------------------------------------------------ tars


def tar_seeds(folder: Path) -> Sequence[bytes]:
    """Tars of each format, compressed ones, and one whose samples do not stand together."""
    import gzip
    import lzma

    forms = (tarfile.USTAR_FORMAT, tarfile.GNU_FORMAT, tarfile.PAX_FORMAT)
    plain = [tar_of(NAMES if form != tarfile.USTAR_FORMAT else NAMES[:6], form) for form in forms]
    split = tar_of(["a.jpg", "b.jpg", "a.txt", "b.txt"])
    return [*plain, split, gzip.compress(plain[1], mtime=0), lzma.compress(plain[2])]


def read_tar(data: bytes, folder: Path) -> None:
    """Scan the tar, write and read its index, read every member at random, then all of them in order."""
    from evatool.data.sources.base import UnreadableSample
    from evatool.data.sources.stream import read_samples
    from evatool.data.tar.index import index_json, read_index, scan_file

    path = folder / "0.tar"
    path.write_bytes(data)
    found = scan_file(path)
    path.with_suffix(".json").write_bytes(index_json(found))
    again = read_index(path.with_suffix(".json"))
    assert [again.key(i) for i in range(len(again))] == [found.key(i) for i in range(len(found))]
    assert again.split_samples == found.split_samples
    assert all(str(problem) for problem in found.problems)
    for number in range(len(found)):
        assert all(place.offset + place.size <= len(data) for _, place in found.members(number))
    try:
        for _ in read_samples(io.BytesIO(data)):
            pass
    except _stream_errors() as err:
        raise UnreadableSample("stream-failed", str(err)) from err


def changed_header(data: bytes, rng: random.Random) -> bytes:
    """One field of one header changed, and the header's checksum made right again."""
    found = bytearray(data)
    starts = [at for at in range(0, len(data) - 511, 512) if data[at + 257 : at + 262] == b"ustar"]
    if not starts:
        return data[: rng.randrange(len(data) + 1)]
    at = rng.choice(starts)
    fields = ((0, 100), (124, 136), (156, 157), (157, 257), (257, 265), (345, 500), (482, 483), (504, 505))
    begin, end = rng.choice(fields)
    words = (
        b"\0",
        b"0",
        b"7777777",
        b"\x80\0\0\0\x7f",
        b"\xff" * 8,
        b"g",
        b"x",
        b"L",
        b"S",
        b"../a",
        b"/a.b",
        b"a.b.c",
    )
    word = rng.choice(words)[: end - begin]
    found[at + begin : at + begin + len(word)] = word
    found[at + 148 : at + 156] = b" " * 8
    found[at + 148 : at + 156] = b"%06o\0 " % sum(found[at : at + 512])
    return bytes(found)


# --------------------------------------------------------------------------------------------------------- indexes


def index_seeds(folder: Path) -> Sequence[bytes]:
    """Indexes of a fixed tar, with and without version and checksums."""
    from evatool.data.tar.index import index_json, scan_file

    path = folder / "0.tar"
    path.write_bytes(tar_of(NAMES))
    found = index_json(scan_file(path), tar_bytes=path.stat().st_size)
    names = ("keys", "starts", "extensions", "extension_ids", "offsets", "sizes", "crc32", "problems")
    table = json.loads(found)
    return [found, json.dumps({name: table[name] for name in names}).encode()]


def read_damaged_index(data: bytes, folder: Path) -> None:
    """Open a source whose index this is, and read every sample: nothing is lost that the tar still has."""
    import numpy as np

    from evatool.data.sources.base import MissingField, UnreadableSample
    from evatool.data.sources.cache import ShardCache
    from evatool.data.sources.fetch import Patience
    from evatool.data.sources.shard_list import ShardList
    from evatool.data.sources.tar_source import TarSource

    tar, index = folder / "0.tar", folder / "0.index.json"
    tar.write_bytes(tar_of(NAMES))
    index.write_bytes(data)
    patience = Patience(1, 1.0, 0.0)
    shards = ShardList("s", [str(tar)], np.array([5]), np.array([-1]), [None], [str(index)])
    source = TarSource(shards, ShardCache(folder / "cache", 10**6, patience), patience)
    refused = None
    for number in range(5):
        assert source.key(number)
        try:
            source.read(number, frozenset({"jpg", "png", "txt", "json"}))
            source.explain(number, MissingField("no-caption", "none"))
        except UnreadableSample as err:
            refused = err
            source.doubt(number)
    if refused is not None:
        raise refused


def with_right_checksums(data: bytes, rng: random.Random) -> bytes:
    """The body of an index changed in one value, under checksums that fit: such an index is believed."""
    import zlib

    try:
        table = json.loads(data)
        name = rng.choice(list(table))
        values: tuple[Any, ...] = (None, -1, 2**63, 1e30, "x", [], [[]], {}, [None], [0] * 50, [2**70], ["\ud800"])
        value = table[name]
        if isinstance(value, list) and value and rng.random() < 0.7:
            value[rng.randrange(len(value))] = rng.choice((*values, *value, *range(12), 512 * rng.randrange(20)))
        else:
            table[name] = rng.choice(values)
    except (ValueError, TypeError, IndexError):
        return data
    numbers = ("version", "tar_bytes", "tar_mtime_ns", "num_samples", "body_crc32", "head_crc32")
    body = json.dumps({key: item for key, item in table.items() if key not in numbers}).encode()[1:]
    head = b'{"version":2,"tar_bytes":1,"tar_mtime_ns":0,"num_samples":5,"body_crc32":%d' % zlib.crc32(body)
    return b'%s,"head_crc32":%d,%s' % (head, zlib.crc32(head), body)


# ------------------------------------------------------------------------------------------------------- manifests


def manifest_seeds(folder: Path) -> Sequence[bytes]:
    """Manifests of shards, and counts as `sizes.json` and img2dataset give them."""
    shard = {"file": "0.tar", "index": "0.index.json", "num_samples": 5, "bytes": len(tar_of(NAMES)), "sha256": None}
    manifest = {"format": "evatool-shards-1", "max_pixels": 100, "decoded_bytes": 10, "shards": [shard]}
    return [json.dumps(value).encode() for value in (manifest, {"0.tar": 5}, {"successes": 5, "count": 6})]


def read_manifest(data: bytes, folder: Path) -> None:
    """Open a folder with this manifest, and its tar with these counts beside it."""
    from evatool.core.errors import EvatoolError
    from evatool.data.sources.cache import ShardCache
    from evatool.data.sources.fetch import Patience
    from evatool.data.sources.shard_list import open_shard_list

    patience = Patience(1, 1.0, 0.0)
    shard_cache = ShardCache(folder / "cache", 10**6, patience)
    (folder / "0.tar").write_bytes(tar_of(NAMES))
    refused = None
    for name, spec in (("manifest.json", folder), ("sizes.json", "0.tar"), ("0_stats.json", "0.tar")):
        for other in ("manifest.json", "sizes.json", "0_stats.json"):
            (folder / other).unlink(missing_ok=True)
        (folder / name).write_bytes(data)
        try:
            found = open_shard_list("s", str(folder / spec), cache=shard_cache, patience=patience, max_bad_fraction=1.0)
            assert name == "manifest.json" or found.counts.tolist() == [5]
        except EvatoolError as err:
            refused = err
    if refused is not None:
        raise refused


# -------------------------------------------------------------------------------------------------------- captions


def caption_seeds(folder: Path) -> Sequence[bytes]:
    """Texts, json members, and arrays of both formats."""
    import numpy as np

    _tokenizer()  # loading it takes seconds, which are no reader's
    values = ({"captions": ["a", "b é"], "concept": "c"}, {"captions": "one", "concept": {"a": [1, 2]}}, [1], "x", None)
    array = io.BytesIO()
    np.save(array, np.arange(6, dtype=np.float32).reshape(2, 3))
    header = b'{"x":{"dtype":"F32","shape":[2,3],"data_offsets":[0,24]}}'
    tensors = len(header).to_bytes(8, "little") + header + bytes(24)
    return [*(json.dumps(value).encode() for value in values), "a caption é".encode(), array.getvalue(), tensors]


def read_member(data: bytes, folder: Path) -> None:
    """The bytes as every member of a sample that is not its image, for every place of a caption."""
    import numpy as np

    from evatool.data.sources.base import UnreadableSample
    from evatool.data.train.dataset import caption_id
    from evatool.data.train.sample_decoder import SampleDecoder, choose_caption
    from evatool.recipe.schema import CaptionChoice, ExtraMember

    tokenize = _tokenizer()
    members = {"png": b"", "txt": data, "json": data, "x.npy": data, "x.safetensors": data}
    places = [CaptionChoice(member="json", field="captions"), CaptionChoice()]
    extras = (
        ExtraMember(name="x", member="x.npy", shape=[2, 3]),
        ExtraMember(name="y", member="x.safetensors", tensor="x", shape=[2, 3]),
    )
    refused = []
    ways: list[tuple[Any, tuple[ExtraMember, ...]]] = [("txt", ()), ("json-captions", ()), (places, ())]
    ways += [(None, (extra,)) for extra in extras]
    for caption, extra in ways:
        decoder = SampleDecoder(caption, extra, lambda encoded, limit: (np.zeros((1, 1, 3), np.uint8), None))
        try:
            sample = decoder(members, 100)
        except UnreadableSample as err:
            refused.append(err)
            continue
        if caption is not None:
            chosen = choose_caption(sample, 0.5)
            tokenize([chosen])
            assert 0 <= caption_id(sample.concept, chosen) < 2**63
    if len(refused) == len(ways):
        raise refused[0]


@cache
def _tokenizer() -> Any:
    from evatool.data.tokenizer import build_tokenizer

    return build_tokenizer(16)


def _stream_errors() -> tuple[type[BaseException], ...]:
    from evatool.data.sources.stream import DECODING_ERRORS

    return DECODING_ERRORS


def _unreadable() -> tuple[type[BaseException], ...]:
    from evatool.data.sources.base import UnreadableSample

    return (UnreadableSample,)


TAR_WORDS = (
    b"ustar\0",
    b"ustar  \0",
    b"././@LongLink",
    b"30 path=",
    b"12 size=700\n",
    b"GNU.sparse.major=1",
    bytes(512),
)
JSON_WORDS = tuple(
    word.encode()
    for word in (
        *("[", "]", "{", "}", ",", ":", '"', "NaN", "Infinity", "-1", "1e400", "null", "true", "[[[[", "\\ud800"),
        *("9" * 30, '"num_samples":', '"shards":', '"captions":', '"concept":', '"keys":', '"../x"', '"a\\u0000"'),
    )
)
ARRAY_WORDS = (b"\x93NUMPY", b"'descr'", b"'<f4'", b"'|O'", b"True", b"(2, 3)", b'"dtype"', b'"F32"', b"data_offsets")

DATA_FUZZERS = (
    Fuzzer("tars", tar_seeds, read_tar, TAR_WORDS, _unreadable(), changed_header),
    Fuzzer("indexes", index_seeds, read_damaged_index, JSON_WORDS, _unreadable(), with_right_checksums),
    Fuzzer("manifests", manifest_seeds, read_manifest, JSON_WORDS),
    Fuzzer("captions", caption_seeds, read_member, (*JSON_WORDS, *ARRAY_WORDS), _unreadable()),
)
