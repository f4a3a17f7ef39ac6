"""Samples a CPU second of `evatool distill`, with stored and with live teacher, beside plain training and open_clip's.

`python tests/benchmarks/distill.py` makes data, both models' weights, the teacher's store and the baseline's own
environment (kept in --folder), then runs by turns: `evatool train-clip`; `evatool distill` with stored embeddings, with
logits alone and with every loss; `evatool distill` with the teacher at each step; `open_clip_train`, plain and with
`--distill-model`. Student, teacher, batch, data and first weights are the same; so are the losses where open_clip has
them (contrastive and logits). Each step is timed by the CPU clock of its process and counts where it was cheapest among
--rounds. About five minutes on one core, and the making of the environment.
"""

from __future__ import annotations

import argparse
import json
import os
import shlex
import subprocess
import sys
import time
from itertools import pairwise
from pathlib import Path
from typing import Any

from open_clip_side import keep_step_times
from side_by_side import finish, machine, versions
from train_clip import OPTIM, TINY, make_environment, make_pictures, use_tiny_preset

HERE = Path(__file__).resolve().parent
TEACHER = "EVA02-CLIP-bench-teacher"
LOGITS = {"kind": "distill", "feature_weight": 0.0}  # open_clip's: contrastive loss and logits, each with weight 1
EVERYTHING = {"kind": "distill", "relation_weight": 1.0, "interactive_weight": 1.0}
STORED_TARGET = 0.95  # of plain training (docs/benchmarks.md#distill-with-stored-and-live-teacher)

# name: stage, objective, whether embeddings are stored
OURS: dict[str, tuple[str, dict[str, Any] | None, bool]] = {
    "evatool train-clip": ("train-clip", None, False),
    "evatool distill, stored, logits": ("distill", LOGITS, True),
    "evatool distill, stored, every loss": ("distill", EVERYTHING, True),
    "evatool distill, live, logits": ("distill", LOGITS, False),
}
PLAIN, STORED, EVERY, LIVE = OURS
THEIRS = {"open_clip_train": False, "open_clip_train --distill-model": True}


def use_presets() -> None:
    """The student of `train_clip.py`, and a teacher of about four times its work."""
    from evatool.model import presets

    use_tiny_preset()
    student = presets.PRESETS[TINY]
    vision = student.vision | {"layers": 8, "width": 320}
    text = {**(student.text or {}), "width": 256, "heads": 4, "layers": 6}
    presets._BY_SPELLING[presets._plain(TEACHER)] = TEACHER
    changed = {"name": TEACHER, "vision": vision, "text": text, "embed_dim": 256}
    presets.PRESETS[TEACHER] = type(student)(**{**vars(student), **changed})


def make_models(folder: Path) -> dict[str, Path]:
    """Weight files by preset, and `spec`: what open_clip needs to know of both models."""
    import torch
    from safetensors.torch import save_file

    from evatool.model.clip import build_clip, open_clip_model_config
    from evatool.model.presets import resolve_preset
    from evatool.model.vision import STOCK_NAMES, eva_arguments, timm_name

    use_presets()
    found, specs = {}, []
    for number, name in enumerate((TINY, TEACHER)):
        config = resolve_preset(name)
        torch.manual_seed(number)
        state = build_clip(config).state_dict()
        model = folder / name
        model.mkdir(exist_ok=True)
        (model / "model_config.json").write_text(json.dumps(config.to_json()))
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, model / "model.safetensors")
        state["logit_scale"] = state["logit_scale"].squeeze()
        save_file({key: tensor.contiguous() for key, tensor in state.items()}, folder / f"{name}.safetensors")
        eva = None if timm_name(config) in STOCK_NAMES else eva_arguments(config)
        specs.append({"name": name, "config": open_clip_model_config(config), "eva": eva})
        found[name] = model
    found["spec"] = folder / "models.json"
    found["spec"].write_text(json.dumps({**specs[0], "also": specs[1:]}))
    return found


def steps_of(command: list[str], folder: Path) -> list[float]:
    """CPU seconds of each step of a command but the first, by its own clock."""
    times = folder / "step_times.json"
    times.unlink(missing_ok=True)
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1", "OMP_NUM_THREADS": "1"}
    done = subprocess.run(command, env=env | {"STEP_TIMES": str(times)}, capture_output=True, text=True, check=False)
    if done.returncode:
        raise SystemExit(f"{shlex.join(command)} failed:\n{(done.stdout + done.stderr)[-3000:]}")
    return [after - before for before, after in pairwise(json.loads(times.read_text()))]


# ------------------------------------------------------------------------------------------------------------- ours


def recipe_of(folder: Path, data: Path, models: dict[str, Path], name: str, batch: int, steps: int) -> dict[str, Any]:
    """Table and stage of one of `OURS`."""
    stage, objective, is_stored = OURS[name]
    group = {"lr": OPTIM["lr"], "weight_decay": 0.0}
    table: dict[str, Any] = {
        "data": {"train": str(data / "train"), "num_workers": 0},
        "model": {"preset": TINY, "init": {"kind": "clip", "path": str(models[TINY])}},
        "optim": {"visual": group, "text": group, "grad_clip_norm": OPTIM["clip"]},
        "schedule": {"warmup_samples": 2 * batch},
        "train": {"samples_seen": steps * batch, "global_batch_size": batch, "log_every": 8},
    }
    if objective is not None:
        table |= {"objective": objective, "teacher": {"model": str(models[TEACHER])}}
    if is_stored:
        table["teacher"]["store"] = {"path": str(folder / "store")}
    return {"stage": stage, "table": table}


