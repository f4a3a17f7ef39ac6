"""From a source to the finished set on disk: training shards, evaluation sets, and what the manifest says of them."""

from __future__ import annotations

import hashlib
from collections.abc import Callable, Iterator
from contextlib import AbstractContextManager
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

import numpy as np

from evatool.core.errors import DataError
from evatool.core.progress import ProgressBar
from evatool.core.regular_files import open_regular
from evatool.data.prepare.contact_sheet import Entry, thumbnail
from evatool.data.prepare.drawings import SETS, TEMPLATES, TRAIN_SETS, Drawings, Tile
from evatool.data.prepare.eval_layout import write_eval_set
from evatool.data.prepare.folder import ImageFolder, shown_name
from evatool.data.tar.writer import ShardWriter
from evatool.data.train.shuffle import shuffled
from evatool.recipe.schema import DrawingsSource, FolderSource, ShardSection

MANIFEST_FORMAT = "evatool-data-1"


Progress = Callable[[str, float | None], AbstractContextManager[ProgressBar]]
"""Opens a progress bar: description and total."""


@dataclass
class Packed:
    """The outcome of packing: shards are written; manifest and contact sheet are left for the stage to write."""

    manifest: dict[str, Any]
    contact: list[Entry] = field(default_factory=list)

    @property
    def num_bad(self) -> int:
        """Pictures and rows that were skipped."""
        return sum(len(names) for names in self.manifest["bad_samples"].values())


def pack_drawings(section: DrawingsSource, shards: ShardSection, folder: Path, progress: Progress) -> Packed:
    """Training shards and evaluation sets of the bundled drawings below `folder`.

    Training pictures equal to an evaluation picture, pixel for pixel, are left out and named in the manifest.
    """
    drawings = Drawings(section)
    eval_pixels = {_pixel_digest(drawings, tile) for plan in drawings.eval_plans for tile, _ in plan.tiles}
    tiles = drawings.tiles(drawings.seen, TRAIN_SETS)
    dropped = [tile.key for tile in tiles if _pixel_digest(drawings, tile) in eval_pixels]
    tiles = [tile for tile in tiles if tile.key not in set(dropped)]
    tiles = [tiles[i] for i in shuffled(len(tiles), shards.shuffle_seed).tolist()]
    total = len(tiles) + sum(len(plan.tiles) for plan in drawings.eval_plans)
    with progress("drawings", total) as bar:
        with ShardWriter(folder / "train", samples_per_shard=shards.samples_per_shard) as writer:
            for tile in tiles:
                writer.write(drawings.train_sample(tile))
                bar.advance(1)
            train = writer.finish(max_pixels=shards.max_pixels)
        eval_sets = {}
        for plan in drawings.eval_plans:
            eval_sets[plan.name] = write_eval_set(
                folder / "eval" / plan.name,
                _counted(drawings.eval_samples(plan), bar),
                kind=plan.kind,
                classnames=plan.classnames,
                templates=TEMPLATES,
                title=plan.title,
            )
    manifest = {
        "format": MANIFEST_FORMAT,
        "train": summary(train),
        "eval": {name: summary(entry) for name, entry in eval_sets.items()},
        "sources": _drawing_sources(tiles, drawings),
        "split": {
            "seed": section.split_seed,
            "train_sets": list(TRAIN_SETS),
            "num_seen": len(drawings.seen),
            "never_seen": [c.label for c in drawings.unseen],
            "dropped_equal_to_eval": dropped,
        },
        "bad_samples": {},
    }
    contact = [
        Entry(drawings.pixels(tile), tile.concept.label, tile.set) for tile in tiles[: shards.contact_sheet_images]
    ]
    return Packed(manifest, contact)


def pack_folder(section: FolderSource, shards: ShardSection, folder: Path, progress: Progress) -> Packed:
    """Training shards of a user's pictures below `folder`. Files are copied byte for byte.

    Raises: DataError, BadDataLimitError.
    """
    source = ImageFolder(section, shards)
    order = shuffled(len(source.images), shards.shuffle_seed)
    contact: list[Entry] = []
    with (
        progress(section.images.name, len(order)) as bar,
        ShardWriter(folder / "train", samples_per_shard=shards.samples_per_shard) as writer,
    ):
        for i in order.tolist():
            image = source.images[i]
            read = source.read(image)
            bar.advance(1)
            if read is None or source.bad.is_beyond_limit:
                continue  # beyond the limit nothing is kept; the rest is only searched, to name it all at once
            sample, pixels = read
            writer.write(sample)
            if len(contact) < shards.contact_sheet_images:
                contact.append(Entry(thumbnail(pixels), image.captions[0], shown_name(Path(image.file).name)))
        source.bad.check()
        if writer.num_samples == 0:
            raise DataError("no picture is left to train on", where=str(section.images), expected="at least one")
        train = writer.finish(max_pixels=shards.max_pixels)
    source.bad.report()
    with open_regular(section.captions) as file:
        captions_sha256 = hashlib.file_digest(file, "sha256").hexdigest()  # type: ignore[arg-type]  # BinaryIO
    credit = {
        "name": shown_name(str(section.images)),
        "captions": shown_name(str(section.captions)),
        "captions_sha256": captions_sha256,
        "caption_rows": source.num_rows,
        "license": section.license,
        "train_samples": train["num_samples"],
    }
    manifest = {
        "format": MANIFEST_FORMAT,
        "train": summary(train),
        "eval": {},
        "sources": [{name: value for name, value in credit.items() if value is not None}],
        "bad_samples": source.bad.by_cause,
    }
    return Packed(manifest, contact)


def summary(shard_manifest: dict[str, Any]) -> dict[str, Any]:
    """Counts, bytes and checksums of one folder of shards."""
    kept = {k: shard_manifest[k] for k in ("num_samples", "num_bytes", "decoded_bytes")}
    kept |= {k: shard_manifest[k] for k in ("kind", "title", "num_classes") if k in shard_manifest}
    shards = [{k: shard[k] for k in ("file", "num_samples", "bytes", "sha256")} for shard in shard_manifest["shards"]]
    return kept | {"num_shards": len(shards), "shards": shards}


def _drawing_sources(train_tiles: list[Tile], drawings: Drawings) -> list[dict[str, Any]]:
    used = [tile.set for tile in train_tiles]
    evaluated = {tile.key: tile.set for plan in drawings.eval_plans for tile, _ in plan.tiles}
    rows = []
    for name, (credit, licence) in SETS.items():
        counts = {"train_samples": used.count(name), "eval_samples": list(evaluated.values()).count(name)}
        rows.append({"name": name, "credit": credit, "license": licence, **counts})
    return [*rows, {"name": "labels, tags, groups", "credit": "emojibase-data", "license": "MIT"}]


def _pixel_digest(drawings: Drawings, tile: Tile) -> bytes:
    return hashlib.sha256(np.ascontiguousarray(drawings.pixels(tile)).tobytes()).digest()


def _counted(samples: Iterator[Any], bar: ProgressBar) -> Iterator[Any]:
    for sample in samples:
        yield sample
        bar.advance(1)
