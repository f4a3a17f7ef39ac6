"""Tar headers: the same members as `tarfile` and webdataset find, and every damage named."""

from __future__ import annotations

import gzip
import io
import mmap
import random
import tarfile
from pathlib import Path

import numpy as np
import pytest
from hypothesis import given, settings
from hypothesis import strategies as st

from evatool.data.tar import fast_scan as tar_runs
from evatool.data.tar import scan as tars
from evatool.data.tar.header import BLOCK
from evatool.data.tar.scan import CAUSES, MAX_NAME_BYTES, Member, TarScan, scan_tar

FORMATS = {"ustar": tarfile.USTAR_FORMAT, "gnu": tarfile.GNU_FORMAT, "pax": tarfile.PAX_FORMAT}
FILES = [("a.jpg", b"picture" * 300), ("a.txt", b"a caption"), ("deep/b.jpg", b""), ("deep/b.json", b"x" * 512)]


def make_tar(files: list[tuple[str, bytes]], form: int = tarfile.USTAR_FORMAT) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=form) as tar:
        for name, data in files:
            info = tarfile.TarInfo(name)
            info.size = len(data)
            tar.addfile(info, io.BytesIO(data))
    return out.getvalue()


def make_header(name: str, kind: bytes = tarfile.REGTYPE, size: int = 0, link: str = "") -> bytes:
    info = tarfile.TarInfo(name)
    info.type, info.size, info.linkname = kind, size, link
    return info.tobuf(tarfile.GNU_FORMAT)


def by_tarfile(data: bytes) -> list[Member]:
    with tarfile.open(fileobj=io.BytesIO(data), mode="r:") as tar:
        return [Member(e.name, e.offset_data, e.size) for e in tar if e.isreg()]


def causes(scan: TarScan) -> list[str]:
    assert all(problem.cause in CAUSES for problem in scan.problems)
    return [problem.cause for problem in scan.problems]


NAMES = st.text(st.characters(codec="utf-8", exclude_characters="\0/"), min_size=1, max_size=120).filter(
    lambda name: name != ".."
)


@settings(max_examples=60, deadline=None)
@given(
    files=st.lists(st.tuples(st.lists(NAMES, min_size=1, max_size=3).map("/".join), st.binary(max_size=1100))),
    form=st.sampled_from(["gnu", "pax"]),
)
def test_members_are_those_of_tarfile(files: list[tuple[str, bytes]], form: str) -> None:
    data = make_tar(files, FORMATS[form])
    scan = scan_tar(data)
    assert scan.members == by_tarfile(data)
    assert [data[m.offset : m.offset + m.size] for m in scan.members] == [content for _, content in files]
    assert scan.problems == []


@pytest.mark.parametrize("form", FORMATS)
def test_long_names_links_and_directories(form: str) -> None:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=FORMATS[form]) as tar:
        directory = tarfile.TarInfo("folder")
        directory.type = tarfile.DIRTYPE
        tar.addfile(directory)
        for name in ("n" * 100, "p" * 90 + "/" + "q" * 90, "short.txt"):
            info = tarfile.TarInfo(name)
            info.size = 700
            tar.addfile(info, io.BytesIO(bytes(700)))
        link = tarfile.TarInfo("link.jpg")
        link.type, link.linkname = tarfile.SYMTYPE, "/etc/passwd" if form == "ustar" else "l" * 150
        tar.addfile(link)
        last = tarfile.TarInfo("last.jpg")
        last.size = 3
        tar.addfile(last, io.BytesIO(b"end"))
    data = out.getvalue()
    scan = scan_tar(data)
    assert scan.members == by_tarfile(data)
    assert len(scan.members) == 4
    assert [(p.cause, p.name) for p in scan.problems] == [("link", "link.jpg")]


@pytest.mark.parametrize("form", ["gnu", "pax"])
def test_a_long_name_with_a_slash_where_its_header_cuts_it_is_no_directory(form: str) -> None:
    files = [("d" * 99 + "/" + "x" * 200 + ".jpg", b"picture" * 300), *FILES]
    data = make_tar(files, FORMATS[form])
    scan = scan_tar(data)
    assert scan.members == by_tarfile(data)
    assert len(scan.members) == len(files)


