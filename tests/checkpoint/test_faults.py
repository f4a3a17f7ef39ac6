"""Crashes, full disks and damaged files: the newest whole checkpoint is always found, nothing damaged is loaded.

The rows R4, R6, R7 and R8 of docs/faults.md as far as one process shows them.
"""

from __future__ import annotations

import errno
import json
import os
import shutil
import sys
import threading
from pathlib import Path

import pytest
import torch
from costs import costs_of

from evatool.checkpoint import layout, load
from evatool.checkpoint.load import latest_checkpoint, load_checkpoint, read_model, verify
from evatool.core.errors import CheckpointError, RunFolderTakenError

FILES = [
    "model.safetensors",
    "extra.safetensors",
    "optimizer.safetensors",
    "groups.json",
    "train_state.json",
    "model_config.json",
    "resolved.toml",
    "MANIFEST.json",
]


class Killed(BaseException):
    """The process is gone: nothing after this reaches the disk."""


class FaultyDisk:
    """Counts every operation that changes the disk; the one numbered `fail_at` fails.

    With `Killed` all later ones fail too, as after kill -9; with an OSError they work, as on a full disk.
    """

    def __init__(self, monkeypatch: pytest.MonkeyPatch) -> None:
        self.count, self.fail_at, self.error = 0, -1, None
        for owner, name in [
            (Path, "mkdir"),
            (Path, "open"),
            (Path, "unlink"),
            (os, "fsync"),
            (os, "replace"),
            (shutil, "rmtree"),
        ]:
            monkeypatch.setattr(owner, name, self._wrap(getattr(owner, name)))
        write = layout.HashingFile.write

        def halfway(file, data):
            if self._is_due():
                file._file.write(bytes(data)[: len(data) // 2])
                file._file.flush()
                raise self.error
            write(file, data)

        monkeypatch.setattr(layout.HashingFile, "write", halfway)

    def _is_due(self) -> bool:
        self.count += 1
        if self.error is None:
            return False
        return self.count >= self.fail_at if isinstance(self.error, Killed) else self.count == self.fail_at

    def _wrap(self, function):
        def wrapped(*args, **kwargs):
            if self._is_due():
                raise self.error
            return function(*args, **kwargs)

        return wrapped

    def arm(self, fail_at: int, error: BaseException) -> None:
        self.count, self.fail_at, self.error = 0, fail_at, error

    def disarm(self) -> None:
        self.error = None


@pytest.fixture
def disk(monkeypatch) -> FaultyDisk:
    return FaultyDisk(monkeypatch)


def test_killed_at_every_write_boundary(save, disk, tmp_path):
    save(1, keep=1)
    disk.count = 0
    save(2, keep=1)
    num_operations = disk.count
    assert num_operations > 30
    outcomes = set()
    for fail_at in range(1, num_operations + 1):
        folder = tmp_path / f"killed{fail_at}"
        save(1, keep=1, folder=folder)
        disk.arm(fail_at, Killed())
        with pytest.raises(Killed):
            save(2, keep=1, folder=folder)
        disk.disarm()
        newest = latest_checkpoint(folder)
        assert newest is not None, fail_at
        step = load_checkpoint(newest).step
        assert torch.equal(load_checkpoint(newest).objective_state["model.weight"], torch.full((3, 2), float(step)))
        outcomes.add(step)
        # The next save needs no help, and clears away what was left behind.
        save(3, keep=1, folder=folder)
        assert [p.name for p in folder.iterdir()] == ["step_00000003"], fail_at
        shutil.rmtree(folder)
    assert outcomes == {1, 2}


@pytest.mark.parametrize(("code", "every"), [(errno.ENOSPC, 1), (errno.EIO, 6)], ids=["full disk", "broken disk"])
def test_disk_fails_at_write_boundaries(save, disk, tmp_path, code, every):
    save(1, keep=2)
    disk.count = 0
    save(2, keep=2)
    for fail_at in range(1, disk.count + 1, every):
        folder = tmp_path / f"full{fail_at}"
        first = save(1, keep=2, folder=folder)
        disk.arm(fail_at, OSError(code, os.strerror(code)))
        with pytest.raises(CheckpointError) as error:
            save(2, keep=2, folder=folder)
        disk.disarm()
        assert "disk is full" in error.value.what if code == errno.ENOSPC else "could not be saved" in error.value.what
        assert "--resume" in (error.value.fix or "")
        verify(first)
        assert latest_checkpoint(folder) in (first, folder / "step_00000002")
        assert not layout.unfinished_in(folder), "no half-written folder takes up the space that is missing"
        shutil.rmtree(folder)


def test_old_checkpoint_that_cannot_be_removed_is_only_a_warning(save, monkeypatch, caplog, tmp_path):
    save(1, keep=1)
    monkeypatch.setattr(shutil, "rmtree", lambda *args, **kwargs: (_ for _ in ()).throw(OSError(errno.EBUSY, "busy")))
    newest = save(2, keep=1)
    assert "could not remove the old checkpoint" in caplog.text
    assert latest_checkpoint(tmp_path) == newest


@pytest.mark.parametrize("allowed", [0, 1], ids=["before anything", "before the commit"])
def test_a_folder_that_was_taken_over_gets_no_checkpoint(save, tmp_path, allowed):
    save(1)
    asked = 0

    def check_owner():
        nonlocal asked
        asked += 1
        if asked > allowed:
            raise RunFolderTakenError("the run folder was taken over by another", where="there", fix="leave it")

    with pytest.raises(RunFolderTakenError, match="taken over by another") as caught:
        save(2, keep=1, check_owner=check_owner)
    assert (caught.value.where, caught.value.fix) == ("there", "leave it")
    assert [path.name for path in (tmp_path / "checkpoints").iterdir()] == ["step_00000001"]


@pytest.mark.parametrize("name", FILES)
@pytest.mark.parametrize("damage", ["bit flip", "truncated", "missing"])
def test_damage_is_found_named_and_passed_over(save, tmp_path, caplog, name, damage):
    whole, damaged = save(1), save(2)
    path = damaged / name
    content = path.read_bytes()
    if damage == "missing":
        path.unlink()
    elif damage == "truncated":
        path.write_bytes(content[:-1] if name != "MANIFEST.json" else content[:-3])
    else:
        # In the manifest, a bit of a checksum; elsewhere, one in the middle.
        at = content.index(b'"sha256": "') + 11 if name == "MANIFEST.json" else len(content) // 2
        path.write_bytes(content[:at] + bytes([content[at] ^ 1]) + content[at + 1 :])
    with pytest.raises(CheckpointError) as error:
        verify(damaged)
    if name != "MANIFEST.json":
        assert name in error.value.what
    with pytest.raises(CheckpointError):
        load_checkpoint(damaged)
    with pytest.raises(CheckpointError):
        read_model(damaged)
    assert latest_checkpoint(tmp_path) == whole
    assert "step_00000002" in caplog.text


def test_all_damaged(save, tmp_path):
    for step in (1, 2):
        (save(step) / "model.safetensors").write_bytes(b"")
    with pytest.raises(CheckpointError, match="all 2 checkpoints are damaged") as error:
        latest_checkpoint(tmp_path)
    assert "step_00000001" in error.value.what


MANIFESTS = {
    "list": "[]",
    "empty": "{}",
    "parent folder": '{"format": 1, "step": 1, "files": {"../model.safetensors": {"bytes": 1, "sha256": ""}}}',
    "absolute": '{"format": 1, "step": 1, "files": {"/etc/passwd": {"bytes": 1, "sha256": ""}}}',
    "bare number": '{"format": 1, "step": 1, "files": {"model.safetensors": 7}}',
    "later format": '{"format": 99, "step": 1, "files": {}}',
    "no files": '{"format": 1, "step": 1, "files": {}}',
    "text": "not json",
    "null byte": "\x00",
    "nested without end": "[" * 100_000,
}
RANGES: dict[str, object] = {
    "gap at the end": [[0, 40]],
    "overlap": [[0, 50], [40, -1]],
    "twice": [[0, -1], [0, -1]],
    "gap at the start": [[8, -1]],
    "number": 7,
    "half a range": [[0]],
    "text": "ab",
}


@pytest.mark.parametrize("manifest", MANIFESTS.values(), ids=MANIFESTS)
def test_foreign_manifests(save, manifest):
    path = save(1)
    (path / "MANIFEST.json").write_text(manifest)
    with pytest.raises(CheckpointError):
        load_checkpoint(path)


def give_ranges(path: Path, ranges: object) -> None:
    """Put them into the manifest of a checkpoint, -1 being the end of its file."""
    manifest = json.loads((path / "MANIFEST.json").read_text())
    entry = manifest["files"]["model.safetensors"]
    if isinstance(ranges, list):
        ranges = [[entry["bytes"] if place == -1 else place for place in each] for each in ranges]
    entry["writers"][0]["ranges"] = ranges
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("ranges", RANGES.values(), ids=RANGES)
def test_ranges_must_cover_the_file_once(save, ranges):
    path = save(1)
    give_ranges(path, ranges)
    with pytest.raises(CheckpointError, match="does not list a checkpoint's files"):
        verify(path)


def tensor_file(header: object, num_bytes: int = 24) -> bytes:
    """A safetensors file with this header, or with this text as its header."""
    text = (header if isinstance(header, str) else json.dumps(header)).encode()
    return len(text).to_bytes(8, "little") + text + bytes(num_bytes)


def entry(**changes: object) -> dict[str, object]:
    return {"weight": {"dtype": "F32", "shape": [3, 2], "data_offsets": [0, 24]} | changes}


FOREIGN = {
    "empty": b"",
    "pickle": b"\x80\x04K\x07.",
    "huge header": (2**62).to_bytes(8, "little") + b"{}",
    "list header": (2).to_bytes(8, "little") + b"[]",
    "header nested without end": tensor_file("[" * 100_000),
    "header that is no text": (4).to_bytes(8, "little") + b"\xff\xfe\xfd\xfc",
    "zip archive": b"PK\x03\x04" + bytes(60),
    "too few bytes": tensor_file(entry(), num_bytes=20),
    "too many bytes": tensor_file(entry(), num_bytes=28),
    "shape larger than the data": tensor_file(entry(shape=[3000, 2000])),
    "shape beyond any memory": tensor_file(entry(shape=[2**62, 2**62])),
    "negative shape": tensor_file(entry(shape=[-3, -2])),
    "fractional shape": tensor_file(entry(shape=[1.5, 4])),
    "fractional offsets": tensor_file(entry(data_offsets=[0.0, 24.0])),
    "offsets before the start": tensor_file(entry(data_offsets=[-24, 0])),
    "offsets as text": tensor_file(entry(data_offsets=["0", "24"])),
    "three offsets": tensor_file(entry(data_offsets=[0, 12, 24])),
    "dtype unknown": tensor_file(entry(dtype="F128")),
    "dtype is a list": tensor_file(entry(dtype=["F32"])),
    "tensor is a number": tensor_file({"weight": 7}),
}


LARGE = 32 * 2**20
LARGE_FOREIGN = {
    "header of nothing but brackets": tensor_file("[" * LARGE),
    "header of nothing but names": tensor_file(json.dumps({f"{i}": entry()["weight"] for i in range(400_000)})),
    "header as long as the file": (LARGE).to_bytes(8, "little") + b" " * LARGE,
    "many bytes too many": tensor_file(entry(), num_bytes=LARGE),
    "one byte too few": tensor_file(entry(shape=[LARGE // 4 + 1], data_offsets=[0, LARGE + 4]), num_bytes=LARGE + 3),
    "pickle without end": b"\x80\x04" + b"(" * LARGE,
}
"""Files of 30 to 60 MB."""


def give_file(path: Path, content: bytes, name: str = "model.safetensors") -> None:
    """Put a file into a checkpoint, and its size and checksum into the manifest."""
    (path / name).write_bytes(content)
    manifest = json.loads((path / "MANIFEST.json").read_text())
    manifest["files"][name] = {"bytes": len(content), "sha256": layout.sha256_of(path / name)}
    (path / "MANIFEST.json").write_text(json.dumps(manifest))


@pytest.mark.parametrize("content", FOREIGN.values(), ids=FOREIGN)
def test_foreign_tensor_files_with_a_matching_manifest(save, content):
    path = save(1)
    give_file(path, content)
    with pytest.raises(CheckpointError, match=r"model\.safetensors cannot be read"):
        load_checkpoint(path)


@pytest.mark.slow
@pytest.mark.skipif(sys.platform != "linux", reason="reads /proc")
def test_a_foreign_checkpoint_takes_no_more_than_twice_its_bytes(save, tmp_path):
    """R8: of all 37, and of large ones, above what reading a good one has taken; 4 MiB are the allocator's."""
    folders = {}
    for kind, text in MANIFESTS.items():
        folders[kind] = save(1, folder=tmp_path / f"manifest {len(folders)}")
        (folders[kind] / "MANIFEST.json").write_text(text)
    for kind, ranges in RANGES.items():
        folders[f"ranges: {kind}"] = save(1, folder=tmp_path / f"ranges {len(folders)}")
        give_ranges(folders[f"ranges: {kind}"], ranges)
    for kind, content in (FOREIGN | LARGE_FOREIGN).items():
        folders[f"file: {kind}"] = save(1, folder=tmp_path / f"file {len(folders)}")
        give_file(folders[f"file: {kind}"], content)
    assert len(folders) == 37 + len(LARGE_FOREIGN)
    good = ("readers:checkpoint", str(save(1)))
    costs = costs_of([("readers:checkpoint", str(path)) for path in folders.values()], [good, good])
    for (kind, path), cost in zip(folders.items(), costs, strict=True):
        size = sum(file.stat().st_size for file in path.iterdir())
        assert cost.error.startswith("CheckpointError"), (kind, cost)
        assert cost.peak_bytes <= 2 * size + 4 * 2**20, (kind, size, cost)
        assert cost.cpu_sec <= 10, (kind, cost)


def test_everything_is_on_the_disk_before_the_rename(save, monkeypatch, tmp_path):
    """Power loss: what was not flushed may be gone, so the final name must come after all flushes, then be flushed."""
    synced: set[int] = set()
    real_fsync, real_replace = os.fsync, os.replace
    seen_at_rename: list[set[int]] = []

    def fsync(descriptor):
        synced.add(os.fstat(descriptor).st_ino)
        real_fsync(descriptor)

    def replace(source, target):
        assert all(path.stat().st_ino in synced for path in [source, *Path(source).iterdir()])
        seen_at_rename.append(set(synced))
        real_replace(source, target)
        synced.clear()

    monkeypatch.setattr(os, "fsync", fsync)
    monkeypatch.setattr(os, "replace", replace)
    folder = save(1).parent
    assert len(seen_at_rename) == 1
    assert folder.stat().st_ino in synced, "the rename itself is flushed too"


def test_the_newest_is_by_step_whatever_the_clock_says(save, tmp_path, monkeypatch):
    """R27: a clock that jumped back leaves newer checkpoints with older times."""
    older, newest = save(1), save(2)
    os.utime(older, (2_000_000_000, 2_000_000_000))
    os.utime(newest, (1_000_000_000, 1_000_000_000))
    assert latest_checkpoint(tmp_path) == newest


def test_a_checkpoint_that_a_shared_disk_shows_late_is_waited_for(save, tmp_path, monkeypatch):
    """R27: rank 0 has found it; another machine's listing of the folder is older."""
    path = save(1)
    hidden = path.rename(tmp_path / "hidden")
    shown = threading.Timer(0.5, hidden.rename, (path,))
    shown.start()
    assert load_checkpoint(path, is_verified=True).step == 1
    shown.join()
    shutil.rmtree(path)
    monkeypatch.setattr(load, "_LATEST_SEEN_SEC", 0.3)
    with pytest.raises(CheckpointError):
        load_checkpoint(path, is_verified=True)
