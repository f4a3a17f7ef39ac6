"""Samples a second of `evatool train-clip` against `open_clip_train`: same model, batch, data and first weights.

`python tests/benchmarks/train_clip.py` makes data and the baseline's environment (kept in --folder), checks that both
trainers compute the same losses, finds the baseline's best settings and then runs the two by turns. It leaves
`result.md`, `result.json` and `losses.png` in the folder. On a GPU: `--preset EVA02-CLIP-L-14 --synthetic --batch 256
--steps 70 --search-steps 35`.

`--accumulate K` compares accumulation: open_clip's `--accum-freq K --grad-checkpointing` with our `micro_batch_size`,
which is the same (batch / K) or `--micro-batch M`, so that both can be given the same memory.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import shlex
import statistics
import subprocess
import sys
import tempfile
import time
from dataclasses import dataclass, field
from pathlib import Path
from typing import Any

from train_clip_report import Run, describe, summary, write_report

HERE = Path(__file__).resolve().parent
TINY = "EVA02-CLIP-bench"
WARM_UP, LOG_EVERY = 20, 5
OPTIM = {"lr": 5e-4, "beta1": 0.9, "beta2": 0.98, "eps": 1e-6, "clip": 1.0}
BASELINE = ["open_clip_torch[training]==3.3.0", "webdataset<=0.2.86", "numpy<2.4"]


@dataclass
class Bench:
    """What both trainers are given."""

    folder: Path
    preset: str
    batch: int
    steps: int
    synthetic: bool
    device: str
    accumulate: int = 1
    settings: list[str] = field(default_factory=list)  # further --set of ours
    own_micro_batch: int | None = None  # ours, where it is not the baseline's

    @property
    def micro_batch(self) -> int:
        """The baseline's."""
        return self.batch // self.accumulate


def use_tiny_preset() -> None:
    """A tiny EVA-02 CLIP: width 192, 4 blocks, 49 patches; a text tower of the same size and 77 tokens."""
    from evatool.model import presets

    toy = presets.PRESETS["EVA02-CLIP-toy"]
    vision = toy.vision | {"image_size": 112, "patch_size": 16, "layers": 4, "width": 192, "head_width": 64}
    text = {**(toy.text or {}), "context_length": 77, "width": 192, "heads": 3, "layers": 4}
    presets._BY_SPELLING[presets._plain(TINY)] = TINY
    presets.PRESETS[TINY] = type(toy)(**{**vars(toy), "name": TINY, "vision": vision, "text": text, "embed_dim": 192})


# ------------------------------------------------------------------------------------------------------------- data


