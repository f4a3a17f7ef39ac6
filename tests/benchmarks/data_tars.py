"""CPU time of reading the samples of tars, undecoded, against webdataset's own iteration.

`python tests/benchmarks/data_tars.py [--rounds N] [--json FILE]`, on an idle machine. Plain tars of webdataset's writer
(picture, txt, json a sample), read through the reader of the training loader. When a run first names plain tars it
walks their headers and leaves an index beside them; each pass then reads that index anew and every member. The first
pass, with walk and index, is shown as well.

Gates: both sides give the same members with the same bytes; ratio of CPU time of later passes.
"""

from __future__ import annotations

import argparse
import hashlib
import random
import tempfile
from collections.abc import Iterator, Mapping
from pathlib import Path
from typing import Any

from side_by_side import Worker, baseline_python, cpu_sec, finish, machine, serve, versions

SAMPLES, SHARDS = 2000, 2
LEAST_RATIO = 8.0

Members = Mapping[str, bytes]


def write_tars(folder: Path, picture_bytes: int) -> None:
    """Tars as img2dataset writes them, with pictures of about this size."""
    import webdataset

    rng = random.Random(0)
    folder.mkdir()
    for shard in range(SHARDS):
        with webdataset.TarWriter(str(folder / f"{shard:05d}.tar"), encoder=False) as tar:
            for i in range(SAMPLES):
                caption = f"caption {i} of a picture of this and that"
                info = f'{{"caption": "{caption}", "width": 384, "height": 288, "key": "{i:09d}", "status": "success"}}'
                tar.write(
                    {
                        "__key__": f"{shard:05d}{i:05d}",
                        "jpg": rng.randbytes(rng.randrange(picture_bytes // 2, 3 * picture_bytes // 2)),
                        "json": info.encode(),
                        "txt": caption.encode(),
                    }
                )


def by_webdataset(folder: str) -> Iterator[Members]:
    """webdataset's own chain: open, iterate over the tar, group."""
    from webdataset import DataPipeline, SimpleShardList, tarfile_to_samples

    for sample in DataPipeline(SimpleShardList(sorted(map(str, Path(folder).glob("*.tar")))), tarfile_to_samples()):
        yield {name: data for name, data in sample.items() if not name.startswith("__")}


def by_evatool(folder: str) -> Iterator[Members]:
    """The training loader's reader, each shard opened anew."""
    reader, counts = build_reader(folder)
    for index in range(sum(counts)):
        yield reader.read(index, FIELDS)


STATE: dict[str, Any] = {}
FIELDS = frozenset({"jpg", "json", "txt"})


def build_reader(folder: str) -> tuple[Any, list[int]]:
    """A reader that has opened no shard yet, and the number of samples of each."""
    from evatool.data.sources.cache import ShardCache
    from evatool.data.sources.fetch import Patience
    from evatool.data.sources.shard_list import open_shard_list
    from evatool.data.sources.tar_source import TarSource

    patience = Patience(1, 30.0, 1.0)
    cache = ShardCache(None, 2**30, patience)
    if folder not in STATE:  # shards are counted once, when a run starts
        STATE[folder] = open_shard_list(
            "bench", f"{folder}/*.tar", cache=cache, patience=patience, max_bad_fraction=0.0
        )
    shards = STATE[folder]
    return TarSource(shards, cache, patience), shards.counts.tolist()


READERS = {"baseline": by_webdataset, "ours": by_evatool}


def consume(kind: str, folder: str) -> int:
    """Samples read in one pass; nothing is kept."""
    return sum(1 for _ in READERS[kind](folder))


def run(kind: str, folder: str, is_first: bool = False) -> float:
    """CPU microseconds a sample."""
    if is_first:
        STATE.clear()
        for index in Path(folder).glob("*.json"):
            index.unlink()
    elif kind == "ours":
        build_reader(folder)
    return 1e6 * cpu_sec(lambda: consume(kind, folder)) / (SAMPLES * SHARDS)


def digest(kind: str, folder: str) -> str:
    """Of all members and their names."""
    found = hashlib.sha256()
    for members in READERS[kind](folder):
        for name in sorted(members):
            found.update(name.encode() + b"\0" + members[name])
    return found.hexdigest()


def main() -> None:
    """Print one row a picture size."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--rounds", type=int, default=7)
    parser.add_argument("--json", type=Path)
    parser.add_argument("--worker", action="store_true", help=argparse.SUPPRESS)
    options = parser.parse_args()
    if options.worker:
        serve({"run": run, "digest": digest, "versions": versions})
        return
    failures = []
    with (
        tempfile.TemporaryDirectory() as folder,
        Worker(__file__, baseline_python()) as baseline,
        Worker(__file__) as ours,
    ):
        report: dict[str, Any] = {"machine": machine(), "ours": versions(), "baseline": baseline.call("versions")}
        report["picture_bytes"] = {}
        for picture_bytes in (10_000, 30_000):
            tars = Path(folder) / str(picture_bytes)
            write_tars(tars, picture_bytes)
            if baseline.call("digest", "baseline", str(tars)) != ours.call("digest", "ours", str(tars)):
                failures.append(f"{picture_bytes}: members differ")
            times: dict[str, list[float]] = {"baseline": [], "ours": [], "first": []}
            for _ in range(options.rounds):
                times["baseline"].append(baseline.call("run", "baseline", str(tars)))
                times["first"].append(ours.call("run", "ours", str(tars), True))
                times["ours"].append(ours.call("run", "ours", str(tars)))
            best = {side: min(found) for side, found in times.items()}
            ratio = best["baseline"] / best["ours"]
            report["picture_bytes"][picture_bytes] = {"us": best, "ratio": ratio}
            print(
                f"{picture_bytes:6d} bytes  webdataset {best['baseline']:6.1f} us"
                f"  evatool {best['ours']:5.1f} us = {ratio:4.1f}x;"
                f" first pass {best['first']:5.1f} us = {best['baseline'] / best['first']:4.1f}x",
                flush=True,
            )
            if ratio < LEAST_RATIO:
                failures.append(f"{picture_bytes} bytes: ratio {ratio:.2f}, below {LEAST_RATIO}")
    finish(report, failures, options.json)


if __name__ == "__main__":
    main()
