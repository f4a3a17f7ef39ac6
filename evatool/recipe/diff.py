"""What two recipes set differently. No torch."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

from evatool.recipe.load import Resolved
from evatool.recipe.write import flatten, to_table


@dataclass(frozen=True)
class Difference:
    """One key that is not the same in two recipes; None where it is absent.

    Attributes:
        origins: where each value came from.
    """

    key: str
    values: tuple[Any, Any]
    origins: tuple[str | None, str | None]


def recipe_differences(first: Resolved, second: Resolved) -> list[Difference]:
    """Keys with other values, in the order of the recipes' files. Where its figures come from is no difference."""
    tables = [flatten(to_table(each.recipe)) for each in (first, second)]
    keys = dict.fromkeys(key for table in tables for key in table if key not in ("source", "run_dir"))
    return [
        Difference(
            key,
            (tables[0].get(key), tables[1].get(key)),
            (first.origins.get(key), second.origins.get(key)),
        )
        for key in keys
        if tables[0].get(key) != tables[1].get(key)
    ]