def make_pictures(folder: Path, count: int, side: int, suffix: str) -> Path:
    """Photo-like noise (smooth plus fine) and captions of 15 tokens on average; returns the prepared run folder."""
    import numpy as np
    from PIL import Image

    from evatool.data.tokenizer import build_tokenizer
    from evatool.recipe.load import resolve_table
    from evatool.runs.run_dir import RunOptions
    from evatool.stages import run_stage

    made = folder / f"data-{count}-{side}-{suffix}"
    if (made / "manifest.json").exists():
        return made
    rng = np.random.default_rng(0)
    images = folder / f"pictures-{count}-{side}-{suffix}"
    images.mkdir(parents=True, exist_ok=True)
    words = ["a", "cat", "dog", "red", "blue", "car", "tree", "house", "on", "the", "in", "with", "old", "man", "sky"]
    rows = ["image\tcaption"]
    for number in range(count):
        coarse = Image.fromarray(rng.integers(0, 256, (8, 8, 3), dtype=np.uint8)).resize((side, side), Image.BICUBIC)
        pixels = np.asarray(coarse, dtype=np.int16) + rng.integers(-12, 13, (side, side, 3))
        name = f"{number:06d}.{suffix}"
        Image.fromarray(pixels.clip(0, 255).astype(np.uint8)).save(images / name, quality=85)
        # Lengths as of web captions: most short, a tail to the full context
        # (docs/reference/memory-and-scale.md#lengths-of-captions: mean 15.4 of 77).
        length = int(np.clip(rng.lognormal(np.log(7.8), 0.7), 2, 70))
        rows.append(f"{name}\t{' '.join(rng.choice(words, length))} {number}")
    (folder / "captions.tsv").write_text("\n".join(rows))
    source = {"kind": "folder", "images": str(images), "captions": str(folder / "captions.tsv")}
    table = {"data": source, "shards": {"samples_per_shard": max(64, count // 16)}}
    run_stage(resolve_table(table, "data-prepare"), RunOptions(name="bench", run_dir=made))
    tokens = build_tokenizer(77)([row.partition("\t")[2] for row in rows[1:2001]])
    lengths = tokens.argmax(-1).float() + 1
    print(f"{count} samples, {side} px {suffix}; tokens a caption: mean {lengths.mean():.1f}, max {lengths.max():.0f}")
    return made


def initial_weights(bench: Bench) -> tuple[Path, Path]:
    """The weights both start from (as a whole-model file), and what open_clip needs to know of the model."""
    import torch
    from safetensors.torch import save_file

    from evatool.model.clip import build_clip, open_clip_model_config
    from evatool.model.presets import resolve_preset
    from evatool.model.vision import STOCK_NAMES, eva_arguments, timm_name

    use_tiny_preset()
    config = resolve_preset(bench.preset)
    weights, spec = bench.folder / f"{bench.preset}.safetensors", bench.folder / f"{bench.preset}.json"
    torch.manual_seed(0)
    state = build_clip(config).state_dict()
    state["logit_scale"] = state["logit_scale"].squeeze()
    save_file({name: tensor.contiguous() for name, tensor in state.items()}, weights)
    eva = None if timm_name(config) in STOCK_NAMES else eva_arguments(config)
    spec.write_text(json.dumps({"name": bench.preset, "config": open_clip_model_config(config), "eva": eva}))
    return weights, spec


# -------------------------------------------------------------------------------------------------------- open_clip


def make_environment(folder: Path) -> Path:
    """The baseline's own environment: its open_clip, webdataset and numpy, beside this environment's torch and timm.

    Those are borrowed by a path, which comes after the environment's own packages: the same libraries on both sides,
    and no gigabytes to fetch.
    """
    python = folder / "open_clip_env" / "bin" / "python"
    if not python.exists():
        subprocess.run([sys.executable, "-m", "venv", python.parent.parent], check=True)
        own, borrowed = (
            subprocess.check_output(
                [each, "-c", "import sysconfig; print(sysconfig.get_paths()['purelib'])"], text=True
            )
            for each in (python, sys.executable)
        )
        (Path(own.strip()) / "borrowed.pth").write_text(borrowed)
        subprocess.run([python, "-m", "pip", "install", "--quiet", *BASELINE], check=True)
    return python


def baseline(
    bench: Bench, data: Path, *, precision: str, workers: int, compiled: bool, gate_steps: int | None = None
) -> Run:
    """One run of open_clip's trainer."""
    weights, spec = initial_weights(bench)
    steps = gate_steps or bench.steps
    name = f"{precision}-{workers}-{compiled}-{time.time_ns()}"
    arguments = f"""
        --model {bench.preset} --pretrained {weights} --name {name} --logs {bench.folder / "logs"} --report-to=
        --batch-size {bench.micro_batch} --lr {OPTIM["lr"]} --beta1 {OPTIM["beta1"]} --beta2 {OPTIM["beta2"]}
        --eps {OPTIM["eps"]} --wd 0 --warmup 10 --grad-clip-norm {OPTIM["clip"]} --precision {precision}
        --workers {workers} --device {bench.device} --save-frequency 0 --seed 0
    """.split()
    if gate_steps:
        arguments += ["--epochs", str(steps), "--train-num-samples", str(bench.batch), "--log-every-n-steps", "1"]
        arguments += ["--aug-cfg", "scale=(1.0, 1.0)", "ratio=(1.0, 1.0)"]
    else:
        count = str(bench.batch * steps)
        arguments += ["--epochs", "1", "--train-num-samples", count, "--log-every-n-steps", str(LOG_EVERY)]
    if bench.synthetic and not gate_steps:
        arguments += ["--dataset-type", "synthetic"]
    else:
        shards = sorted((data / "train").glob("*.tar"))
        arguments += ["--dataset-type", "webdataset", "--train-data", "::".join(map(str, shards))]
        arguments[-1] = f"{data / 'train'}/{{{shards[0].stem}..{shards[-1].stem}}}.tar"
    if compiled:
        arguments += ["--torchcompile"]
    if bench.accumulate > 1:
        arguments += ["--accum-freq", str(bench.accumulate), "--grad-checkpointing"]
    python = make_environment(bench.folder)
    command = [str(python), str(HERE / "open_clip_side.py"), str(spec), *arguments]
    output, peak = _run(command)
    lines = [line for line in output.splitlines() if "Train Epoch" in line]
    if not lines:
        raise SystemExit(f"open_clip's trainer printed no step:\n{output[-3000:]}")
    times = [float(re.search(r"Batch \(t\): ([\d.]+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
    losses = [float(re.search(r"Loss: (\S+)", line).group(1)) for line in lines]  # type: ignore[union-attr]
    if gate_steps:
        return Run(0.0, list(enumerate(losses, start=1)), peak, shlex.join(command))
    # A line tells the mean time since the line before; the first is of step 1 alone.
    timed = times[1 + min(WARM_UP, steps // 2) // LOG_EVERY :]
    seen = [(min(1 + LOG_EVERY * i, steps), loss) for i, loss in enumerate(losses)]
    return Run(bench.batch / statistics.mean(timed), seen, peak, shlex.join(command))


# ------------------------------------------------------------------------------------------------------------- ours


def ours(bench: Bench, data: Path, *, precision: str, workers: int, gate_steps: int | None = None) -> Run:
    """One run of evatool's trainer, in a process of its own."""
    weights, _ = initial_weights(bench)
    steps = gate_steps or bench.steps
    group = {"lr": OPTIM["lr"], "weight_decay": 0.0}
    table: dict[str, Any] = {
        "data": {"train": str(data / "train"), "num_workers": workers},
        "model": {"preset": bench.preset, "init": {"kind": "clip", "path": str(weights)}},
        "optim": {"visual": group, "text": group, "grad_clip_norm": OPTIM["clip"]},
        "schedule": {"warmup_samples": 10 * bench.batch},
        "train": {
            "samples_seen": steps * bench.batch,
            "global_batch_size": bench.batch,
            "precision": precision,
            "log_every": 1 if gate_steps else LOG_EVERY,
        },
    }
    if gate_steps:
        table["data"]["augment"] = {"crop_scale": [1.0, 1.0], "crop_ratio": [1.0, 1.0]}
    if bench.accumulate > 1:
        table["train"]["micro_batch_size"] = bench.own_micro_batch or bench.micro_batch
    run_dir = bench.folder / "runs" / str(time.time_ns())
    job = {"table": table, "run_dir": str(run_dir), "set": bench.settings}
    job["synthetic"] = bench.synthetic and not gate_steps
    path = bench.folder / "ours.json"
    path.write_text(json.dumps(job))
    command = [sys.executable, __file__, "--ours", str(path)]
    output, peak = _run(command)
    metrics = run_dir / "metrics.jsonl"
    if not metrics.exists():
        raise SystemExit(f"evatool's trainer wrote no metrics:\n{output[-3000:]}")
    records = [json.loads(line) for line in metrics.read_text().splitlines()]
    speeds = [r["throughput/samples_per_sec"] for r in records if r["step"] > min(WARM_UP, steps // 2)]
    losses = [(r["step"], r["train/loss"]) for r in records]
    shown = f"evatool train-clip RECIPE  # {json.dumps(table)} {' '.join(bench.settings)}"
    return Run(statistics.harmonic_mean(speeds) if speeds else 0.0, losses, peak, shown)


def run_ours(path: Path) -> None:
    """The child process of `ours`."""
    from evatool.recipe.load import resolve_table
    from evatool.runs.run_dir import RunOptions
    from evatool.stages import run_stage

    job = json.loads(path.read_text())
    use_tiny_preset()
    if job["synthetic"]:
        _feed_synthetic(job["table"])
    resolved = resolve_table(job["table"], "train-clip", overrides=job["set"])
    run_stage(resolved, RunOptions(name="bench", run_dir=Path(job["run_dir"])))


def _feed_synthetic(table: dict[str, Any]) -> None:
    """The same random batch again and again in the loader's place: pictures, and captions of 15 tokens on average."""
    import torch

    from evatool.core.batch import Batch
    from evatool.model.presets import resolve_preset
    from evatool.stages.training import build as wiring

    config, size = resolve_preset(table["model"]["preset"]), table["train"]["global_batch_size"]
    generator = torch.Generator().manual_seed(0)
    lengths = (torch.randn(size, generator=generator) * 0.7 + 2.3).exp().int().clamp(2, 70) + 2
    place = torch.arange(77)
    tokens = torch.randint(1, 49000, (size, 77), generator=generator)
    tokens = torch.where(place < lengths[:, None] - 1, tokens, 0)
    tokens[torch.arange(size), lengths - 1] = 49407
    shape = (size, 3, config.image_size, config.image_size)
    image = torch.randint(0, 256, shape, dtype=torch.uint8, generator=generator)

    class Synthetic:
        position, num_samples = 0, size

        def __iter__(self) -> Any:
            while True:
                self.position += size
                yield Batch(image, ["synthetic"] * size, tokens, torch.arange(size), position=self.position)

    wiring.build_job_loader = lambda *_, **__: Synthetic()  # type: ignore[assignment]


# ----------------------------------------------------------------------------------------------------------- report


def _run(command: list[str]) -> tuple[str, int]:
    """Output of a command, and the most memory that one process of it held."""
    env = os.environ | {"TOKENIZERS_PARALLELISM": "false", "HF_HUB_OFFLINE": "1"}
    with tempfile.TemporaryFile("w+") as file:
        process = subprocess.Popen(command, stdout=file, stderr=subprocess.STDOUT, env=env)
        _, status, usage = os.wait4(process.pid, 0)
        process.returncode = os.waitstatus_to_exitcode(status)
        file.seek(0)
        output = file.read()
    if process.returncode:
        raise SystemExit(f"{shlex.join(command)} ended with {process.returncode}:\n{output[-3000:]}")
    return output, usage.ru_maxrss * 1024


def gate(bench: Bench, steps: int) -> dict[str, list[tuple[int, float]]]:
    """Both trainers on one batch that they see alike, step for step; both traces of the loss.

    Raises: SystemExit where they part.
    """
    side = 112 if bench.preset == TINY else 224
    data = make_pictures(bench.folder, bench.batch, side, "png")
    from evatool.recipe.schema import TrainDataSection

    decode = ["data.decode=exact"] if "decode" in TrainDataSection.model_fields else []
    exact = Bench(**{**vars(bench), "accumulate": 1, "settings": [*bench.settings, *decode]})
    theirs = baseline(exact, data, precision="fp32", workers=0, compiled=False, gate_steps=steps).losses
    mine = ours(exact, data, precision="fp32", workers=0, gate_steps=steps).losses
    apart = [abs(a - b) for (_, a), (_, b) in zip(mine, theirs, strict=True)]
    print(f"losses of {steps} steps on the same batch, fp32: at most {max(apart):.2e} apart")
    print("  step   evatool  open_clip")
    for (step, a), (_, b) in list(zip(mine, theirs, strict=True))[:: max(1, steps // 10)]:
        print(f"  {step:4d}  {a:8.5f}   {b:8.5f}")
    if max(apart) > 0.02 * theirs[0][1]:
        raise SystemExit("the two trainers do not compute the same thing: the speeds below would mean nothing")
    return {"open_clip_train": theirs, "evatool": mine}


def main() -> None:
    """Gate, search for the baseline's best settings, then the comparison."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--ours", type=Path, help=argparse.SUPPRESS)
    parser.add_argument("--folder", type=Path, default=Path("runs/benchmarks/train_clip"))
    parser.add_argument("--preset", default=TINY)
    parser.add_argument("--batch", type=int, default=64)
    parser.add_argument("--steps", type=int, default=31)
    parser.add_argument("--rounds", type=int, default=2, help="0: only the search")
    parser.add_argument("--search-steps", type=int, default=11, help="0: use --baseline as it is")
    parser.add_argument("--gate-steps", type=int, default=20, help="0: no gate")
    parser.add_argument("--baseline", default="fp32,1,eager", help="precision,workers,eager|compile where not searched")
    parser.add_argument("--precision", default="best", help="of ours: fp32, bf16 or best (bf16 where the baseline is)")
    parser.add_argument("--workers", type=int, default=1, help="of ours")
    parser.add_argument("--synthetic", action="store_true")
    parser.add_argument("--accumulate", type=int, default=1)
    parser.add_argument("--micro-batch", type=int, help="of ours, where it is not batch / K")
    parser.add_argument("--set", action="append", default=[], dest="settings")
    options = parser.parse_args()
    if options.ours:
        run_ours(options.ours)
        return
    import torch

    device = "cuda" if torch.cuda.is_available() else "cpu"
    folder = options.folder.resolve()
    folder.mkdir(parents=True, exist_ok=True)
    sizes = (options.batch, options.steps, options.synthetic, device, options.accumulate, options.settings)
    bench = Bench(folder, options.preset, *sizes, options.micro_batch)
    packages = describe(make_environment(folder))
    use_tiny_preset()
    data = folder if bench.synthetic else make_pictures(folder, bench.batch * bench.steps, 192, "jpg")
    traces = {"the same batch again and again": gate(bench, options.gate_steps)} if options.gate_steps else {}
    (precision, workers, compiled), searched = _best_baseline(bench, data, options)
    mine = {"best": {"amp_bf16": "bf16"}.get(precision, "fp32")}.get(options.precision, options.precision)
    theirs_runs, my_runs = [], []
    for _ in range(options.rounds):
        theirs_runs.append(baseline(bench, data, precision=precision, workers=workers, compiled=compiled))
        my_runs.append(ours(bench, data, precision=mine, workers=options.workers))
        print(f"open_clip {theirs_runs[-1].samples_per_sec:8.1f}/s   evatool {my_runs[-1].samples_per_sec:8.1f}/s")
    if not my_runs:
        return
    theirs_are = f"{precision}, {workers} workers, {'compiled' if compiled else 'eager'}"
    sides = {
        "open_clip_train": summary(theirs_runs) | {"settings": theirs_are},
        "evatool": summary(my_runs) | {"settings": f"{mine}, {options.workers} workers"},
    }
    traces["the run that was timed"] = {"open_clip_train": theirs_runs[0].losses, "evatool": my_runs[0].losses}
    ratio = sides["evatool"]["samples_per_sec"] / sides["open_clip_train"]["samples_per_sec"]
    facts = {"ratio": ratio, "batch": bench.batch, "accumulate": bench.accumulate, "search": searched}
    write_report(folder, sides | facts | {"machine": packages.pop("machine"), "packages": packages}, traces)


def _best_baseline(
    bench: Bench, data: Path, options: argparse.Namespace
) -> tuple[tuple[str, int, bool], dict[str, float]]:
    """Precision, workers and compiled or not of the fastest setting, and what was measured."""
    if not options.search_steps:
        precision, workers, mode = options.baseline.split(",")
        return (precision, int(workers), mode == "compile"), {}
    # Kept beside the data, so that a search that was cut short goes on where it was.
    path = bench.folder / f"search-{bench.preset}-{bench.batch}-{bench.accumulate}-{bench.device}.json"
    found: dict[str, float] = json.loads(path.read_text()) if path.exists() else {}
    short = Bench(**{**vars(bench), "steps": options.search_steps})

    def speed(precision: str, workers: int, mode: str) -> float:
        key = f"{precision},{workers},{mode}"
        if key not in found:
            run = baseline(short, data, precision=precision, workers=workers, compiled=mode == "compile")
            found[key] = run.samples_per_sec
            path.write_text(json.dumps(found))
        print(f"open_clip_train {key:20s} {found[key]:8.1f}/s", flush=True)
        return found[key]

    # First the number of workers, then both precisions and modes with it; where one of those is the faster one, the
    # other numbers of workers with it too.
    best = max((1, 2, 0), key=lambda workers: speed("fp32", workers, "eager"))
    eager = found[f"fp32,{best},eager"]
    for precision, mode in (("amp_bf16", "eager"), ("fp32", "compile"), ("amp_bf16", "compile")):
        if precision == "amp_bf16" and mode == "compile" and found[f"amp_bf16,{best},eager"] < eager / 2:
            print("amp_bf16 is not half as fast: its compiled mode is left out")
            continue
        if speed(precision, best, mode) > eager:
            for workers in {0, 1, 2} - {best}:
                speed(precision, workers, mode)
    precision, number, mode = max(found, key=found.__getitem__).split(",")
    return (precision, int(number), mode == "compile"), found


if __name__ == "__main__":
    main()
