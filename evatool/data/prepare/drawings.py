"""The drawings that ship with the package: which picture trains, which evaluates, and with what words.

849 concepts, each drawn by up to ten icon sets of seven independent teams, 64 px on white. The split is fixed by
`split_seed`: whole sets are kept out of training (an artist, a shading, black and white), and so are `num_unseen`
concepts in every set.
"""

from __future__ import annotations

import gzip
import hashlib
import json
import random
from collections.abc import Iterable, Iterator
from dataclasses import dataclass
from functools import cached_property
from importlib import resources

import numpy as np
from PIL import Image

from evatool.core.errors import RecipeError
from evatool.data.image.header import encode_png
from evatool.data.tar.writer import Sample, json_member
from evatool.recipe.schema import DrawingsSource

TILE = 64
TILES_PER_ROW = 32

TRAIN_SETS = ("noto", "noto-v1", "fxemoji", "fluent-emoji-flat", "emojione", "streamline-emojis")
"""Colour sets of five teams. fluent-3d is the flat set's team, emojione-monotone is emojione's: never new artists."""

SETS = {
    "noto": ("Google, Noto Emoji", "Apache-2.0"),
    "noto-v1": ("Google, Noto Emoji (older)", "Apache-2.0"),
    "fxemoji": ("Mozilla, FxEmojis", "Apache-2.0"),
    "fluent-emoji-flat": ("Microsoft, Fluent Emoji", "MIT"),
    "fluent-3d": ("Microsoft, Fluent Emoji", "MIT"),
    "fluent-emoji-high-contrast": ("Microsoft, Fluent Emoji", "MIT"),
    "twemoji": ("Twitter, Inc. and other contributors, Twemoji graphics", "CC-BY-4.0"),
    "emojione": ("EmojiOne 2.x (Ranks.com)", "CC-BY-4.0"),
    "emojione-monotone": ("EmojiOne 2.x (Ranks.com)", "CC-BY-4.0"),
    "streamline-emojis": ("Streamline", "CC-BY-4.0"),
}
"""Credit and licence by set."""

TEMPLATES = ("{c}", "a drawing of {c}", "an icon of {c}", "a picture of {c}", "{c} icon")
"""Prompts of the evaluation sets. Short: the toy text towers have 16 tokens."""

GROUP_NAMES = {
    "activities": "activities",
    "animals-nature": "animals and nature",
    "food-drink": "food and drink",
    "objects": "objects",
    "travel-places": "travel and places",
}


@dataclass(frozen=True)
class Concept:
    """One thing that is drawn. `tiles` is (set, tile number) in the order of the sets."""

    code: str
    label: str
    tags: tuple[str, ...]
    group: str
    subgroup: str
    tiles: tuple[tuple[str, int], ...]

    @property
    def group_name(self) -> str:
        """The group in words."""
        return GROUP_NAMES.get(self.group, self.group.replace("-", " "))

    @property
    def subgroup_name(self) -> str:
        """The subgroup in words."""
        return self.subgroup.replace("-", " ")


@dataclass(frozen=True)
class Tile:
    """One picture of one concept by one set."""

    concept: Concept
    set: str
    index: int

    @property
    def key(self) -> str:
        """Sample name, unique over the package."""
        return f"{self.set}_{self.concept.code}"


@dataclass(frozen=True)
class EvalPlan:
    """An evaluation set before it is written: pictures with the number of their class, or with captions."""

    name: str
    kind: str  # "classification" or "retrieval"
    title: str
    classnames: tuple[str, ...]
    tiles: tuple[tuple[Tile, int], ...]  # class number; -1 for retrieval


