"""Evaluation over ranks equals evaluation in one process, also with weights divided over the ranks."""

from __future__ import annotations

import json
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import pytest

pytestmark = pytest.mark.dist

DEBUG = "EVA02-CLIP-debug"


@pytest.fixture(scope="module")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> tuple[Path, Path]:
    """Run folder of data-prepare, and an exported model of random weights."""
    import torch

    from evatool.inference.loaded_clip import load_clip
    from evatool.model.config import ModelConfig
    from evatool.recipe.schema import DataPrepareRecipe, DrawingsSource
    from evatool.stages import data_prepare
    from evatool.runs.run_dir import RunOptions
    from evatool.formats.safetensors import write_safetensors

    folder = tmp_path_factory.mktemp("eval-ranks")
    recipe = DataPrepareRecipe(data=DrawingsSource(max_concepts=13, num_unseen=3))
    data_prepare.run(recipe, RunOptions(name="test", run_dir=folder / "data"))
    torch.manual_seed(0)
    clip = load_clip(DEBUG)
    model = folder / "model"
    model.mkdir()
    config: ModelConfig = clip.config
    (model / "model_config.json").write_text(json.dumps(config.to_json()))
    write_safetensors(model / "model.safetensors", dict(clip.model.named_parameters()))
    return folder / "data", model


def evaluate(data: Path, model: Path, run_dir: Path, shard: str, suite: str = "drawings") -> Any:
    """Body of one rank: the rows, or what was said."""
    from evatool.core.errors import EvatoolError
    from evatool.eval.results import read_results
    from evatool.recipe.schema import EvalRecipe, EvalSection
    from evatool.stages import eval as stage
    from evatool.runs.run_dir import RunOptions

    section = EvalSection(
        models={"m": str(model)},
        suite=suite,
        data=data,
        sets=["new-artist", "retrieval"] if suite == "drawings" else None,
        batch_size=3 if suite == "drawings" else 1,  # of three scenes: one rank has a batch more than the other
        num_bootstrap=20,
        num_threads=1,
        use_cache=False,
        shard_model=shard,  # type: ignore[arg-type]
    )
    try:
        stage.run(EvalRecipe(eval=section), RunOptions(name="t", run_dir=run_dir))
    except EvatoolError as error:
        return str(error)
    results = read_results(run_dir / "results.json") if (run_dir / "results.json").is_file() else None
    return [(r.set, r.metric, r.value, r.low, r.high, r.n) for r in results.results] if results else None


def answers(run_dir: Path) -> dict[str, np.ndarray]:
    found = {}
    for path in sorted((run_dir / "predictions" / "m").glob("*.npz")):
        with np.load(path, allow_pickle=False) as stored:
            found |= {f"{path.stem}/{name}": stored[name] for name in stored.files if name not in ("meta", "margin")}
    return found


@pytest.fixture(scope="module")
def alone(prepared: tuple[Path, Path], tmp_path_factory: pytest.TempPathFactory) -> tuple[list, dict]:
    run_dir = tmp_path_factory.mktemp("alone") / "run"
    rows = evaluate(*prepared, run_dir, "never")
    return rows, answers(run_dir)


@pytest.mark.parametrize(
    ("world_size", "shard"),
    [(2, "never"), pytest.param(3, "never", marks=pytest.mark.slow), (2, "always")],
    ids=["2", "3", "2-divided"],
)
def test_ranks_give_what_one_process_gives(
    run_on_ranks: Callable[..., list[Any]],
    prepared: tuple[Path, Path],
    alone: tuple[list, dict],
    tmp_path: Path,
    world_size: int,
    shard: str,
) -> None:
    run_on_ranks(evaluate, world_size, *prepared, tmp_path / "run", shard)
    from evatool.eval.results import read_results

    found = read_results(tmp_path / "run" / "results.json")
    rows = [(r.set, r.metric, r.value, r.low, r.high, r.n) for r in found.results]
    assert rows == alone[0]
    kept = answers(tmp_path / "run")
    assert kept.keys() == alone[1].keys()
    for name, value in kept.items():
        assert np.array_equal(value, alone[1][name]), name


@pytest.mark.parametrize("shard", ["never", "always"])
def test_localisation_over_ranks_gives_what_one_process_gives(
    run_on_ranks: Callable[..., list[Any]], prepared: tuple[Path, Path], tmp_path: Path, shard: str
) -> None:
    whole = evaluate(*prepared, tmp_path / "alone", "never", "drawings-localised")
    assert {row[1] for row in whole} >= {"patch_top1", "segmentation_miou", "patch_retrieval@1"}
    ranks = run_on_ranks(evaluate, 2, *prepared, tmp_path / "run", shard, "drawings-localised")
    assert ranks[0] == whole
    kept, alone = answers(tmp_path / "run"), answers(tmp_path / "alone")
    assert kept.keys() == alone.keys()
    for name, value in kept.items():
        assert np.array_equal(value, alone[name]), name


@pytest.mark.parametrize("shard", ["never", "always"])
def test_a_picture_that_one_rank_cannot_read_fails_the_set_on_all(
    run_on_ranks: Callable[..., list[Any]], prepared: tuple[Path, Path], tmp_path: Path, shard: str
) -> None:
    import shutil

    data = tmp_path / "eval"
    shutil.copytree(prepared[0] / "eval", data)
    tar = data / "new-artist" / "test" / "0.tar"
    from evatool.data.image.header import IMAGE_MEMBERS
    from evatool.data.tar.reader import TarReader

    reader = TarReader([tar])
    (image,) = reader.read(1, IMAGE_MEMBERS).values()  # rank 1's first picture
    tar.write_bytes(tar.read_bytes().replace(image, bytes(len(image))))
    said = run_on_ranks(evaluate, 2, data, prepared[1], tmp_path / "run", shard)
    assert all("evaluations failed (new-artist)" in text for text in said)
    assert all(reader.keys[1] in text for text in said)
