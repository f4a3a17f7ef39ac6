"""Broken input to every reader, for a time: nothing but an error that the user can mend comes out of them."""

from __future__ import annotations

import os
import random
from pathlib import Path

import pytest

from tests.fuzz.fuzzers import FUZZERS
from tests.fuzz.harness import Fuzzer, changed, fuzz, run_case, run_fuzzer

SECONDS = float(os.environ.get("EVATOOL_FUZZ_SECONDS", "20"))


@pytest.mark.slow
@pytest.mark.parametrize("name", FUZZERS)
def test_a_reader_refuses_what_it_cannot_read(name: str, tmp_path: Path) -> None:
    seed = int(os.environ.get("EVATOOL_FUZZ_SEED", "0"))
    totals = run_fuzzer(name, SECONDS, seed, tmp_path)
    assert totals.findings == []
    assert totals.executions >= 20


def test_a_raw_exception_is_found_once_and_kept(tmp_path: Path) -> None:
    def read(data: bytes, folder: Path) -> None:
        if data[:1] != b"s":
            raise KeyError(data[:1])

    totals = fuzz(Fuzzer("example", lambda folder: [b"seed"], read), 0.2, 0, tmp_path)
    assert len(totals.findings) == 1
    assert "KeyError in test_fuzzers.py, read" in totals.findings[0]
    assert len(list(tmp_path.glob("example-*.case"))) == 1


def test_memory_beyond_the_bound_is_found(tmp_path: Path) -> None:
    def read(data: bytes, folder: Path) -> None:
        if data != b"seed":
            assert len(b"x" * 100_000_000)

    totals = fuzz(Fuzzer("example", lambda folder: [b"seed"], read), 0.1, 0, tmp_path)
    assert [line.split(":")[0] for line in totals.findings] == ["too much memory"]


def test_changes_are_the_same_for_the_same_seed() -> None:
    made = [changed(b"some bytes", [b"others"], [b"word"], random.Random(5)) for _ in range(2)]
    assert made[0] == made[1]


@pytest.mark.parametrize("case", sorted((Path(__file__).parent / "found").glob("*.case")), ids=lambda path: path.stem)
def test_what_was_once_found_stays_refused(case: Path, tmp_path: Path) -> None:
    """The name of a case begins with that of its fuzzer."""
    fuzzer = FUZZERS[case.stem.partition("-")[0]]
    assert run_case(fuzzer, case.read_bytes(), tmp_path, None) in (None, "")