class Drawings:
    """The bundled pictures with their split.

    Args:
        section: split seed, number of never-seen concepts, number of concepts.
    Raises: RecipeError when no concept would be left to train on.
    """

    def __init__(self, section: DrawingsSource) -> None:
        self.concepts = spread(load_concepts(), section.max_concepts)
        if section.num_unseen >= len(self.concepts):
            raise RecipeError(
                f"data.num_unseen = {section.num_unseen} leaves nothing of {len(self.concepts)} concepts to train on",
                expected="fewer never-seen concepts than concepts",
                fix="lower data.num_unseen or raise data.max_concepts",
            )
        # Ordered by a hash, so that the split depends on the seed and the concept alone, not on list order or on
        # the random module.
        ranked = sorted(self.concepts, key=lambda c: _digest(f"{section.split_seed}:{c.code}"))
        self.unseen_codes = frozenset(c.code for c in ranked[: section.num_unseen])
        self.seen = [c for c in self.concepts if c.code not in self.unseen_codes]
        self.unseen = [c for c in self.concepts if c.code in self.unseen_codes]
        self._sheets: dict[str, np.ndarray] = {}
        self._encoded: dict[str, bytes] = {}
        self._unseen_labels = frozenset(c.label for c in self.unseen)

    def tiles(self, concepts: Iterable[Concept], sets: Iterable[str]) -> list[Tile]:
        """Pictures of `concepts` by `sets`, concept by concept."""
        wanted = frozenset(sets)
        return [Tile(c, name, index) for c in concepts for name, index in c.tiles if name in wanted]

    def pixels(self, tile: Tile) -> np.ndarray:
        """uint8 (64, 64, 3)."""
        row, column = divmod(tile.index, TILES_PER_ROW)
        return self._sheet(tile.set)[row * TILE : (row + 1) * TILE, column * TILE : (column + 1) * TILE]

    def _sheet(self, name: str) -> np.ndarray:
        if name not in self._sheets:
            self._sheets[name] = load_sheet(name)
        return self._sheets[name]

    @cached_property
    def eval_plans(self) -> list[EvalPlan]:
        """Every evaluation set, in the order of reports."""
        seen = tuple(c.label for c in self.seen)
        plans = [
            self._labelled("new-artist", "new artist (twemoji)", seen, self.seen, ["twemoji"]),
            self._labelled("new-shading", "new shading (fluent-3d)", seen, self.seen, ["fluent-3d"]),
            self._labelled(
                "black-and-white",
                "black and white (fluent-emoji-high-contrast, emojione-monotone)",
                seen,
                self.seen,
                ["fluent-emoji-high-contrast", "emojione-monotone"],
            ),
            self._coarse("coarse-group", "5 groups (twemoji)", [c.group_name for c in self.seen]),
            self._coarse("coarse-subgroup", "subgroups (twemoji)", [c.subgroup_name for c in self.seen]),
            EvalPlan(
                "retrieval",
                "retrieval",
                "retrieval by caption (twemoji)",
                (),
                tuple((tile, -1) for tile in self.tiles(self.seen, ["twemoji"])),
            ),
        ]
        if self.unseen:
            labels = tuple(c.label for c in self.unseen)
            plan = self._labelled("never-seen", "never-seen concepts (twemoji)", labels, self.unseen, ["twemoji"])
            plans.insert(3, plan)
        return plans

    def train_sample(self, tile: Tile) -> Sample:
        """A training picture as a sample: `png`, `txt` = the label, `json` with all captions."""
        return self._sample(tile, {"txt": tile.concept.label.encode()}, captions=self.captions(tile.concept))

    def eval_samples(self, plan: EvalPlan) -> Iterator[Sample]:
        """Pictures of an evaluation set as samples in clip-benchmark's layout."""
        for tile, target in plan.tiles:
            if plan.kind == "retrieval":
                yield self._sample(tile, {"txt": tile.concept.label.encode()})
            else:
                yield self._sample(tile, {"cls": str(target).encode()})

    def captions(self, concept: Concept) -> list[str]:
        """Training captions of a concept, from which the loader may draw: label, prompts, label with tags, groups.

        No caption of a seen concept uses the whole label of a never-seen concept as a tag.
        """
        rng = random.Random(_digest(f"captions:{concept.code}"))
        tags = [t for t in concept.tags if t != concept.label and t not in self._unseen_labels]
        captions = [concept.label, *(template.format(c=concept.label) for template in TEMPLATES[1:])]
        for _ in range(3 if tags else 0):
            chosen = rng.sample(tags, min(len(tags), 3))
            captions.append(", ".join([concept.label, *chosen]))
        captions.append(f"{concept.label}, {concept.subgroup_name}")
        captions.append(f"{concept.label}, {concept.group_name}")
        return list(dict.fromkeys(captions))

    def _sample(self, tile: Tile, members: dict[str, bytes], captions: list[str] | None = None) -> Sample:
        concept = tile.concept
        info = {
            "concept": concept.code,
            "label": concept.label,
            "tags": concept.tags,
            "group": concept.group,
            "subgroup": concept.subgroup,
            "set": tile.set,
            "license": SETS[tile.set][1],
        }
        if captions is not None:
            info["captions"] = captions
        if tile.key not in self._encoded:  # the artist of several evaluation sets is encoded once
            self._encoded[tile.key] = encode_png(self.pixels(tile))
        return Sample(tile.key, "png", self._encoded[tile.key], {**members, "json": json_member(info)}, 3 * TILE * TILE)

    def _labelled(
        self, name: str, title: str, labels: tuple[str, ...], concepts: list[Concept], sets: list[str]
    ) -> EvalPlan:
        number = {label: i for i, label in enumerate(labels)}
        tiles = tuple((tile, number[tile.concept.label]) for tile in self.tiles(concepts, sets))
        return EvalPlan(name, "classification", title, labels, tiles)

    def _coarse(self, name: str, title: str, names: list[str]) -> EvalPlan:
        classes = tuple(sorted(set(names)))
        of_concept = {c.code: classes.index(n) for c, n in zip(self.seen, names, strict=True)}
        tiles = tuple((tile, of_concept[tile.concept.code]) for tile in self.tiles(self.seen, ["twemoji"]))
        return EvalPlan(name, "classification", title, classes, tiles)


def load_sheet(name: str) -> np.ndarray:
    """All pictures of a set on one sheet, uint8 (H, W, 3)."""
    with resources.files("evatool.data").joinpath("drawings", f"{name}.webp").open("rb") as file:
        return np.asarray(Image.open(file).convert("RGB"))


def load_concepts() -> list[Concept]:
    """All concepts of the package, in its order."""
    with resources.files("evatool.data").joinpath("drawings", "concepts.jsonl.gz").open("rb") as file:
        lines = gzip.decompress(file.read()).decode("utf-8").splitlines()
    concepts = []
    for row in map(json.loads, lines):
        tiles = tuple((name, index) for name, index in row["tiles"])
        concepts.append(Concept(row["code"], row["label"], tuple(row["tags"]), row["group"], row["subgroup"], tiles))
    return concepts


def spread(concepts: list[Concept], count: int | None) -> list[Concept]:
    """`count` concepts evenly over the list, which is sorted by group, so that few of them still cover the groups."""
    if count is None or count >= len(concepts):
        return concepts
    return [concepts[i * len(concepts) // count] for i in range(count)]


def _digest(text: str) -> bytes:
    return hashlib.sha256(text.encode()).digest()
