"""Run folders of an older evatool are resumed, and end as that evatool would have ended them.

`tests/assets/old_runs/` holds runs that commit b034c17 stopped after step 4 of 8, by kind and engine, and what it made
of each when it went on (`make.py` there says how). Weights, moments and figures are compared bit for bit where the
machine computes as the one that made them (`short_runs.arithmetic`); elsewhere norms and figures within `TOLERANCE`.
"""

from __future__ import annotations

import json
import re
import shutil
import subprocess
import sys
import tarfile
from collections.abc import Iterator
from pathlib import Path
from typing import Any
from unittest import mock

import pytest
import short_runs
from short_runs import DATA_PREPARE, arithmetic, contents_of, largest_difference, records_of, run_here, write_recipe

pytestmark = pytest.mark.e2e

ASSETS = Path(__file__).parents[1] / "assets" / "old_runs"
TOLERANCE = 1e-3
KINDS = ("train-clip", "train-clip-joint", "train-clip-sigmoid", "pretrain-mim", "distill")
ENGINES = ("single", "ddp", "fsdp2", "deepspeed")
MATRIX = [(kind, engine) for kind in KINDS for engine in ENGINES]
STORES = {"pretrain-mim-stored": "store-patches", "distill-stored": "store-embeddings"}


def unpack(archive: str, folder: Path) -> None:
    with tarfile.open(ASSETS / f"{archive}.tar.xz") as tar:
        tar.extractall(folder, filter="data")


@pytest.fixture
def shared(tmp_path: Path) -> Path:
    """A working directory with the old data, teacher, stores and evaluation."""
    unpack("shared", tmp_path)
    return tmp_path


@pytest.fixture
def shrunk() -> Iterator[None]:
    """The presets of the old runs, in this process."""
    from evatool.model.presets import PRESETS

    with mock.patch.dict(PRESETS):
        short_runs.shrink_presets()
        yield


def command_of(kind: str, engine: str, cell: dict[str, Any], folder: Path) -> list[str]:
    """The command that resumes an old run: the recipe as this evatool writes it, with the old run's settings."""
    settings = cell["command"][2:]
    return [*write_recipe(kind, folder), *settings, "--run-dir", f"{kind}/{engine}", "--resume"]


def check(run_dir: Path, expected: dict[str, Any], machine: dict[str, str]) -> None:
    """Compare what a resumed run became with what the older evatool made of it."""
    records, tensors = records_of(run_dir), contents_of(run_dir)
    largest = largest_difference(records, expected["records"])
    print(f"{run_dir.parent.name}/{run_dir.name}: largest relative difference {largest:.3g}")
    assert largest <= TOLERANCE
    assert tensors.keys() == expected["tensors"].keys()
    for file, theirs in expected["tensors"].items():
        ours = tensors[file]
        assert len(ours) == len(theirs)
        if file in ("model.safetensors", "ema.safetensors"):  # published names; others may be renamed
            assert ours.keys() == theirs.keys()
            for name, (_, norm) in theirs.items():
                assert ours[name][1] == pytest.approx(norm, rel=TOLERANCE, abs=1e-6), name
        if machine == arithmetic():
            assert sorted(digest for digest, _ in ours.values()) == sorted(digest for digest, _ in theirs.values())
    if machine == arithmetic():
        assert records == expected["records"]
        for file in ("model.safetensors", "ema.safetensors"):
            assert tensors.get(file) == expected["tensors"].get(file)
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"


def resume(kind: str, engine: str, folder: Path) -> None:
    unpack(kind, folder)
    stored = json.loads((folder / kind / "expected.json").read_text())
    cell = stored["cells"][engine]
    command, run_dir = command_of(kind, engine, cell, folder), folder / kind / engine
    assert json.loads((run_dir / "status.json").read_text())["state"] == "preempted"
    assert [record["step"] for record in records_of(run_dir)] == [1, 2, 3, 4]
    if cell["world_size"] == 1:
        run_here(command, folder)
    else:
        program = [sys.executable, str(Path(short_runs.__file__)), str(cell["world_size"]), *command]
        done = subprocess.run(program, cwd=folder, capture_output=True, text=True, timeout=300)
        assert done.returncode == 0, done.stderr[-4000:]
    check(run_dir, cell, stored["arithmetic"])


def slow_but(*quick: tuple[str, str]) -> list[Any]:
    return [pytest.param(*cell, marks=() if cell in quick else pytest.mark.slow, id="-".join(cell)) for cell in MATRIX]