def test_tars_of_webdataset(tmp_path: Path) -> None:
    import webdataset

    path = tmp_path / "0.tar"
    with webdataset.TarWriter(str(path), encoder=False) as tar:
        for i in range(50):
            tar.write({"__key__": f"{i:05d}", "jpg": bytes([i]) * (40 * i), "txt": f"caption {i}".encode()})
    with path.open("rb") as file, mmap.mmap(file.fileno(), 0, access=mmap.ACCESS_READ) as mapped:
        scan = scan_tar(mapped)
        assert scan.members == by_tarfile(path.read_bytes())
        grouped = webdataset.tariterators.tar_file_expander([{"url": "0.tar", "stream": path.open("rb")}])
        assert [(m.name, mapped[m.offset : m.offset + m.size]) for m in scan.members] == [
            (entry["fname"], entry["data"])
            for entry in grouped
            if "fname" in entry  # a note of its own ends a tar
        ]
    assert scan.problems == []


@pytest.mark.parametrize("make", [bytes, bytearray, memoryview])
def test_any_buffer(make: type) -> None:
    data = make_tar(FILES)
    assert scan_tar(make(data)) == scan_tar(data)


def test_pax_size_and_large_numbers() -> None:
    """A size in a pax record replaces the header's; base 256 is how GNU tar writes what octal cannot hold."""
    record = b"12 size=700\n"
    pax = make_header("x", tarfile.XHDTYPE, len(record)) + record.ljust(BLOCK, b"\0")
    data = pax + make_header("big.bin", size=0) + bytes(1024) + make_header("next.txt", size=0) + bytes(2 * BLOCK)
    scan = scan_tar(data)
    assert scan.members == [Member("big.bin", 1536, 700), Member("next.txt", 3072, 0)]
    assert causes(scan) == []
    huge = make_header("huge.bin", size=2**40)
    assert huge[124] == 0x80
    assert [(p.cause, p.name) for p in scan_tar(huge + bytes(BLOCK)).problems] == [("truncated", "huge.bin")]


def test_cut_at_any_byte() -> None:
    """Whole members before the cut stay; unless only the end mark is gone, the cut is named."""
    rng = random.Random(0)
    files = [(f"{i:03d}.jpg", rng.randbytes(rng.randrange(3000))) for i in range(20)]
    data = make_tar(files, tarfile.GNU_FORMAT)
    whole = scan_tar(data).members
    last = whole[-1].offset + whole[-1].size
    for cut in [*rng.sample(range(1, last), 200), last - 1, whole[3].offset, whole[3].offset - BLOCK]:
        scan = scan_tar(data[:cut])
        assert scan.members == [m for m in whole if m.offset + m.size <= cut and cut >= m.offset]
        assert causes(scan) in (["truncated"], ["no-end-mark"], ["not-a-tar"])
        inside = any(m.offset - BLOCK < cut < m.offset + m.size for m in whole)
        assert (causes(scan) == ["truncated"]) == inside
    assert causes(scan_tar(data[: last + 512])) in ([], ["no-end-mark"])


def test_flipped_bytes() -> None:
    """A changed byte is either in a member's data, or the headers before it stay and the damage is named."""
    rng = random.Random(1)
    data = make_tar([(f"{i:03d}.txt", rng.randbytes(rng.randrange(600))) for i in range(20)])
    whole = scan_tar(data).members
    headers = [m.offset - BLOCK for m in whole]
    for _ in range(400):
        place = rng.randrange(whole[-1].offset + whole[-1].size)
        changed = bytearray(data)
        changed[place] ^= 1 << rng.randrange(8)
        scan = scan_tar(changed)
        hit = [i for i, start in enumerate(headers) if start <= place < start + BLOCK]
        if not hit:
            assert scan.members == whole
            assert scan.problems == []
        elif scan.problems:
            assert scan.members == whole[: hit[0]]
            assert causes(scan) == (["not-a-tar"] if hit[0] == 0 else ["damaged-header"])
        else:  # the checksum's own padding
            assert scan.members == whole
            assert 148 <= place - headers[hit[0]] < 156


def looked_at_closely(data: bytes, monkeypatch: pytest.MonkeyPatch) -> TarScan:
    """What a scan finds that takes no header for an ordinary one."""
    nothing = tar_runs.Run([], np.empty(0), np.empty(0), 0, False)
    with monkeypatch.context() as patched:
        patched.setattr(tars, "ordinary_members", lambda read, start, num_bytes: nothing)
        return scan_tar(data)


def webdataset_like(rng: random.Random, count: int) -> bytes:
    out = io.BytesIO()
    with tarfile.open(fileobj=out, mode="w", format=tarfile.PAX_FORMAT) as tar:
        for i in range(count):
            info = tarfile.TarInfo(f"{i:05d}.jpg")
            info.size, info.mtime = rng.randrange(1500), 1.7e9 + rng.random()
            tar.addfile(info, io.BytesIO(rng.randbytes(info.size)))
    return out.getvalue()


