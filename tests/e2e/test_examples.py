"""The examples of docs/examples run as their pages say."""

from __future__ import annotations

import os
import subprocess
import sys
from pathlib import Path

import pytest
from PIL import Image
from tiny_shards import write_prepared

EXAMPLES = Path(__file__).resolve().parents[2] / "docs" / "examples"
MODEL = "EVA02-CLIP-debug"


def run_example(name: str, *arguments: str) -> list[str]:
    command = [sys.executable, str(EXAMPLES / name), *arguments]
    done = subprocess.run(command, capture_output=True, text=True, timeout=300)
    assert done.returncode == 0, done.stderr[-3000:]
    return done.stdout.splitlines()


@pytest.fixture
def images(tmp_path: Path) -> list[Path]:
    paths = [tmp_path / f"{name}.png" for name in ("red", "green")]
    for path in paths:
        Image.new("RGB", (40, 30), path.stem).save(path)
    return paths


@pytest.mark.slow
def test_classify_names_one_label_an_image(images: list[Path]) -> None:
    lines = run_example("classify.py", MODEL, "cat,dog", *map(str, images))
    assert [line.partition(": ")[0] for line in lines] == [str(path) for path in images]
    assert all(line.partition(": ")[2].split()[0] in ("cat", "dog") for line in lines)


@pytest.mark.slow
def test_search_orders_the_folder(images: list[Path]) -> None:
    lines = run_example("search.py", MODEL, str(images[0].parent), "a cat", "2")
    assert sorted(line.split()[1] for line in lines) == ["green.png", "red.png"]
    scores = [float(line.split()[0]) for line in lines]
    assert scores == sorted(scores, reverse=True)


@pytest.mark.slow
def test_a_loss_of_ones_own_trains(tmp_path: Path) -> None:
    write_prepared(tmp_path / "train", 40, 20)
    lines = run_example("custom_loss.py", str(tmp_path / "train"), "3")
    assert [line.partition(":")[0] for line in lines[-3:]] == [
        "train/contrastive_loss",
        "train/equal_captions_loss",
        "train/margin",
    ]


@pytest.mark.slow
def test_the_chain_runs_and_goes_on(tmp_path: Path) -> None:
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    for _ in range(2):  # the second time every stage is done already
        done = subprocess.run(
            ["bash", str(EXAMPLES / "chain.sh")],
            cwd=tmp_path,
            env={**os.environ, "PATH": path, "RECIPES": "debug"},
            capture_output=True,
            text=True,
            timeout=900,
        )
        assert done.returncode == 0, done.stderr[-3000:]
    assert (tmp_path / "eval.json").is_file()
