"""`evatool data-prepare`: pictures and captions to shards, evaluation sets, a manifest and a contact sheet.

    train/00000.tar ... manifest.json   eval/<set>/...   contact_sheet.png   manifest.json

Everything is made in a hidden folder beside and moved into place at the end, the manifest last.
"""

from __future__ import annotations

import json
import logging
import os
import shutil
from collections.abc import Iterator
from contextlib import contextmanager
from pathlib import Path

from evatool.core.atomic_io import sync_folder, write_bytes_atomically
from evatool.core.disk import disk_trouble
from evatool.core.errors import TransientError
from evatool.core.progress import progress
from evatool.data.prepare.contact_sheet import draw_contact_sheet
from evatool.data.prepare.pack import Packed, pack_drawings, pack_folder
from evatool.data.tar.manifest import MANIFEST
from evatool.recipe.schema import DataPrepareRecipe
from evatool.runs.chain import use_data
from evatool.runs.result import Result
from evatool.runs.run_dir import RunDir, RunOptions, open_run_dir

log = logging.getLogger(__name__)

PARTIAL = ".partial"
MADE = ("train", "eval", "contact_sheet.png", MANIFEST)  # in the order they are moved into place


def run(recipe: DataPrepareRecipe, run: RunOptions) -> Result:
    """Prepare the data of `recipe`. A resumed run that was not finished starts again from nothing."""
    run_dir = open_run_dir(recipe, run)
    with _work_folder(run_dir) as work:
        match recipe.data.kind:
            case "drawings":
                packed = pack_drawings(recipe.data, recipe.shards, work, progress)
            case "folder":
                packed = pack_folder(recipe.data, recipe.shards, work, progress)
        draw_contact_sheet(packed.contact, work / "contact_sheet.png")
        manifest = packed.manifest | {"recipe": recipe.model_dump(mode="json", exclude_none=True)}
        write_bytes_atomically(work / MANIFEST, json.dumps(manifest, indent=1, ensure_ascii=False).encode())
        _publish(work, run_dir)
    return _result(packed, run.name, run_dir.path)


@contextmanager
def _work_folder(run_dir: RunDir) -> Iterator[Path]:
    """An empty folder to build in. Nothing of an earlier attempt survives, and nothing of this one if it fails.

    Its name is this start's own: a start that was taken over writes into none of the next one's files.
    """
    path = run_dir.path
    for name in [*MADE, *(left.name for left in path.glob(f"{PARTIAL}*"))]:
        _remove(path / name)
    work = path / f"{PARTIAL}-{run_dir.token}"
    work.mkdir()
    try:
        yield work
    except OSError as err:
        run_dir.check_owner()  # whoever took the folder over has removed `work`: that is the cause then
        trouble = disk_trouble(err)
        if trouble is None:
            raise
        free = shutil.disk_usage(path).free
        raise TransientError(
            f"{trouble}: {err.strerror}, {free / 2**20:.0f} MiB free",
            where=str(path),
            expected="room for the pictures once more, plus a tenth",
            fix="make room and run the same command again, or choose another disk with --run-dir",
        ) from err
    finally:
        _remove(work)


def _publish(work: Path, run_dir: RunDir) -> None:
    for name in MADE:
        if (work / name).exists():
            run_dir.check_owner()
            os.replace(work / name, run_dir.path / name)
            sync_folder(run_dir.path)


def _remove(path: Path) -> None:
    if path.is_dir() and not path.is_symlink():
        shutil.rmtree(path)
    else:
        path.unlink(missing_ok=True)


def _result(packed: Packed, name: str, run_dir: Path) -> Result:
    train = packed.manifest["train"]
    outputs = {"train": run_dir / "train", "contact_sheet": run_dir / "contact_sheet.png"}
    metrics: dict[str, float | int | str] = {
        "train_samples": train["num_samples"],
        "train_bytes": train["num_bytes"],
        "train_shards": train["num_shards"],
        "bad_samples": packed.num_bad,
    }
    table = [["set", "pictures", "classes"], ["train", f"{train['num_samples']}", ""]]
    if packed.manifest["eval"]:
        outputs["eval"] = run_dir / "eval"
    for set_name, entry in packed.manifest["eval"].items():
        metrics[f"eval_samples/{set_name}"] = entry["num_samples"]
        table.append([f"eval/{set_name}", f"{entry['num_samples']}", f"{entry['num_classes'] or ''}"])
    for cause, names in packed.manifest["bad_samples"].items():
        metrics[f"bad_samples/{cause}"] = len(names)
        table.append([f"skipped: {cause}", f"{len(names)}", ""])
    return Result("data-prepare", run_dir, outputs, metrics, use_data(name, run_dir), table)
