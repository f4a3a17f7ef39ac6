"""Names that changed, each with the one it had before: what older runs wrote stays readable. No torch.

Applied where something is read, never where it is written; a value under both names is refused.
"""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

from evatool.core.errors import DataError

RECIPE_KEYS = {
    "pictures": "images",
    "images.num_pictures": "images.num_images",
    "data.odd_pictures": "data.nonstandard",
}
"""Dotted recipe keys, a table before the keys in it: recipes, `--set`, `unset` and `resolved.toml` of older runs."""

ADDED_RECIPE_KEYS: dict[str, Any] = {
    "data.remote.allow_private_redirects": False,
    "data.sources.sequential": False,
    "data.sources.allow_pipe": False,
    "train.tracking": {},
    "eval.model_weights": {},
    "model.image_mean": None,
    "model.image_std": None,
}
"""Keys with a default that recipes did not always have, and the value that stands for what was done before."""

FREED_RECIPE_KEYS: dict[str, Any] = {"eval.resize": "shortest"}
"""Keys that had a default and may be absent now, and that default: an older run that recorded it asked for nothing."""

PREDICTION_ARRAYS = {"picture_of_text": "image_of_text"}
"""Arrays of the predictions that an evaluation keeps (`predictions/*/*.npz`)."""

GALLERY_KEYS = {"picture": "image"}
"""Keys of one query or candidate in kept retrieval examples (`predictions/*/*.gallery.json`, `gallery.json`)."""


def rename(found: Mapping[str, Any], table: Mapping[str, str], where: str) -> dict[str, Any]:
    """`found` under today's names. Raises: DataError where a name stands there in both forms."""
    both = [f"{old} and {table[old]}" for old in found if old in table and table[old] in found]
    if both:
        raise DataError(f"one value under two names: {', '.join(both)}", where=where, fix="keep the newer name")
    return {table.get(name, name): value for name, value in found.items()}


def renamed_recipe_key(key: str) -> str:
    """A dotted recipe key under today's name."""
    for old, new in RECIPE_KEYS.items():
        if key == old or key.startswith(f"{old}."):
            key = new + key[len(old) :]
    return key


def rename_recipe_keys(table: dict[str, Any]) -> tuple[list[tuple[str, str]], list[str]]:
    """Bring a recipe's nested table to today's names, in place.

    Returns: the (old, new) pairs that were found, and the keys that could not be renamed since both names are set.
    """
    renamed, refused = [], []
    for old, new in RECIPE_KEYS.items():
        *parents, last = old.split(".")
        inner: Any = table
        for part in parents:
            inner = inner.get(part) if isinstance(inner, dict) else None
        if not isinstance(inner, dict) or last not in inner:
            continue
        target = new.rpartition(".")[2]
        if target in inner:
            refused.append(f"{old} and {new}")
            del inner[last]  # one problem is enough: the schema would call it unknown as well
            continue
        # Other keys keep their places: the order of a recipe's keys is that of its file.
        items = [(target if key == last else key, value) for key, value in inner.items()]
        inner.clear()
        inner.update(items)
        renamed.append((old, new))
    return renamed, refused


def first_recipe_key(key: str) -> str:
    """A dotted recipe key under the first name it had; digests of recipes are of these, and outlast a new name."""
    for old, new in reversed(RECIPE_KEYS.items()):
        if key == new or key.startswith(f"{new}."):
            key = old + key[len(new) :]
    return key


def without_added_keys(flat: Mapping[str, Any], prefix: str = "") -> dict[str, Any]:
    """Dotted recipe keys and their values without `ADDED_RECIPE_KEYS` at their defaults, in lists of tables too: a
    digest of the rest is the same for recipes of before and after."""
    kept: dict[str, Any] = {}
    for key, value in flat.items():
        name = f"{prefix}{key}"
        if name in ADDED_RECIPE_KEYS and value == ADDED_RECIPE_KEYS[name]:
            continue
        if isinstance(value, list):
            value = [without_added_keys(each, f"{name}.") if isinstance(each, dict) else each for each in value]
        kept[key] = value
    return kept
