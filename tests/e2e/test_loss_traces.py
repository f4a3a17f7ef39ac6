"""Short runs of each training stage give the stored loss traces, bit for bit where the machine computes alike.

The traces are those of commit b034c17 with dropout drawn by sample (`draws_keyed_by = "rank"` gave its very bits).
`EVATOOL_WRITE_TRACES=1` writes them anew, for a change that is meant to change them.
On a machine whose arithmetic is another (`short_runs.arithmetic`) figures may differ by `TOLERANCE`, relative to each:
with torch's vector instructions switched off (`ATEN_CPU_CAPABILITY=default`) the largest difference was 1.2e-4.
"""

from __future__ import annotations

import json
import os
import shutil
from pathlib import Path

import pytest
from short_runs import DATA_PREPARE, arithmetic, largest_difference, records_of, run_here, run_on_ranks, write_recipe

pytestmark = pytest.mark.e2e

TRACES = Path(__file__).parents[1] / "assets" / "loss_traces"
TOLERANCE = 1e-3
OTHERS = ("train-clip-sigmoid", "train-clip-joint", "pretrain-mim", "distill-two-teachers")
ON_RANKS = (("train-clip", "fsdp2"), ("train-clip", "ddp"), ("distill", "fsdp2"), ("distill", "ddp"))


@pytest.fixture(scope="module")
def folder(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """A working directory with the data, the train-clip run, and that run again as `teacher`."""
    folder = tmp_path_factory.mktemp("traces")
    run_here(["data-prepare", *DATA_PREPARE, "--run-dir", "data"], folder)
    run_here([*write_recipe("train-clip", folder), "--run-dir", "runs/train-clip"], folder)
    shutil.copytree(folder / "runs" / "train-clip", folder / "teacher")
    return folder


def check(name: str, run_dir: Path) -> None:
    """Compare a run's figures with the stored ones, or store them."""
    found, file = records_of(run_dir), TRACES / f"{name}.json"
    if os.environ.get("EVATOOL_WRITE_TRACES"):
        rows = ",\n".join("  " + json.dumps(record) for record in found)
        file.write_text(f'{{"arithmetic": {json.dumps(arithmetic())},\n "records": [\n{rows}\n ]}}\n', encoding="utf-8")
    stored = json.loads(file.read_text(encoding="utf-8"))
    largest = largest_difference(found, stored["records"])
    print(f"{name}: largest relative difference {largest:.3g}")
    if stored["arithmetic"] == arithmetic():
        assert found == stored["records"], f"largest relative difference {largest:.3g}"
    assert largest <= TOLERANCE


def test_train_clip(folder: Path) -> None:
    check("train-clip", folder / "runs" / "train-clip")


@pytest.mark.parametrize("name", ["distill", *OTHERS])
def test_other_stages(folder: Path, name: str) -> None:
    run_here([*write_recipe(name, folder), "--run-dir", f"runs/{name}"], folder)
    check(name, folder / "runs" / name)


@pytest.mark.slow
@pytest.mark.dist
@pytest.mark.parametrize(("name", "engine"), ON_RANKS, ids=[f"{name}-{engine}" for name, engine in ON_RANKS])
def test_two_ranks(folder: Path, name: str, engine: str) -> None:
    run_dir = f"runs/{name}-{engine}"
    options = ["--run-dir", run_dir, "--set", f"engine.kind={engine}"]
    assert run_on_ranks(["-m", "evatool"], [*write_recipe(name, folder), *options], folder, 2) == 0
    check(f"{name}-2-ranks-{engine}", folder / run_dir)


def test_a_trace_that_differs_is_noticed(folder: Path) -> None:
    """The comparison sees one bit of one figure, another step and another figure."""
    records = records_of(folder / "runs" / "train-clip")
    changed = [dict(record) for record in records]
    changed[3]["train/loss"] += 1e-12
    assert changed != records
    assert 0 < largest_difference(changed, records) < TOLERANCE
    with pytest.raises(AssertionError):
        largest_difference(records[1:], records)
    del changed[3]["train/loss"]
    with pytest.raises(AssertionError):
        largest_difference(changed, records)