@pytest.mark.parametrize("at_once", [1, 2, 3, 7, 512])
@pytest.mark.parametrize("form", [*FORMATS, "webdataset"])
def test_ordinary_headers_judged_at_once_are_those_judged_one_by_one(
    form: str, at_once: int, monkeypatch: pytest.MonkeyPatch
) -> None:
    rng = random.Random(at_once)
    files = [(f"{i:03d}.txt", rng.randbytes(rng.randrange(600))) for i in range(12)]
    files[7:7] = [("n" * 99, b"x"), ("d/" + "n" * 120, b"y")] if form in ("gnu", "pax") else [("n" * 99, b"x")]
    data = webdataset_like(rng, 12) if form == "webdataset" else make_tar(files, FORMATS[form])
    monkeypatch.setattr(tar_runs, "_HEADERS_AT_ONCE", at_once)
    names = tar_runs.ordinary_members(lambda start: data[start : start + 1100], 0, len(data)).names
    # A time and its file are two headers: one of them alone is left to the closer look.
    assert len(names) == (
        min(12, at_once // 2) if form == "webdataset" else min(7, at_once) if at_once < 8 else len(names)
    )
    assert scan_tar(data) == looked_at_closely(data, monkeypatch)
    for _ in range(150):
        changed = bytearray(data)
        # Headers are where most can go wrong.
        member = rng.choice(scan_tar(data).members)
        place = (
            member.offset
            - BLOCK * rng.choice([1, 1, 2, 3])
            + rng.choice([*range(100), *range(100, 512, 3), 124, 135, 156])
        )
        changed[max(0, place)] = rng.choice([0, 1, 32, 47, 46, 55, 56, 120, 128, 255])
        assert scan_tar(bytes(changed)) == looked_at_closely(bytes(changed), monkeypatch)
    for _ in range(30):
        cut = data[: rng.randrange(len(data))]
        assert scan_tar(cut) == looked_at_closely(cut, monkeypatch)


@pytest.mark.parametrize(
    "name", ["/etc/passwd", "../a.txt", "a/../b.txt", "folder/", "\xff\xfe.txt", "a..b.txt", "é" * 40]
)
def test_unsafe_and_odd_names_among_ordinary_ones(name: str, monkeypatch: pytest.MonkeyPatch) -> None:
    header = bytearray(make_header("x" * 90, size=3))
    encoded = name.encode("latin-1" if name[0] == "\xff" else "utf-8")
    header[:100] = encoded.ljust(100, b"\0")
    header[148:156] = b" " * 8
    header[148:156] = b"%06o\0 " % sum(header)
    data = make_tar(FILES[:2])[:4096] + bytes(header) + b"abc".ljust(BLOCK, b"\0") + make_tar(FILES[2:])
    assert [m.name for m in scan_tar(data).members][:2] == ["a.jpg", "a.txt"]
    assert scan_tar(data) == looked_at_closely(data, monkeypatch)


@settings(max_examples=300, deadline=None)
@given(st.binary(max_size=3000), st.integers(0, 4))
def test_no_bytes_raise(tail: bytes, kept: int) -> None:
    data = make_tar(FILES, tarfile.PAX_FORMAT)
    scan = scan_tar(data[: kept * BLOCK] + tail)
    assert all(m.offset + m.size <= kept * BLOCK + len(tail) for m in scan.members)
    causes(scan)


def pax_member(records: bytes, name: str = "m.txt") -> bytes:
    padded = records + bytes(-len(records) % BLOCK)
    return make_header("p", tarfile.XHDTYPE, len(records)) + padded + make_header(name, size=0)


def long_name(name: bytes) -> bytes:
    padded = name + bytes(-len(name) % BLOCK)
    return make_header("././@LongLink", tarfile.GNUTYPE_LONGNAME, len(name)) + padded + make_header("n", size=0)


def sparse_member() -> bytes:
    header = bytearray(make_header("hole.bin", tarfile.GNUTYPE_SPARSE, 512))
    header[482] = 1  # the map goes on in the next block
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    return bytes(header) + bytes(BLOCK) + b"s" * BLOCK


BAD_MEMBERS = {
    "absolute": (make_header("/etc/passwd"), "unsafe-name"),
    "parent": (make_header("../up.txt"), "unsafe-name"),
    "parent inside": (make_header("a/../../up.txt"), "unsafe-name"),
    "parent at the end": (make_header("a/.."), "unsafe-name"),
    "parent with backslashes": (make_header("a\\..\\up.txt"), "unsafe-name"),
    "parent by pax": (pax_member(b"18 path=../up.txt\n"), "unsafe-name"),
    "absolute by pax": (pax_member(b"20 path=/etc/passwd\n"), "unsafe-name"),
    "absolute long name": (long_name(b"/" + b"a" * 200), "unsafe-name"),
    "hard link": (make_header("h.jpg", tarfile.LNKTYPE, 4096, "a.jpg"), "link"),
    "symbolic link": (make_header("s.jpg", tarfile.SYMTYPE, 0, "/etc/passwd"), "link"),
    "character device": (make_header("tty", tarfile.CHRTYPE), "device"),
    "block device": (make_header("sda", tarfile.BLKTYPE), "device"),
    "pipe": (make_header("fifo", tarfile.FIFOTYPE), "device"),
    "sparse": (sparse_member(), "sparse"),
    "sparse by pax": (pax_member(b"22 GNU.sparse.major=1\n"), "sparse"),
    "unknown type": (make_header("v", b"V", 700) + bytes(1024), "unknown-type"),
    "name of 5000 bytes": (long_name(b"a" * (MAX_NAME_BYTES + 1)), "long-name"),
    "name of 2 MiB": (long_name(b"a" * 2**21), "long-name"),
    "pax records of 2 MiB": (pax_member(b"2097152 comment=".ljust(2**21 - 1, b"x") + b"\n"), "long-name"),
    "no name": (make_header(""), "no-name"),
}


@pytest.mark.parametrize("case", BAD_MEMBERS)
def test_bad_members_are_named_and_the_rest_is_read(case: str) -> None:
    member, cause = BAD_MEMBERS[case]
    before = make_tar(FILES[:2])
    before = before[: by_tarfile(before)[-1].offset + BLOCK]
    scan = scan_tar(before + member + make_tar(FILES[2:]))
    assert [m.name for m in scan.members] == [name for name, _ in FILES]
    assert causes(scan) == [cause]
    assert scan.problems[0].offset >= len(before)


DAMAGED_TARS = {
    "empty": (b"", "empty"),
    "a page of HTML": (b"<html><body>404</body></html>".ljust(2048), "not-a-tar"),
    "gzip": (gzip.compress(make_tar([(f"{i}", random.Random(i).randbytes(900)) for i in range(4)])), "compressed"),
    "shorter than a block": (b"x" * 100, "truncated"),
    "two tars in one file": (make_tar(FILES) + make_tar(FILES), "data-after-end"),
    "a hole": (make_tar(FILES)[:6656] + bytes(1024) + b"lost", "data-after-end"),
    "a pax record without end": (pax_member(b"99 path=abc\n") + bytes(1024), "not-a-tar"),
    "a pax record without length": (pax_member(b"path=abc\n") + bytes(1024), "not-a-tar"),
    "a pax size below zero": (pax_member(b"11 size=-5\n") + bytes(1024), "not-a-tar"),
}


@pytest.mark.parametrize("case", DAMAGED_TARS)
def test_damaged_tars(case: str) -> None:
    data, cause = DAMAGED_TARS[case]
    assert cause in causes(scan_tar(data))


def test_damaged_extension_after_good_members() -> None:
    data = make_tar(FILES[:1])[: BLOCK * 6]
    scan = scan_tar(data + pax_member(b"99 path=abc\n") + make_tar(FILES))
    assert [m.name for m in scan.members] == ["a.jpg"]
    assert causes(scan) == ["damaged-header"]


def test_names_of_other_encodings_can_be_written_to_a_log() -> None:
    header = bytearray(make_header("caf_.txt"))
    header[3] = 0xE9
    header[148:156] = b" " * 8
    header[148:156] = f"{sum(header):06o}\0 ".encode()
    scan = scan_tar(bytes(header) + bytes(1024))
    assert [m.name for m in scan.members] == ["caf\\xe9.txt"]
    signed = bytearray(header)
    signed[148:156] = f"{sum(header[:148]) + 256 + sum(header[156:]) - 256:06o}\0 ".encode()
    assert scan_tar(bytes(signed) + bytes(1024)).members == scan.members


def test_global_pax_records_apply_to_what_follows() -> None:
    comment = b"16 comment=from\n"
    data = make_header("g", tarfile.XGLTYPE, len(comment)) + comment.ljust(BLOCK, b"\0") + make_tar(FILES)
    assert scan_tar(data).members == by_tarfile(data)
    assert len(scan_tar(data).members) == len(FILES)
