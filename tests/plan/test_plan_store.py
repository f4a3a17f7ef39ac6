"""What a dry run says of stored teacher features."""

from __future__ import annotations

import json
from pathlib import Path
from typing import Any

import pytest

from evatool.data.feature_store.spec import StoreSpec
from evatool.plan.store import store_sizes
from evatool.recipe.load import resolve_table


def figures(folder: Path, store: dict[str, Any], **teacher: Any) -> dict[str, Any]:
    table = {
        "data": {"train": str(folder)},
        "model": {"preset": "EVA-02-L"},
        "teacher": {"model": "EVA01-CLIP-g-14", "store": store, **teacher},
        "optim": {"visual": {"lr": 1e-3}, "grad_clip_norm": 1.0},
        "train": {"samples_seen": 4096, "global_batch_size": 2048},
    }
    return store_sizes(resolve_table(table, "pretrain-mim").recipe)


@pytest.fixture
def shards(tmp_path: Path) -> Path:
    """1,000 pictures of 30 kB."""
    shards = [{"num_samples": 500, "bytes": 15_000_000} for _ in range(2)]
    (tmp_path / "manifest.json").write_text(json.dumps({"shards": shards}))
    return tmp_path


def test_bytes_are_the_stores_and_many_are_warned_of(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = figures(shards, {"views": 2})
    row = StoreSpec("patches", shards, (256, 1024)).row_bytes
    assert found == {
        "store.path": str(shards / "teacher-features"),
        "store.bytes_per_sample": 2 * row,
        "store.bytes": 2000 * row,
        "store.shard_bytes": 30_000_000,
        "store.times_the_shards": round(2000 * row / 30e6, 2),
    }
    assert row == 256 * 1024 * 2 + 8
    assert "1.05 GB, 35 times the 0.03 GB of the shards" in caplog.text
    assert "masked_only" in caplog.text


def test_few_bytes_are_not_warned_of(shards: Path, caplog: pytest.LogCaptureFixture) -> None:
    found = figures(shards, {"masked_only": True})
    assert found["store.bytes_per_sample"] == StoreSpec("patches", shards, (105, 1024)).row_bytes
    assert found["store.times_the_shards"] == 7.17
    assert not caplog.text


def test_what_is_not_known_is_left_out(tmp_path: Path) -> None:
    assert set(figures(tmp_path / "none", {})) == {"store.path", "store.bytes_per_sample"}
    assert figures(tmp_path / "some-{00..10}.tar", {})["store.path"] == str(tmp_path / "teacher-features")


def test_a_recipe_without_a_store_has_none() -> None:
    assert store_sizes(resolve_table({"data": {"kind": "drawings"}}, "data-prepare").recipe) == {}
