"""Rows R17, R18 and R32 of docs/faults.md: counted, named, replaced the same way everywhere, never a hang."""

from __future__ import annotations

import json
import os
import random
import re
import subprocess
import sys
import time
from collections import Counter
from pathlib import Path
from typing import Any

import pytest
import torch
from faulty_server import Server, always, at_most, first, serve
from sample_pictures import image
from tiny_shards import keys, loader, plain_samples, take, write_prepared, write_tar

from evatool.core.errors import BadDataLimitError, EvatoolError, TransientError

QUICK = {"attempts": 3, "timeout_sec": 0.4, "backoff_sec": 0.01}


def far(server: Server, tmp_path: Path, **section: Any) -> dict[str, Any]:
    remote = {**QUICK, "cache_dir": str(tmp_path / "cache"), **section.pop("remote", {})}
    source = {"name": "far", "shards": section.pop("shards", server.url)}
    return {"sources": [source], "window_shards": 2, "remote": remote, "max_bad_fraction": 1.0, **section}


# ------------------------------------------------------------------------------------- R17: damaged and cut tars


@pytest.mark.parametrize("is_indexed", [True, pytest.param(False, marks=pytest.mark.slow)], ids=["index", "no-index"])
def test_r17_a_tar_cut_anywhere_loses_what_is_counted(tmp_path: Path, is_indexed: bool) -> None:
    folder = write_prepared(tmp_path / "set", 24, 8)
    tar = folder / "00001.tar"
    whole = tar.read_bytes()
    if not is_indexed:
        for path in folder.glob("*.index.json"):
            path.unlink()
    undamaged = keys(take(loader({"train": folder, "window_shards": 1}, global_batch_size=8), 3))
    rng = random.Random(0)
    for _ in range(100):
        tar.write_bytes(whole[: rng.randrange(len(whole))])
        section = {"train": folder, "window_shards": 1, "max_bad_fraction": 1.0, "remote": QUICK}
        found = loader(section, global_batch_size=8, with_text=False)
        read = keys(take(found, 3))
        # Each place has its own sample, or a spare that was counted.
        replaced = [i for i, (a, b) in enumerate(zip(read, undamaged, strict=True)) if a != b]
        assert found.bad.num_replacements == len(replaced)
        assert len(found.bad) >= len(replaced)  # a spare can be bad, too
        assert {bad.shard for bad in found.bad.first} <= {str(tar)}
        assert {bad.key for bad in found.bad.first if not bad.key.startswith("#")} <= set(undamaged)
        assert set(found.bad.causes) <= {"truncated-shard", "truncated", "no-picture", "unreadable", "zero-byte"}
    tar.write_bytes(whole)


def test_r17_a_flipped_byte_in_a_member_is_always_found(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 8, 8)
    tar, index = folder / "00000.tar", json.loads((folder / "00000.index.json").read_text())
    whole = tar.read_bytes()
    rng = random.Random(1)
    for _ in range(60):
        number = rng.randrange(8)
        member = index["starts"][number] + rng.choice([1, 2])  # png or txt; the json before them is not read
        offset, size = index["offsets"][member], index["sizes"][member]
        at = offset + rng.randrange(size)
        tar.write_bytes(whole[:at] + bytes([whole[at] ^ (1 << rng.randrange(8))]) + whole[at + 1 :])
        found = loader({"train": folder, "max_bad_fraction": 1.0}, global_batch_size=8)
        read = keys(take(found, 1))
        assert [(bad.key, bad.cause) for bad in found.bad.first] == [(f"k{number:05d}", "corrupt-member")]
        assert f"k{number:05d}" not in read


@pytest.mark.parametrize("seed", [0, *(pytest.param(seed, marks=pytest.mark.slow) for seed in (1, 2, 3))])
def test_r17_flipped_bytes_anywhere_never_crash(tmp_path: Path, seed: int) -> None:
    tar = write_tar(tmp_path / "0.tar", plain_samples(range(16)))
    whole = bytearray(tar.read_bytes())
    rng = random.Random(seed)
    (tmp_path / "sizes.json").write_text('{"0.tar": 16}')
    for _ in range(10):
        damaged = bytearray(whole)
        for _ in range(rng.randrange(1, 40)):
            damaged[rng.randrange(len(damaged))] = rng.randrange(256)
        tar.write_bytes(damaged)
        found = loader({"train": tar, "max_bad_fraction": 1.0, "remote": QUICK})
        try:
            (batch,) = take(found, 1)
        except BadDataLimitError:
            assert len(found.bad) > 8  # hardly anything was left
        else:
            assert len(batch.keys) == 16
            assert found.bad.num_replacements <= len(found.bad) * 16


