from __future__ import annotations

import errno
import hashlib
import json
from pathlib import Path

import numpy as np
import pytest
from PIL import Image
from preparing import prepare

from evatool.core.errors import EvatoolError, RecipeError, UsageError
from evatool.data.prepare import pack
from evatool.data.tar import writer as sharding
from evatool.data.tar.manifest import ShardIndex
from evatool.data.tar.writer import ShardWriter

TINY = {"kind": "drawings", "max_concepts": 12, "num_unseen": 2}
BOOKKEEPING = {"resolved.toml", "environment.json", "status.json", "logs"}


def names(folder: Path) -> set[str]:
    return {path.name for path in folder.iterdir()}


def status(folder: Path) -> dict[str, object]:
    return json.loads((folder / "status.json").read_text())


def test_a_run_folder_has_everything(small: Path) -> None:
    assert names(small) == BOOKKEEPING | {"train", "eval", "contact_sheet.png", "manifest.json", "result.json"}
    manifest = json.loads((small / "manifest.json").read_text())
    assert manifest["train"]["num_samples"] == sum(s["num_samples"] for s in manifest["train"]["shards"])
    for shard in manifest["train"]["shards"]:
        data = (small / "train" / shard["file"]).read_bytes()
        assert (len(data), hashlib.sha256(data).hexdigest()) == (shard["bytes"], shard["sha256"])
    assert sum(row.get("train_samples", 0) for row in manifest["sources"]) == manifest["train"]["num_samples"]
    assert all(row["license"] for row in manifest["sources"])
    assert manifest["recipe"]["data"] == {"kind": "drawings", "max_concepts": 30, "num_unseen": 5, "split_seed": 0}
    assert len(manifest["split"]["never_seen"]) == 5
    assert manifest["split"]["dropped_equal_to_eval"] == []
    assert manifest["bad_samples"] == {}
    sheet = np.asarray(Image.open(small / "contact_sheet.png"))
    assert sheet.shape[1] > 1000
    assert len(np.unique(sheet.reshape(-1, 3), axis=0)) > 1000  # pictures, not an empty page


def test_the_same_recipe_makes_the_same_bytes(tmp_path: Path) -> None:
    for run in ("a", "b"):
        prepare(tmp_path / run, TINY)
    made = [path.relative_to(tmp_path / "a") for path in (tmp_path / "a").rglob("*") if path.is_file()]
    made = [path for path in made if path.parts[0] in ("train", "eval", "manifest.json", "contact_sheet.png")]
    assert len(made) > 30
    for path in made:
        assert (tmp_path / "a" / path).read_bytes() == (tmp_path / "b" / path).read_bytes(), path
    # Another shuffle seed makes another order of the same samples; another split seed another split.
    prepare(tmp_path / "c", TINY, {"shuffle_seed": 1})
    prepare(tmp_path / "d", {**TINY, "split_seed": 1})
    keys = {run: ShardIndex(tmp_path / run / "train").keys for run in "acd"}
    assert keys["a"] != keys["c"]
    assert sorted(keys["a"]) == sorted(keys["c"]) != sorted(keys["d"])


def fail_after(writes: int, error: BaseException, monkeypatch: pytest.MonkeyPatch) -> None:
    """Make the n-th sample fail to be written."""
    count = 0
    write = ShardWriter.write

    def failing(self: ShardWriter, sample: sharding.Sample) -> None:
        nonlocal count
        count += 1
        if count > writes:
            raise error
        write(self, sample)

    monkeypatch.setattr(ShardWriter, "write", failing)


