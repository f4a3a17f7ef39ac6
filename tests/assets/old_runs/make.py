"""Makes the archives beside it: runs stopped after step 4 of 8, and how they go on, by the code of one commit.

They were made at commit b034c17, whose modules this script imports, so it runs there and nowhere later:

    git worktree add --detach BASE b034c17
    cd EMPTY && PYTHONPATH=BASE:REPOSITORY/tests/helpers python REPOSITORY/tests/assets/old_runs/make.py

Every run is made by the command line, with relative paths, in the empty folder that it is started in. The models are
two presets shrunk to width 16 (`short_runs.shrink_presets`), whose token embedding is 0 for all tokens that no caption
has: such rows have no gradient, and pack to nothing. What would tell of the machine is not kept: logs are left out and
environment.json says neither platform nor start.

`shared.tar.xz` holds the folder of data-prepare, the teacher's run, two feature stores and an evaluation that was
stopped before it wrote its results; an archive of each kind of run holds its stopped folders by engine, and in
`expected.json` what the same code made of each when it resumed it, which was what it made of an uninterrupted run.
"""

from __future__ import annotations

import json
import lzma
import os
import shutil
import sys
import tarfile
from pathlib import Path
from typing import Any

from short_runs import DATA_PREPARE, STEPS, arithmetic, contents_of, records_of, run_forked, write_recipe

HERE = Path(__file__).resolve().parent
MADE = 1_790_000_000  # time of every file, whole seconds: evaluations know their sets by it
KINDS = ("train-clip", "train-clip-joint", "train-clip-sigmoid", "pretrain-mim", "distill")
ENGINES = {
    "single": (1, ["engine.kind=single"]),
    "ddp": (2, ["engine.kind=ddp"]),
    "fsdp2": (2, ["engine.kind=fsdp2"]),
    "deepspeed": (2, ["engine.kind=deepspeed", "engine.zero_stage=3"]),
}
DIVIDING = ("fsdp2", "deepspeed")
"""Engines under which commit b034c17 fails to start a joint run on two ranks ("a parameter that nothing has filled"):
their joint runs begin with two steps of ddp."""
STORED = ("pretrain-mim-stored", "distill-stored")
EVAL = """
stage = "eval"
[eval]
data = "data/eval"
sets = ["coarse-group", "retrieval"]
models = { teacher = "teacher" }
num_bootstrap = 50
num_threads = 1
use_cache = false
"""


def sets(*settings: str) -> list[str]:
    return [word for setting in settings for word in ("--set", setting)]


def run(*arguments: str, world_size: int = 1, stop_at: int | None = None) -> None:
    """One command; stopped as by SIGTERM after so many steps of its own where it is given."""

    def before() -> None:
        from evatool.train.signals import StopRequests

        asked = iter([None] * (stop_at - 1) + ["SIGTERM"]) if stop_at else None
        if asked is not None:
            StopRequests.agreed = lambda self: next(asked)  # type: ignore[method-assign]

    codes = run_forked(arguments, world_size, before)
    assert set(codes) == {75 if stop_at else 0}, (arguments, codes)


def make_start(preset: str, folder: Path) -> None:
    """A CLIP's random weights, with rows of the token embedding for the captions' tokens alone."""
    code = f"""
import short_runs, tarfile, json, pathlib, torch
short_runs.shrink_presets()
from evatool import load_clip
from safetensors.torch import save_file
torch.manual_seed(1)
clip, folder = load_clip({preset!r}), pathlib.Path({str(folder)!r})
with tarfile.open("data/train/00000.tar") as tar:
    captions = [tar.extractfile(m).read().decode() for m in tar if m.name.endswith(".txt")]
used = clip.tokenizer(captions).unique()
state = {{name: p.detach().contiguous() for name, p in clip.model.named_parameters()}}
table = state["text.token_embedding.weight"]
rows = table[used].clone()
table.zero_()
table[used] = rows
folder.mkdir()
save_file(state, folder / "model.safetensors")
(folder / "model_config.json").write_text(json.dumps(clip.config.to_json()))
"""
    process = os.fork()
    if process == 0:
        exec(code, {})
        os._exit(0)
    assert os.waitpid(process, 0)[1] == 0


def scrub(folder: Path) -> None:
    """Leave out what tells of the machine or of nothing, and set the time of every file."""
    for path in sorted(folder.rglob("*")):
        if path.is_dir() and path.name == "logs":
            shutil.rmtree(path)
        elif path.suffix == ".png":
            path.unlink()
        elif path.name == "environment.json":
            about = json.loads(path.read_text())
            about |= {"platform": "Linux", "started": "2026-01-01T00:00:00+0000"}
            path.write_text(json.dumps(about, indent=2) + "\n")
    for path in folder.rglob("*"):
        os.utime(path, (MADE, MADE))