@pytest.mark.parametrize(("kind", "engine"), slow_but(("train-clip", "single")))
def test_a_stopped_run_is_finished(shared: Path, shrunk: None, kind: str, engine: str) -> None:
    resume(kind, engine, shared)


@pytest.mark.slow
@pytest.mark.parametrize("kind", STORES)
def test_a_run_on_an_old_store_is_finished(shared: Path, shrunk: None, kind: str) -> None:
    """Rows stored before are read, none is written: a store of another digest would be refused or filled anew."""

    def rows() -> dict[str, bytes]:
        files = [shared / STORES[kind] / "store.json", *(shared / STORES[kind]).rglob("*.features")]
        return {path.name: path.read_bytes() for path in files}

    before = rows()
    assert any(name.endswith(".features") for name in before)
    resume(kind, "single", shared)
    assert rows() == before


def test_kept_predictions_of_an_evaluation_are_used(shared: Path, shrunk: None) -> None:
    """The evaluation goes on without a picture: predictions keep their bytes, which hold the seconds they took."""
    expected = json.loads((shared / "eval-expected.json").read_text())
    predictions = {path.name: path.read_bytes() for path in (shared / "eval" / "predictions").rglob("*.npz")}
    assert len(predictions) == 2
    run_here(["eval", "eval.toml", "--run-dir", "eval", "--resume"], shared)
    assert predictions == {path.name: path.read_bytes() for path in (shared / "eval" / "predictions").rglob("*.npz")}
    found = json.loads((shared / "eval" / "results.json").read_text())
    for model in (*found["models"], *expected["models"]):
        del model["recipe"]  # the next test's
    assert {name: found[name] for name in expected} == expected


def test_an_older_run_keeps_the_digest_of_its_recipe(shared: Path, shrunk: None) -> None:
    """By it results.json tells repetitions of one recipe; one written today must match those written before."""
    expected = json.loads((shared / "eval-expected.json").read_text())
    run_here(["eval", "eval.toml", "--run-dir", "eval", "--resume"], shared)
    found = json.loads((shared / "eval" / "results.json").read_text())
    assert [model["recipe"] for model in found["models"]] == [model["recipe"] for model in expected["models"]]


def test_prepared_data_counts_as_done(shared: Path) -> None:
    manifest = (shared / "data" / "train" / "manifest.json").stat().st_mtime_ns
    run_here(["data-prepare", *DATA_PREPARE, "--run-dir", "data", "--resume"], shared)
    assert (shared / "data" / "train" / "manifest.json").stat().st_mtime_ns == manifest


def test_a_resumed_run_that_differs_is_noticed(tmp_path: Path) -> None:
    """The comparison sees one weight changed in its last bits."""
    import torch
    from safetensors.torch import load_file, save_file

    unpack("train-clip", tmp_path)
    run_dir = tmp_path / "train-clip" / "single"
    expected = {"records": records_of(run_dir), "tensors": contents_of(run_dir)}
    (run_dir / "status.json").write_text('{"state": "done"}')
    check(run_dir, expected, arithmetic())
    (file,) = run_dir.rglob("optimizer.safetensors")
    state = load_file(file)
    name = max(state, key=lambda name: float(state[name].abs().max()) if name.startswith("exp_avg.") else 0.0)
    state[name] = torch.nextafter(state[name], torch.tensor(1.0))
    save_file(state, file)
    with pytest.raises(AssertionError):
        check(run_dir, expected, arithmetic())


def test_archives_tell_nothing_of_a_machine(tmp_path: Path) -> None:
    """No absolute path, no user and no host in any text file, nor in the archives' own entries."""
    absolute = re.compile(r'["\s=]/(?!/)[A-Za-z]')
    assert absolute.search('path = "/home/someone"')
    for archive in ASSETS.glob("*.tar.xz"):
        with tarfile.open(archive) as tar:
            for member in tar:
                assert not member.name.startswith("/")
                assert (member.uname, member.gname, member.uid) == ("", "", 0)
        unpack(archive.name.removesuffix(".tar.xz"), tmp_path)
    texts = [path for path in tmp_path.rglob("*") if path.suffix in (".json", ".jsonl", ".toml", ".txt", ".tsv")]
    assert len(texts) > 100
    for path in texts:
        assert not absolute.search(path.read_text(encoding="utf-8")), path
    for path in tmp_path.rglob("environment.json"):
        assert json.loads(path.read_text())["platform"] == "Linux"
    shutil.rmtree(tmp_path)