@pytest.mark.parametrize("world_size", [1, 2, 4])
@pytest.mark.parametrize("num_workers", [0, pytest.param(2, marks=pytest.mark.e2e)])
def test_r17_spares_are_the_same_at_every_world_size(tmp_path: Path, world_size: int, num_workers: int) -> None:
    folder = write_prepared(tmp_path / "set", 40, 8)
    tar = folder / "00002.tar"
    tar.write_bytes(tar.read_bytes()[:10_000])
    section = {"train": folder, "window_shards": 2, "max_bad_fraction": 1.0}
    alone = take(loader(section), 8)
    assert any(b.keys != a.keys for a, b in zip(alone, take(loader(section, seed=6), 8), strict=True))
    ranks = [
        take(loader({**section, "num_workers": num_workers}, rank=r, world_size=world_size), 8)
        for r in range(world_size)
    ]
    for step, batch in enumerate(alone):
        for r in range(world_size):
            assert ranks[r][step].keys == batch.keys[r::world_size]
            assert torch.equal(ranks[r][step].image, batch.image[r::world_size])


def test_r17_beyond_a_tenth_of_a_percent_the_run_ends(tmp_path: Path) -> None:
    samples = plain_samples(range(2000))
    small = image(seed=0)
    for members in samples.values():
        members["png"] = small
    samples["k00700"]["png"] = b""
    tar = write_tar(tmp_path / "set.tar", samples)
    section = {"train": tar, "max_bad_fraction": 0.001}
    found = loader(section, global_batch_size=100, with_text=False)
    take(found, 40)
    assert found.counts() == {"data/bad_samples": 1.0, "data/bad/zero-byte": 1.0, "data/spares": 2.0}
    for key in ("k00100", "k01900"):
        samples[key]["png"] = b""
    write_tar(tar, samples)
    with pytest.raises(BadDataLimitError, match="samples cannot be read") as caught:
        take(loader(section, global_batch_size=100, with_text=False), 40)
    assert caught.value.exit_code == 78
    assert re.search(r"set.tar k\d{5}: zero-byte", str(caught.value))


# ---------------------------------------------------------------------------- R18 and R32: stores that do not answer


@pytest.mark.parametrize("fault", ["404", "500", "503", "stall", "drip", "cut", "short", "other", "refuse"])
def test_r18_what_fails_and_then_works_changes_nothing(tmp_path: Path, fault: str) -> None:
    folder = write_prepared(tmp_path / "set", 32, 8)
    undisturbed = take(loader({"train": folder, "window_shards": 2}), 2)
    with serve(folder) as server, at_most(15):
        server.faults = {f"0000{shard}.tar": first(2, fault) for shard in range(4)}
        found = loader(far(server, tmp_path))
        read = take(found, 2)
        assert server.num_fetches() == 4 * 3
    assert [b.keys for b in read] == [b.keys for b in undisturbed]
    assert all(torch.equal(a.image, b.image) for a, b in zip(read, undisturbed, strict=True))
    assert not found.bad


CAUSES = {
    "404": "missing-shard",
    "403": "forbidden",
    "500": "server-error",
    "stall": "timeout",
    "drip": "timeout",
    "cut": "partial-body",
    "short": "changed-shard",
    "other": "changed-shard",
    "refuse": "connection",
}


@pytest.mark.parametrize("fault", list(CAUSES))
def test_r18_a_shard_that_never_comes_is_replaced_named_and_counted(
    tmp_path: Path, fault: str, caplog: pytest.LogCaptureFixture
) -> None:
    folder = write_prepared(tmp_path / "set", 32, 8)
    with serve(folder) as server, at_most(15):
        server.faults = {"00001.tar": always(fault)}
        found = loader(far(server, tmp_path, window_shards=4))
        batches = take(found, 4)
        assert server.requests["00001.tar"] == 3  # then it is left alone
    assert all(len(b.keys) == 16 for b in batches)
    lost = {f"k{i:05d}" for i in range(8, 16)}
    assert not lost & set(keys(batches))
    assert dict(found.bad.causes) == {CAUSES[fault]: 8}
    assert caplog.text.count("00001.tar (all samples)") == 1
    assert found.counts()[f"data/bad/{CAUSES[fault]}"] == 8