def pack(name: str, *members: str) -> None:
    """Members of this folder as an archive, bytes of numbers beside those of the number before."""
    filters = [{"id": lzma.FILTER_DELTA, "dist": 4}, {"id": lzma.FILTER_LZMA2, "preset": 9 | lzma.PRESET_EXTREME}]

    def plain(info: tarfile.TarInfo) -> tarfile.TarInfo:
        info.uid = info.gid = 0
        info.uname = info.gname = ""
        info.mtime = MADE
        return info

    with lzma.open(HERE / f"{name}.tar.xz", "wb", filters=filters) as file, tarfile.open(fileobj=file, mode="w") as tar:
        for member in members:
            tar.add(member, filter=plain)
    print(name, (HERE / f"{name}.tar.xz").stat().st_size, flush=True)


def make_cell(name: str, engine: str) -> dict[str, Any]:
    """A stopped run at `NAME/ENGINE`; returns what comes of it."""
    world_size, settings = ENGINES[engine]
    start = [] if name.startswith("pretrain-mim") else ["model.init.kind=clip", "model.init.path=start"]
    command = [*write_recipe(name, Path()), *sets(*start, *settings)]
    folder, whole, again = Path(name, engine), Path("whole", name, engine), Path("again", name, engine)
    on_ddp, more = [], []
    begun = STEPS // 4 if name == "train-clip-joint" and engine in DIVIDING else 0
    if begun:  # that commit cannot make these objectives' first weights, and can resume them: begin where it can
        on_ddp, more = sets("engine.kind=ddp", "engine.zero_stage=0"), ["--resume"]
    for path in (whole, folder) if begun else ():
        run(*command, *on_ddp, "--run-dir", str(path), world_size=world_size, stop_at=begun)
    run(*command, *more, "--run-dir", str(whole), world_size=world_size)
    run(*command, *more, "--run-dir", str(folder), world_size=world_size, stop_at=STEPS // 2 - begun)
    shutil.copytree(folder, again)
    run(*command, "--run-dir", str(again), "--resume", world_size=world_size)
    assert contents_of(whole) == contents_of(again), (name, engine)
    assert records_of(whole) == records_of(again), (name, engine)
    scrub(folder)
    return {"command": command, "world_size": world_size, "tensors": contents_of(again), "records": records_of(again)}


def make_eval() -> None:
    """An evaluation stopped with its predictions kept, and the results of one that went on from there."""
    from unittest import mock

    Path("eval.toml").write_text(EVAL)

    def before() -> None:
        from evatool.stages import eval as eval_stage

        mock.patch.object(eval_stage, "write_outputs", side_effect=KeyboardInterrupt).start()

    assert run_forked(["eval", "eval.toml", "--run-dir", "eval"], 1, before) == [130]
    scrub(Path("eval"))
    shutil.copytree("eval", "eval-again")
    before_bytes = {p.name: p.read_bytes() for p in Path("eval").rglob("*.npz")}
    run("eval", "eval.toml", "--run-dir", "eval-again", "--resume")
    assert len(before_bytes) == 2
    assert before_bytes == {p.name: p.read_bytes() for p in Path("eval-again").rglob("*.npz")}
    results = json.loads(Path("eval-again", "results.json").read_text())
    expected = {"results": results["results"], "sets": results["sets"], "models": results["models"]}
    Path("eval-expected.json").write_text(json.dumps(expected, indent=1) + "\n")


def main() -> None:
    assert not list(Path().iterdir()), "start it in an empty folder"
    run("data-prepare", *DATA_PREPARE, "--run-dir", "data")
    for path in Path("data", "eval").iterdir():
        if path.name not in ("coarse-group", "retrieval"):
            shutil.rmtree(path)
    scrub(Path("data"))
    make_start("EVA01-CLIP-debug", Path("start-teacher"))
    make_start("EVA02-CLIP-debug", Path("start"))
    teacher = ["model.preset=EVA01-CLIP-debug", "model.init.kind=clip", "model.init.path=start-teacher"]
    run(*write_recipe("train-clip", Path()), *sets(*teacher, "train.samples_seen=16"), "--run-dir", "teacher")
    scrub(Path("teacher"))
    for name in sys.argv[1:] or (*KINDS, *STORED):
        cells = {engine: make_cell(name, engine) for engine in (("single",) if name in STORED else ENGINES)}
        text = json.dumps({"arithmetic": arithmetic_of_fork(), "cells": cells}, indent=None)
        Path(name, "expected.json").write_text(text + "\n")
        pack(name, name)
    make_eval()
    stores = [store for store in ("store-patches", "store-embeddings") if Path(store).exists()]
    for store in stores:
        scrub(Path(store))
    pack("shared", "data", "teacher", *stores, "eval", "eval.toml", "eval-expected.json")


def arithmetic_of_fork() -> dict[str, str]:
    """`arithmetic()` of a process that ends with it."""
    here, there = os.pipe()
    process = os.fork()
    if process == 0:
        os.write(there, json.dumps(arithmetic()).encode())
        os._exit(0)
    os.waitpid(process, 0)
    return json.loads(os.read(here, 65536))


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    main()
