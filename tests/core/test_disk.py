"""Full disks below the stages (row R6 of docs/faults.md): logs, lines and what an error means."""

from __future__ import annotations

import errno
import logging
import os
import sys
from pathlib import Path

import pytest
from small_disk import need_small_disks, run_on_small_disk

from evatool.core import logging as logs
from evatool.core.disk import LineFile, disk_error
from evatool.core.errors import DataError, ExitCode

FULL = Path("/dev/full")
needs_full = pytest.mark.skipif(not FULL.exists(), reason="needs /dev/full")


@pytest.mark.parametrize(
    ("code", "words"),
    [(errno.ENOSPC, "full"), (errno.EDQUOT, "quota"), (errno.EIO, "input/output"), (errno.EFBIG, "limit")],
    ids=["full", "quota", "broken", "limit"],
)
def test_a_disk_is_named_as_what_failed(code: int, words: str, tmp_path: Path) -> None:
    error = OSError(code, os.strerror(code), "a/file")
    try:
        raise RuntimeError("failed writing file") from error
    except RuntimeError as failed:
        found = disk_error(failed, tmp_path, "run it again")
    assert found is not None
    assert words in found.what
    assert (found.exit_code, found.where) == (ExitCode.TRANSIENT, "a/file")


def test_other_errors_stay_what_they_are(tmp_path: Path) -> None:
    for error in (PermissionError(errno.EACCES, "no"), RuntimeError("a bug"), DataError("bad"), KeyboardInterrupt()):
        assert disk_error(error, tmp_path, "") is None


@needs_full
def test_lines_wait_for_room_and_are_whole(tmp_path: Path, caplog: pytest.LogCaptureFixture, monkeypatch) -> None:
    monkeypatch.setattr(logging.getLogger("evatool"), "propagate", True)
    lines = LineFile(FULL)
    for line in ("one", "two"):
        lines.append(line)
    assert caplog.text.count("the disk is full") == 1
    with pytest.raises(OSError, match="No space"):
        lines.settle()
    there = os.open(tmp_path / "lines", os.O_WRONLY | os.O_CREAT)
    assert lines._descriptor is not None
    os.dup2(there, lines._descriptor)  # there is room again
    lines.append("three")
    lines.close()
    assert (tmp_path / "lines").read_text() == "one\ntwo\nthree\n"


@needs_full
def test_a_log_that_cannot_be_written_says_so_once(tmp_path: Path, capsys: pytest.CaptureFixture[str]) -> None:
    (tmp_path / "rank_00000.log").symlink_to(FULL)
    handler = logs.add_file(tmp_path)
    try:
        for number in range(3):
            handler.handle(logging.makeLogRecord({"msg": f"record {number}", "levelno": logging.INFO}))
    finally:
        logging.getLogger("evatool").removeHandler(handler)
        handler.close()
    said = capsys.readouterr().err
    assert said.count("cannot be written: No space left on device") == 1
    assert "Traceback" not in said


STATUS = """
import os, sys
from pathlib import Path
from evatool.core.errors import ExitCode
from evatool.runs.run_dir import RunDir
from evatool.runs.status import read_status, write_status
folder = Path(sys.argv[1])
write_status(folder, "running", None, None)
with open(folder / "filler", "wb", buffering=0) as filler:
    try:
        while filler.write(bytes(4096)):
            pass
    except OSError:
        pass
RunDir(folder).refresh_status()
RunDir(folder).fail(ExitCode.TRANSIENT, "the disk is full " * 1000)
status = read_status(folder)
print(status["state"], status["exit_code"], len(status["message"]) > 800, sorted(os.listdir(folder)))
"""


def test_a_status_is_true_on_a_disk_without_room(tmp_path: Path) -> None:
    need_small_disks()
    done = run_on_small_disk([sys.executable, "-c", STATUS, tmp_path], tmp_path, "32k")
    assert done.stdout == "failed 76 True ['filler', 'status.json']\n", done.stderr
