"""What a training stage says of bad samples, and that it does not go on in another order."""

from __future__ import annotations

import io
import json
import shutil
import tarfile
from collections.abc import Callable
from pathlib import Path

import pytest

from evatool.core.errors import BadDataLimitError, CheckpointError, RecipeError
from evatool.runs.result import Result
from evatool.train.hooks.log import read_metrics

pytestmark = pytest.mark.e2e
Run = Callable[..., Result]


@pytest.fixture
def damaged(drawings: Path, tmp_path: Path) -> Path:
    """The drawings with one byte of one picture changed."""
    folder = shutil.copytree(drawings / "train", tmp_path / "train")
    index = json.loads((folder / "00000.index.json").read_text())
    images = [index["extensions"].index(name) for name in ("png", "webp") if name in index["extensions"]]
    members = range(index["starts"][3], index["starts"][4])
    offset = next(index["offsets"][i] for i in members if index["extension_ids"][i] in images)
    tar = folder / "00000.tar"
    data = bytearray(tar.read_bytes())
    data[offset + 40] ^= 1
    tar.write_bytes(data)
    return folder


def test_bad_samples_stand_in_log_metrics_and_result(
    damaged: Path, run_training: Run, tmp_path: Path, caplog: pytest.LogCaptureFixture
) -> None:
    caplog.set_level("WARNING", logger="evatool")
    samples = "train.samples_seen=200"  # more than two epochs of the few drawings
    data = f"data.train={json.dumps(str(damaged))}"
    result = run_training("train-clip", tmp_path / "run", data, samples, "data.max_bad_fraction=0.1")
    key = json.loads((damaged / "00000.index.json").read_text())["keys"][3]
    assert caplog.text.count(f"00000.tar {key}: corrupt-member") == 1
    records = read_metrics(result.outputs["metrics"])
    assert records[-1]["data/bad_samples"] == records[-1]["data/bad/corrupt-member"] == 1
    assert records[-1]["data/spares"] >= 1
    assert (result.metrics["bad_samples"], result.metrics["bad/corrupt-member"]) == (1, 1)
    with pytest.raises(BadDataLimitError, match="1 corrupt-member"):
        run_training("train-clip", tmp_path / "strict", data, samples, "data.max_bad_fraction=0.0")
    assert json.loads((tmp_path / "strict" / "status.json").read_text())["exit_code"] == 78


@pytest.mark.slow
def test_counts_go_on_where_a_run_is_resumed(damaged: Path, drawings: Path, run_training: Run, tmp_path: Path) -> None:
    data = (f"data.train={json.dumps(str(damaged))}", "data.max_bad_fraction=0.1", "checkpoint.every_steps=1")
    begun = run_training("train-clip", tmp_path / "run", *data, "train.samples_seen=200")
    last = begun.outputs["checkpoint"]
    counts = json.loads((last / "train_state.json").read_text())["data_counts"]
    assert counts["data/bad/corrupt-member"] == counts["data/bad_samples"] == 1
    shutil.rmtree(last)  # as if it had been stopped before
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "preempted", "exit_code": 75}))
    shutil.copy(drawings / "train" / "00000.tar", damaged / "00000.tar")  # nothing bad is met from here on
    resumed = run_training("train-clip", tmp_path / "run", *data, "train.samples_seen=200", resume=True)
    assert read_metrics(resumed.outputs["metrics"])[-1]["data/bad_samples"] == 1
    assert (resumed.metrics["bad_samples"], resumed.metrics["bad/corrupt-member"]) == (1, 1)


def test_a_run_of_another_order_is_not_resumed(
    run_training: Run, tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    from evatool.data.train import loader

    overrides = ("checkpoint.every_steps=2",)
    result = run_training("train-clip", tmp_path / "run", *overrides)
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "preempted", "exit_code": 75}))
    monkeypatch.setattr(loader, "ORDER_VERSION", 3)
    with pytest.raises(CheckpointError, match="begun with samples in another order: 2:"):
        run_training("train-clip", tmp_path / "run", *overrides, resume=True)
    assert result.outputs["checkpoint"].exists()


@pytest.mark.slow
@pytest.mark.parametrize("is_recorded", [True, False], ids=["recorded", "older run"])
def test_a_run_whose_shards_hold_other_samples_is_refused_and_goes_on_where_that_is_accepted(
    drawings: Path, run_training: Run, tmp_path: Path, is_recorded: bool, caplog: pytest.LogCaptureFixture
) -> None:
    tars = tmp_path / "tars"
    tars.mkdir()
    for path in (drawings / "train").glob("*.tar"):
        shutil.copy(path, tars)
    train = ("checkpoint.every_steps=2", f"data.train={json.dumps(str(tars))}")
    begun = run_training("train-clip", tmp_path / "run", *train)
    counts = json.loads((tmp_path / "run" / "data_samples.json").read_text())["sources"]["train"]
    status = tmp_path / "run" / "status.json"
    status.write_text(json.dumps({**json.loads(status.read_text()), "state": "preempted", "exit_code": 75}))
    shutil.rmtree(begun.outputs["checkpoint"])  # as if it had been stopped before
    (left,) = (tmp_path / "run" / "checkpoints").glob("step_*/train_state.json")
    begun_order = json.loads(left.read_text())["data_order"]
    if not is_recorded:
        (tmp_path / "run" / "data_samples.json").unlink()
    with tarfile.open(tars / "00000.tar", "a") as tar:
        for name, data in (("new.png", b"x"), ("new.txt", b"words")):
            entry = tarfile.TarInfo(name)
            entry.size = len(data)
            tar.addfile(entry, io.BytesIO(data))
    with pytest.raises(RecipeError if is_recorded else CheckpointError) as caught:
        run_training("train-clip", tmp_path / "run", *train, resume=True)
    if is_recorded:
        had = counts[0][1]
        assert caught.value.problems == [f"source train: 00000.tar had {had} samples and has {had + 1}"]
    assert "--accept-drift data.samples" in str(caught.value)
    caplog.set_level("WARNING", logger="evatool")
    settings = (*train, "data.max_bad_fraction=0.1")
    accepted = ("data.samples", "data.max_bad_fraction")
    result = run_training("train-clip", tmp_path / "run", *settings, resume=True, accept_drift=accepted)
    assert "the shards hold other samples than when the run was begun, as accepted" in caplog.text
    state = json.loads((result.outputs["checkpoint"] / "train_state.json").read_text())
    assert state["data_order"] != begun_order
    now = json.loads((tmp_path / "run" / "data_samples.json").read_text())["sources"]["train"]
    assert now[0][1] == counts[0][1] + 1