def test_r18_beyond_the_limit_a_silent_store_is_transient_and_a_missing_shard_is_not(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 32, 8)
    for fault, kind, code in (("500", TransientError, 76), ("404", BadDataLimitError, 78)):
        with serve(folder) as server:
            server.faults = {"00001.tar": always(fault)}
            section = far(server, tmp_path, window_shards=4, max_bad_fraction=0.1)
            with pytest.raises(kind, match="8 of 32 samples cannot be read") as caught, at_most(10):
                take(loader(section, global_batch_size=32), 4)
        assert caught.value.exit_code == code


ONE_RANK = """
import json, sys, time
from tiny_shards import loader
found = loader(json.loads(sys.argv[1]), rank=int(sys.argv[2]), world_size=2)
print("ready", flush=True)
batches = iter(found)
for _ in sys.stdin:  # a step begins when both ranks have done the one before, as a collective makes them
    start = time.monotonic()
    batch = next(batches)
    print(json.dumps({"sec": time.monotonic() - start, "keys": batch.keys, "bad": found.bad.causes}), flush=True)
batches.close()
"""


@pytest.mark.e2e
def test_r18_no_rank_waits_alone(tmp_path: Path) -> None:
    """Two ranks at once, in step: a stalling shard holds both up for its tries and no longer, and all batches come."""
    folder = write_prepared(tmp_path / "set", 64, 8)
    undisturbed = keys(take(loader({"train": folder, "window_shards": 8}), 8))
    with serve(folder) as server:
        server.faults = {"00003.tar": always("stall")}
        section = json.dumps(far(server, tmp_path, num_workers=2, window_shards=8))
        command = [sys.executable, "-c", ONE_RANK, section]
        pipes = {"stdin": subprocess.PIPE, "stdout": subprocess.PIPE, "text": True, "bufsize": 1}
        ranks = [subprocess.Popen([*command, str(rank)], **pipes) for rank in range(2)]
        try:
            assert [rank.stdout.readline() for rank in ranks] == ["ready\n"] * 2
            steps = []
            for _ in range(8):
                for rank in ranks:
                    rank.stdin.write("next\n")
                steps.append([json.loads(rank.stdout.readline()) for rank in ranks])
            for rank in ranks:
                rank.stdin.close()
                assert rank.wait(timeout=30) == 0
        finally:
            for rank in ranks:
                rank.kill()
                rank.wait()
    read = [key for step in steps for pair in zip(*(rank["keys"] for rank in step), strict=True) for key in pair]
    lost = {f"k{i:05d}" for i in range(24, 32)}
    assert len(read) == 128
    assert not lost & set(read)
    assert all(b == a or a in lost for a, b in zip(undisturbed, read, strict=True))
    assert all(set(rank["bad"]) == {"timeout"} for rank in steps[-1])
    # Three tries of 0.4 s, and the same again for a process that waited for another one's tries.
    assert max(rank["sec"] for step in steps for rank in step) < 15
    assert sum(rank["sec"] for rank in steps[-1]) < 5


def test_r32_stale_lists(tmp_path: Path) -> None:
    """The list names a shard that is gone, and one that was written anew since."""
    folder = write_prepared(tmp_path / "set", 32, 8)
    with serve(folder) as server:
        (folder / "00000.tar").unlink()
        write_tar(folder / "00002.tar", plain_samples(range(8), "other"))
        found = loader(far(server, tmp_path, window_shards=4))
        read = keys(take(found, 4))
        assert dict(found.bad.causes) == {"missing-shard": 8, "changed-shard": 8}
        assert set(read) == {f"k{i:05d}" for i in (*range(8, 16), *range(24, 32))}


