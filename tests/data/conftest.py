"""The bundled drawings, prepared once for all tests of this folder."""

from __future__ import annotations

from functools import cache
from pathlib import Path

import pytest
import torch
from preparing import prepare

from evatool.data.prepare import drawings

torch.set_num_threads(1)  # the pictures are tiny: more threads only wait for each other


# Decoded once for all tests, not once a run: most of a small run's time.
drawings.load_sheet = cache(drawings.load_sheet)


@pytest.fixture(scope="session")
def prepared(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of the whole set with the default split."""
    folder = tmp_path_factory.mktemp("drawings") / "run"
    prepare(folder, {"kind": "drawings"})
    return folder


@pytest.fixture(scope="session")
def small(tmp_path_factory: pytest.TempPathFactory) -> Path:
    """Run folder of 30 concepts, 5 of them never seen, in shards of 40."""
    folder = tmp_path_factory.mktemp("small") / "run"
    prepare(folder, {"kind": "drawings", "max_concepts": 30, "num_unseen": 5}, {"samples_per_shard": 40})
    return folder
