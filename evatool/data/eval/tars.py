"""clip-benchmark's local `wds/` layout: tars beside text files with class names and templates."""

from __future__ import annotations

from pathlib import Path

from evatool.core.errors import DataError
from evatool.data.eval.samples import MASK_MEMBER, TarSamples
from evatool.data.image.header import IMAGE_MEMBERS
from evatool.data.tar.manifest import MANIFEST, read_shard_manifest

ALLOWED_MEMBERS = frozenset((*IMAGE_MEMBERS, "cls", "txt", "json"))
"""Members by the last part of their extension. clip-benchmark hands a set to webdataset's `.decode()`, which would
unpickle members of other names; a set that has any is refused, here as for whoever opens it there."""

KINDS = ("classification", "retrieval", "localisation")
_LABEL = {"classification": "cls", "retrieval": "txt", "localisation": MASK_MEMBER}
_NAMES, _TEMPLATES = "classnames.txt", "zeroshot_classification_templates.txt"


def open_tars(folder: Path, split: str) -> tuple[str, list[str], list[str], TarSamples]:
    """Kind, class names, templates and samples. Raises: DataError naming the file that is missing or wrong."""
    kind, tars = _check_layout(folder, split)
    samples = TarSamples(tars, kind)
    _check_members(folder, split, samples, kind)
    if kind == "retrieval":
        return kind, [], [], samples
    return kind, read_lines(folder / _NAMES), read_lines(folder / _TEMPLATES), samples


def read_lines(path: Path) -> list[str]:
    """The lines of a text file without spaces around them, as clip-benchmark reads them.

    Raises: DataError where it is not UTF-8, or a line between others is empty: all that follow would be numbered wrong.
    """
    try:
        lines = [line.strip() for line in path.read_text(encoding="utf-8").rstrip().splitlines()]
    except UnicodeDecodeError as err:
        raise DataError(f"{path.name} is not UTF-8: {err}", where=str(path), fix="save it as UTF-8") from err
    if "" in lines:
        raise DataError(
            f"line {lines.index('') + 1} of {path.name} is empty",
            where=str(path),
            expected="a name or a prompt in every line: the line's number is the class id",
            fix="remove the line, or write what belongs there",
        )
    return lines


def _check_layout(folder: Path, split: str) -> tuple[str, list[Path]]:
    """Kind and tars of a set. clip-benchmark itself goes on without class names and fails much later."""
    count_file = folder / split / "nshards.txt"
    kind_file = folder / "dataset_type.txt"
    kind = kind_file.read_text(encoding="utf-8").strip().lower() if kind_file.is_file() else "classification"
    if kind not in KINDS:
        raise DataError(
            f"evaluation set {folder.name} is of kind {kind!r}",
            where=str(kind_file),
            expected=f"one of {', '.join(KINDS)}",
            fix="sets with several labels a picture are not evaluated: leave it out with eval.sets",
        )
    needed = [] if kind == "retrieval" else [_NAMES, _TEMPLATES]
    try:
        needed += [f"{split}/{number}.tar" for number in range(int(count_file.read_text(encoding="utf-8")))]
    except ValueError as err:
        raise DataError(
            f"{count_file} does not hold a number", expected="the number of tars", fix="copy or convert the set again"
        ) from err
    missing = [name for name in needed if not (folder / name).is_file()]
    if missing:
        raise DataError(
            f"evaluation set {folder.name} lacks {', '.join(missing)}",
            where=str(folder),
            expected="one class name, or one prompt with {c} for it, a line; tars from 0.tar on",
            fix="copy the set again, or add what is missing",
        )
    return kind, [folder / name for name in needed if name.endswith(".tar")]


def _check_members(folder: Path, split: str, samples: TarSamples, kind: str) -> None:
    label = _LABEL[kind]
    for i, key in enumerate(samples.keys):
        extensions = samples.extensions(i)
        refused = [e for e in extensions if e.rpartition(".")[2] not in ALLOWED_MEMBERS]
        if refused:
            raise DataError(
                f"evaluation set {folder.name} has a member {key}.{refused[0]} that is not read, "
                "because it may hold code",
                expected=f"members of {', '.join(sorted(ALLOWED_MEMBERS))} only",
            )
        if label not in extensions or not any(e in IMAGE_MEMBERS for e in extensions):
            raise DataError(
                f"sample {key} of evaluation set {folder.name} has members {', '.join(extensions)}",
                expected=f"a picture and a {label} member",
            )
    if not samples.keys:
        raise DataError(
            f"evaluation set {folder.name} has no samples", where=str(folder), fix="copy or convert the set again"
        )
    if (folder / split / MANIFEST).is_file():
        written = read_shard_manifest(folder / split)["num_samples"]
        if written != len(samples):
            raise DataError(
                f"evaluation set {folder.name} has {len(samples)} samples instead of the {written} of its manifest",
                where=str(folder),
                fix="run `evatool data-prepare` again into a new folder",
            )