def run_ours(job: dict[str, Any], folder: Path) -> list[float]:
    """CPU seconds of each step of a run in a process of its own."""
    path = folder / "ours.json"
    path.write_text(json.dumps(job | {"run_dir": str(folder / "runs" / str(time.time_ns()))}))
    return steps_of([sys.executable, __file__, "--ours", str(path)], folder)


def child(path: Path) -> None:
    """What the process of `run_ours` does."""
    from evatool.recipe.load import resolve_table
    from evatool.runs.run_dir import RunOptions
    from evatool.stages import run_stage
    from evatool.stages.training import teachers

    job = json.loads(path.read_text())
    keep_step_times(Path(os.environ["STEP_TIMES"]))
    use_presets()
    if job.get("must_not_load"):
        teachers.load_clip = lambda *_, **__: sys.exit("the teacher was loaded")  # type: ignore[assignment]
    resolved = resolve_table(job["table"], job["stage"])
    run_stage(resolved, RunOptions(name="bench", run_dir=Path(job["run_dir"])), task=job.get("task"))


# ----------------------------------------------------------------------------------------------------------- theirs


def run_theirs(
    folder: Path, data: Path, models: dict[str, Path], *, distils: bool, batch: int, steps: int
) -> list[float]:
    """CPU seconds of each step of open_clip's trainer."""
    shards = sorted((data / "train").glob("*.tar"))
    weights = {name: folder / f"{name}.safetensors" for name in (TINY, TEACHER)}
    arguments = f"""
        --model {TINY} --pretrained {weights[TINY]} --name {time.time_ns()} --logs {folder / "logs"} --report-to=
        --batch-size {batch} --lr {OPTIM["lr"]} --beta1 {OPTIM["beta1"]} --beta2 {OPTIM["beta2"]} --eps {OPTIM["eps"]}
        --wd 0 --warmup 2 --grad-clip-norm {OPTIM["clip"]} --precision fp32 --workers 0 --device cpu --seed 0
        --save-frequency 0 --epochs 1 --train-num-samples {batch * steps} --log-every-n-steps 8
        --dataset-type webdataset --train-data {data / "train"}/{{{shards[0].stem}..{shards[-1].stem}}}.tar
    """.split()
    if distils:
        arguments += ["--distill-model", TEACHER, "--distill-pretrained", str(weights[TEACHER])]
    python = make_environment(folder)
    return steps_of([str(python), str(HERE / "open_clip_side.py"), str(models["spec"]), *arguments], folder)


# ----------------------------------------------------------------------------------------------------------- report


def main() -> None:
    """Fill the store, then all arms by turns."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/distill"))
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=18)
    parser.add_argument("--rounds", type=int, default=2)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    if options.ours:
        child(options.ours)
        return
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    print(f"{machine()}; {versions()}")
    data = make_pictures(folder, options.batch * options.steps, 192, "jpg")
    models = make_models(folder)
    sizes = {"batch": options.batch, "steps": options.steps}
    start = time.perf_counter()
    run_ours(recipe_of(folder, data, models, STORED, **sizes) | {"task": "store-features"}, folder)
    print(f"the store was filled in {time.perf_counter() - start:.1f} s, start-up included", flush=True)
    rounds: dict[str, list[list[float]]] = {name: [] for name in [*OURS, *THEIRS]}
    for _ in range(options.rounds):
        for name, (*_, is_stored) in OURS.items():
            job = recipe_of(folder, data, models, name, **sizes) | {"must_not_load": is_stored}
            rounds[name].append(run_ours(job, folder))
        for name, distils in THEIRS.items():
            rounds[name].append(run_theirs(folder, data, models, distils=distils, **sizes))
    # The first timed step still makes buffers; each later one counts where it was cheapest.
    costs = {name: sum(min(each) for each in list(zip(*runs, strict=True))[1:]) for name, runs in rounds.items()}
    seen = options.batch * (options.steps - 2)
    speeds = {name: seen / cost for name, cost in costs.items()}
    print(f"\nbatch {options.batch}, {seen} samples, {options.rounds} rounds, samples a CPU second")
    print(f"{'':40s} {'samples/s':>10s} {'of plain':>9s} {'of open_clip':>13s}")
    theirs = speeds["open_clip_train --distill-model"]
    for name, speed in speeds.items():
        plain = speeds[PLAIN if name in OURS else "open_clip_train"]
        print(f"{name:40s} {speed:10.1f} {speed / plain:8.2f}x {speed / theirs:12.2f}x")
    failures = [
        f"{name}: {speeds[name] / speeds[PLAIN]:.3f} of plain training, {STORED_TARGET} is asked for"
        for name in (STORED, EVERY)
        if speeds[name] < STORED_TARGET * speeds[PLAIN]
    ]
    finish({"samples_per_cpu_sec": speeds, "step_cpu_sec": rounds, "versions": versions()}, failures, options.json)


if __name__ == "__main__":
    main()