def test_r32_a_shard_that_shrank_or_grew_behind_its_list(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    for shard, count in enumerate((6, 10)):
        write_tar(tmp_path / "set" / f"{shard}.tar", plain_samples(range(shard * 20, shard * 20 + count)))
    (tmp_path / "set" / "sizes.json").write_text('{"0.tar": 8, "1.tar": 8}')
    with serve(tmp_path / "set") as server:
        found = loader(far(server, tmp_path, shards=f"{server.url}/{{0..1}}.tar"))
        read = keys(take(found, 1))
    assert len(read) == 16
    assert dict(found.bad.causes) == {"truncated-shard": 2}
    assert "holds 10 samples instead of 8; the others are not read" in caplog.text


@pytest.mark.parametrize("num_workers", [0, *(pytest.param(count, marks=pytest.mark.slow) for count in (1, 4))])
def test_shards_are_fetched_about_once_an_epoch(tmp_path: Path, num_workers: int) -> None:
    """At most 1.1 fetches a shard in the first epoch, what is fetched ahead of the batches under way included."""
    folder = write_prepared(tmp_path / "set", 480, 4)  # 120 shards
    largest = max(path.stat().st_size for path in folder.glob("*.tar"))
    with serve(folder) as server:
        # Read at once: a window of 8 samples, two batches of 4 in each worker, the next window and the spares'.
        section = {"window_shards": 2, "num_workers": num_workers, "max_bad_fraction": 0.0}
        section["remote"] = {"cache_bytes": largest * (12 if num_workers == 4 else 8)}
        found = loader(far(server, tmp_path, **section), global_batch_size=4)
        read = keys(take(found, 120))
        assert len(set(read)) == 480
        assert server.num_fetches() <= 1.1 * 120
        assert (
            sum(path.stat().st_size for path in (tmp_path / "cache").glob("*.tar")) <= section["remote"]["cache_bytes"]
        )
        before = server.num_fetches()
        take(loader(far(server, tmp_path, **section), global_batch_size=4, position=480), 240)
        assert server.num_fetches() - before <= 1.1 * 240


def test_bad_samples_do_not_scatter_fetches(tmp_path: Path) -> None:
    """Spares of a windowed source come from one window, so one bad sample a shard costs no fetch each."""
    samples = [plain_samples(range(shard * 8, shard * 8 + 8)) for shard in range(40)]
    for shard in samples:
        next(iter(shard.values()))["png"] = b""
    for number, shard in enumerate(samples):
        write_tar(tmp_path / "set" / f"{number:02d}.tar", shard)
    (tmp_path / "set" / "sizes.json").write_text(json.dumps({f"{n:02d}.tar": 8 for n in range(40)}))
    size = (tmp_path / "set" / "01.tar").stat().st_size
    with serve(tmp_path / "set") as server:
        limit = {"cache_bytes": 14 * size}  # two windows, and the spares'
        section = far(server, tmp_path, shards=f"{server.url}/{{00..39}}.tar", window_shards=4, remote=limit)
        found = loader(section)
        take(found, 20)
        assert found.bad.num_replacements == 40
        assert server.num_fetches() <= 1.1 * 40 + 2 * 4


def test_a_cache_that_cannot_hold_two_windows_is_refused(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 32, 8)
    with (
        serve(folder) as server,
        pytest.raises(EvatoolError, match=r"does not hold the 4 shards that are read at once \(4 windows of 2\)"),
    ):
        loader(far(server, tmp_path, remote={"cache_bytes": 50_000}))


def test_two_processes_fetch_a_shard_once(tmp_path: Path) -> None:
    folder = write_prepared(tmp_path / "set", 64, 8)
    with serve(folder) as server:
        for shard in range(8):
            server.faults[f"0000{shard}.tar"] = lambda number: time.sleep(0.1)  # long enough to meet
        found = loader(far(server, tmp_path, window_shards=8, num_workers=4))
        take(found, 4)
        assert server.num_fetches() == 8


def test_a_local_shard_that_vanishes_mid_run(tmp_path: Path, caplog: pytest.LogCaptureFixture) -> None:
    folder = write_prepared(tmp_path / "set", 40, 8)
    section = {"train": folder, "window_shards": 1, "max_bad_fraction": 1.0, "remote": QUICK}
    found = loader(section, global_batch_size=8)
    batches = iter(found)
    seen = set(next(batches).keys)
    gone = next(path for path in sorted(folder.glob("*.tar")) if f"k{int(path.stem) * 8:05d}" not in seen)
    gone.unlink()
    read = [next(batches) for _ in range(4)]
    assert dict(found.bad.causes) == {"missing-shard": 8}
    assert all(len(b.keys) == 8 for b in read)
    assert f"{gone} (all samples)" in caplog.text
    batches.close()
    assert "8 bad samples (8 missing-shard)" in caplog.text  # at the end, once more


def test_a_local_read_that_fails_and_then_works(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    folder = write_prepared(tmp_path / "set", 16, 8)
    undisturbed = take(loader({"train": folder}), 1)
    real, failures = os.pread, Counter[int]()

    def flaky(handle: int, size: int, offset: int) -> bytes:
        failures[offset] += 1
        if failures[offset] <= 2:
            raise OSError(5, "Input/output error")
        return real(handle, size, offset)

    monkeypatch.setattr(os, "pread", flaky)
    found = loader({"train": folder, "remote": QUICK})
    assert [b.keys for b in take(found, 1)] == [b.keys for b in undisturbed]
    assert not found.bad
