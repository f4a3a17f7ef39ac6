"""The README.md of an exported model: what it is, where it comes from, how to load it."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any


@dataclass(frozen=True)
class CardFacts:
    """What the card says of the model itself."""

    name: str
    source: str  # the run or file it was exported from
    architecture: Sequence[tuple[str, str]]  # rows of the table
    parameters: Mapping[str, int]  # by tower
    recipe_toml: str | None = None  # the resolved recipe of its training
    results: Sequence[tuple[str, str]] = field(default_factory=tuple)  # evaluation set -> figure
    evatool_version: str = ""


def model_card(facts: CardFacts, *, library: str, loading: str, notes: Sequence[str], verification: str) -> str:
    """Markdown for the folder's README.md.

    Args:
        library: the tag the Hugging Face hub knows, such as `open_clip`.
        loading: Python that loads the model, about three lines.
        notes: paragraphs after the loading code.
        verification: what was compared, and the largest difference.
    """
    total = sum(facts.parameters.values())
    rows = [*facts.architecture, *((f"parameters, {tower}", f"{n:,}") for tower, n in facts.parameters.items())]
    parts = [
        f"---\nlibrary_name: {library}\ntags:\n- clip\n- eva\n- zero-shot-image-classification\n---",
        f"# {facts.name}",
        f"A contrastive image-text model of the EVA-CLIP family with {total:,} parameters, exported by evatool "
        f"{facts.evatool_version}.",
        "## Loading",
        f"```python\n{loading}\n```",
        *notes,
        "## Architecture",
        _table(("", ""), [*rows, ("parameters, total", f"{total:,}")]),
        "## Verification",
        verification,
        "## Training",
        _training(facts),
        "## Evaluation",
        _table(("set", "result"), facts.results) if facts.results else "Not evaluated at the time of the export.",
        "## Licence",
        "The weights carry no licence of their own yet: whoever publishes them chooses one, in keeping with the "
        "licences of the training data and of any weights they were initialised from or distilled from.",
    ]
    return "\n\n".join(parts) + "\n"


def _training(facts: CardFacts) -> str:
    origin = f"Exported from `{facts.source}`."
    if facts.recipe_toml is None:
        return f"{origin} The recipe is not known."
    return f"{origin} The resolved recipe, with the data it names:\n\n```toml\n{facts.recipe_toml.strip()}\n```"


def _table(header: tuple[str, str], rows: Sequence[tuple[str, Any]]) -> str:
    lines = [f"| {header[0]} | {header[1]} |", "|---|---|"]
    return "\n".join([*lines, *(f"| {key} | {value} |" for key, value in rows)])
