"""Readers of files by one text argument each, for `costs.py`."""

from __future__ import annotations

from pathlib import Path


def weights(path: str) -> None:
    """Open weights and read every tensor."""
    from evatool.weights.open import open_weights

    tensors = open_weights(Path(path))
    for name in tensors:
        tensors[name]


def recipe(path: str) -> None:
    """Load a recipe file."""
    from evatool.recipe.load import load_recipe

    load_recipe(path)


def suite(path: str) -> None:
    """Load a suite file."""
    from evatool.eval.suite import load_suite

    load_suite(path)


def shards(pattern: str) -> None:
    """Expand a pattern of shards."""
    from evatool.data.sources.shard_list import expand

    expand(pattern)


def json_file(path: str) -> None:
    """Read a JSON file."""
    from evatool.core.bounded_json import read_json

    read_json(path, 2**30)


def train_image(path: str) -> object:
    """An image as training with `decode = "fast"` reads it."""
    from evatool.data.image.nonstandard import TrainingImages

    return TrainingImages("convert", "fast", None)(Path(path).read_bytes(), 89_478_485)


def train_image_exact(path: str) -> object:
    """An image as training with `decode = "exact"` reads it."""
    from evatool.data.image.nonstandard import TrainingImages

    return TrainingImages("convert", "exact", None)(Path(path).read_bytes(), 89_478_485)


def eval_image(path: str) -> object:
    """An image as evaluation reads it."""
    from evatool.data.image.decode import decode_eval_image

    return decode_eval_image(Path(path).read_bytes(), 224)


def packed_image(path: str) -> object:
    """An image as data-prepare judges and decodes it."""
    from evatool.data.image.decode import decode_rgb

    return decode_rgb(Path(path).read_bytes())


def checkpoint(path: str) -> None:
    """Load a checkpoint, a folder, and read every tensor."""
    from evatool.checkpoint.load import load_checkpoint

    found = load_checkpoint(Path(path))
    for tensors in (found.objective_state, found.averaged_state, found.optimizer_state):
        for name in tensors:
            tensors[name]
