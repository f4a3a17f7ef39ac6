from __future__ import annotations

from collections.abc import Callable
from pathlib import Path

import pytest

TRAIN_CLIP = """
stage = "train-clip"
data.train = "shards"
model.preset = "EVA02-CLIP-toy"
optim.visual.lr = 1e-3
optim.text.lr = 1e-3
train.samples_seen = 1000
train.global_batch_size = 10
"""


@pytest.fixture
def write(tmp_path: Path, monkeypatch: pytest.MonkeyPatch) -> Callable[..., Path]:
    """Writes recipe files into the current directory, so that messages name them as typed."""
    monkeypatch.chdir(tmp_path)

    def write_file(name: str, text: str) -> Path:
        path = Path(name)
        path.parent.mkdir(parents=True, exist_ok=True)
        path.write_text(text, encoding="utf-8")
        return path

    return write_file


@pytest.fixture
def train_clip(write: Callable[..., Path]) -> Path:
    """A minimal valid train-clip recipe."""
    return write("mine.toml", TRAIN_CLIP)