@pytest.mark.parametrize("writes", [0, 20, 60], ids=["first", "train", "eval"])
def test_a_full_disk_is_said_and_leaves_nothing(tmp_path: Path, writes: int, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(writes, OSError(errno.ENOSPC, "No space left on device"), patch)
        with pytest.raises(EvatoolError, match="the disk is full") as caught:
            prepare(tmp_path / "run", TINY)
    assert caught.value.exit_code == 76
    assert str(tmp_path / "run") in str(caught.value)
    assert names(tmp_path / "run") <= BOOKKEEPING
    assert status(tmp_path / "run")["state"] == "failed"
    prepare(tmp_path / "run", TINY)
    assert status(tmp_path / "run")["state"] == "done"


def test_a_full_disk_while_a_tar_is_closed(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    def full(self: object, data: bytes) -> int:
        raise OSError(errno.ENOSPC, "No space left on device")

    with monkeypatch.context() as patch:
        patch.setattr(sharding._HashingFile, "write", full)
        with pytest.raises(EvatoolError, match="the disk is full"):
            prepare(tmp_path / "run", TINY)
    assert names(tmp_path / "run") <= BOOKKEEPING


def test_ctrl_c_leaves_nothing_and_can_be_run_again(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    with monkeypatch.context() as patch:
        fail_after(30, KeyboardInterrupt(), patch)
        with pytest.raises(KeyboardInterrupt):
            prepare(tmp_path / "run", TINY)
    assert names(tmp_path / "run") <= BOOKKEEPING
    assert status(tmp_path / "run")["state"] == "interrupted"
    prepare(tmp_path / "run", TINY, resume=True)
    assert status(tmp_path / "run")["state"] == "done"


def test_what_a_killed_run_left_is_cleared_by_resume(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    # Killed between two renames: `train` is in place, the rest is not, and no code of ours ran afterwards.
    prepare(tmp_path / "run", TINY)
    run = tmp_path / "run"
    (run / "manifest.json").rename(run / "kept")
    expected = json.loads((run / "kept").read_text())
    for name in ("result.json", "contact_sheet.png", "kept"):
        (run / name).unlink()
    (run / "eval").rename(run / ".partial")
    (run / "status.json").write_text('{"state": "running"}')
    (run / "train" / "leftover.tar").write_bytes(b"")
    with pytest.raises(UsageError, match="already used"):
        prepare(run, TINY)
    prepare(run, TINY, resume=True)
    assert not (run / "train" / "leftover.tar").exists()
    assert not (run / ".partial").exists()
    assert json.loads((run / "manifest.json").read_text()) == expected


def test_nothing_is_public_before_the_manifest(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> None:
    seen: list[set[str]] = []
    write_eval_set = pack.write_eval_set

    def spying(folder: Path, *args: object, **options: object) -> dict[str, object]:
        seen.append(names(tmp_path / "run"))
        return write_eval_set(folder, *args, **options)

    monkeypatch.setattr(pack, "write_eval_set", spying)
    prepare(tmp_path / "run", TINY)
    assert len(seen) == 7
    assert all(not found & {"train", "eval", "manifest.json", "contact_sheet.png"} for found in seen)


def test_a_training_picture_equal_to_an_evaluation_picture_is_dropped(
    tmp_path: Path, monkeypatch: pytest.MonkeyPatch
) -> None:
    pixels = pack.Drawings.pixels

    def copied(self: pack.Drawings, tile: pack.Tile) -> np.ndarray:
        """noto's drawing of the first concept is twemoji's."""
        if tile.set == "noto" and tile.concept == self.seen[0]:
            (tile,) = self.tiles([tile.concept], ["twemoji"])
        return pixels(self, tile)

    monkeypatch.setattr(pack.Drawings, "pixels", copied)
    prepare(tmp_path / "run", TINY)
    manifest = json.loads((tmp_path / "run" / "manifest.json").read_text())
    (dropped,) = manifest["split"]["dropped_equal_to_eval"]
    assert dropped.startswith("noto_")
    assert dropped not in ShardIndex(tmp_path / "run" / "train").keys


def test_no_concept_left_to_train_on_is_a_recipe_error(tmp_path: Path) -> None:
    with pytest.raises(RecipeError, match="num_unseen = 12 leaves nothing of 12 concepts"):
        prepare(tmp_path / "run", {"kind": "drawings", "max_concepts": 12, "num_unseen": 12})
