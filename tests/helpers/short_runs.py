"""Short runs of every training stage by the command line: their recipes, how they are started, and their figures.

Nothing of evatool is imported but its `__main__` and, for `shrink_presets`, the public table of presets: what these
runs compare must hold while the package's modules move.

    python short_runs.py WORLD_SIZE ARGUMENTS...     `evatool ARGUMENTS...` with the shrunk presets, on so many ranks
"""

from __future__ import annotations

import contextlib
import hashlib
import io
import json
import logging
import os
import runpy
import socket
import subprocess
import sys
import traceback
from collections.abc import Callable, Iterator, Sequence
from pathlib import Path
from typing import Any
from unittest import mock

STEPS, BATCH = 8, 8
DATA_PREPARE = ("debug/data-prepare", "--set", "data.max_concepts=12", "--set", "data.num_unseen=2")

# Every recipe is `_COMMON` and its own lines. Paths are relative: a command runs in the folder that has `data`, and
# `teacher`, the run folder of a CLIP.
_COMMON = f"""
data.train = "data/train"
data.augment.horizontal_flip = 0.5
model.preset = "EVA02-CLIP-debug"
model.drop_path_rate = 0.1
optim.grad_clip_norm = 1.0
optim.visual.lr = 1e-3
optim.visual.layer_decay = 0.9
schedule.warmup_samples = 16
train.samples_seen = {STEPS * BATCH}
train.global_batch_size = {BATCH}
train.log_every = 1
"""
_TEXT = "optim.text.lr = 1e-3\n"
_ALL_LOSSES = """
objective.feature_weight = [[0, 2.0], [64, 0.5]]
objective.logit_weight = 1.0
objective.logit_temperature = 2.0
objective.relation_weight = 10.0
objective.interactive_weight = 0.5
"""
RECIPES: dict[str, tuple[str, str]] = {
    "train-clip": ("train-clip", _TEXT + 'train.ema_decay = 0.5\nobjective.positives = "equal-captions"\n'),
    "train-clip-sigmoid": (
        "train-clip",
        _TEXT + 'objective.kind = "sigmoid"\noptim.kind = "lamb"\ntrain.micro_batch_size = 2\n',
    ),
    "train-clip-joint": ("train-clip", _TEXT + 'teacher.model = "teacher"\nobjective.mim.weight = 0.5\n'),
    "pretrain-mim": ("pretrain-mim", 'teacher.model = "teacher"\n'),
    "distill": ("distill", _TEXT + 'teacher.model = "teacher"\n' + _ALL_LOSSES),
    "distill-two-teachers": (
        "distill",
        _TEXT + 'teachers.one.model = "teacher"\nteachers.wide.model = "EVA02-CLIP-toy"\n' + _ALL_LOSSES,
    ),
    "pretrain-mim-stored": (
        "pretrain-mim",
        'teacher.model = "teacher"\nteacher.store.path = "store-patches"\nteacher.store.views = 2\n',
    ),
    "distill-stored": (
        "distill",
        _TEXT + 'teacher.model = "teacher"\nteacher.store.path = "store-embeddings"\n' + _ALL_LOSSES,
    ),
}
"""Stage and recipe by the name of a short run."""

# Figures that follow from the recipe; the others tell of time and memory.
_FOLLOWS = ("step", "samples_seen", "train/", "optim/", "val/", "eval/", "data/")


def write_recipe(name: str, folder: Path) -> list[str]:
    """Write the recipe of a short run into `folder`; returns the command that runs it there, without a run folder."""
    stage, lines = RECIPES[name]
    (folder / f"{name}.toml").write_text(f'stage = "{stage}"\n{_COMMON}{lines}', encoding="utf-8")
    return [stage, f"{name}.toml"]


# ------------------------------------------------------------------------------------------------------- commands


def run_here(arguments: Sequence[str], folder: Path) -> None:
    """Run `evatool ARGUMENTS...` in this process, with `folder` as the working directory."""
    import torch

    code: object = 0
    output = io.StringIO()
    with contextlib.ExitStack() as stack:
        stack.enter_context(_kept_settings())
        stack.enter_context(contextlib.chdir(folder))
        stack.enter_context(mock.patch.object(sys, "argv", ["evatool", *arguments]))
        stack.enter_context(contextlib.redirect_stdout(output))
        stack.enter_context(contextlib.redirect_stderr(output))
        torch.set_num_threads(1)
        try:
            runpy.run_module("evatool", run_name="__main__")
        except SystemExit as stop:
            code = stop.code
    assert not code, f"evatool {' '.join(arguments)} ended with {code}:\n{output.getvalue()[-4000:]}"


@contextlib.contextmanager
def _kept_settings() -> Iterator[None]:
    """Leave this process as it was: what a command sets for the rest of its life would reach the next test."""
    import torch

    log = logging.getLogger("evatool")
    random_state, num_threads = torch.get_rng_state(), torch.get_num_threads()
    handlers, level, propagate = list(log.handlers), log.level, log.propagate
    with mock.patch.dict(os.environ):
        try:
            yield
        finally:
            torch.set_rng_state(random_state)
            torch.set_num_threads(num_threads)
            log.handlers[:], log.propagate = handlers, propagate
            log.setLevel(level)


def run_on_ranks(program: Sequence[str], arguments: Sequence[str], folder: Path, world_size: int) -> int:
    """Run `PROGRAM ARGUMENTS...` on this many processes under torchrun; returns 0 or torchrun's exit status.

    Args:
        program: what torchrun is given in place of a script, such as `-m evatool`.
    """
    given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {key: value for key, value in os.environ.items() if key not in given}
    env |= {"OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo", "DS_ACCELERATOR": "cpu"}
    launcher = [sys.executable, "-m", "torch.distributed.run", "--standalone", f"--nproc-per-node={world_size}"]
    command = [*launcher, *program, *arguments]
    done = subprocess.run(command, cwd=folder, env=env, capture_output=True, text=True, timeout=300)
    if done.returncode:
        sys.stderr.write(done.stderr[-4000:])
    return done.returncode


# -------------------------------------------------------------------------------------------------------- figures


def records_of(run_dir: Path) -> list[dict[str, Any]]:
    """One record a step of a run, with the figures that follow from its recipe."""
    lines = (run_dir / "metrics.jsonl").read_text(encoding="utf-8").splitlines()
    return [{k: v for k, v in json.loads(line).items() if k.startswith(_FOLLOWS)} for line in lines]


def arithmetic() -> dict[str, str]:
    """The torch version, the vector instructions it uses, and a digest of what this machine computes.

    Where all are equal, the same run gives the same bits. Another processor or another torch may round elsewhere.
    """
    import torch

    generator = torch.Generator().manual_seed(0)
    digest = hashlib.sha256()
    num_threads = torch.get_num_threads()
    torch.set_num_threads(1)
    for rows, inner, columns in ((17, 64, 32), (8, 16, 49), (128, 192, 64), (33, 170, 64)):
        a, b = torch.randn(rows, inner, generator=generator), torch.randn(inner, columns, generator=generator)
        product = a @ b
        found = (product, product.softmax(-1), torch.nn.functional.gelu(product), product.mean(0), a.norm())
        for tensor in (*found, torch.nn.functional.silu(product), product.sigmoid().log(), a.T @ a):
            digest.update(tensor.contiguous().numpy().tobytes())
    torch.set_num_threads(num_threads)
    capability = torch.backends.cpu.get_cpu_capability()
    return {"torch": torch.__version__, "capability": capability, "probe": digest.hexdigest()[:16]}


def largest_difference(found: Sequence[dict[str, Any]], expected: Sequence[dict[str, Any]]) -> float:
    """The largest relative difference of any figure; asserts that steps and names of figures are the same ones.

    Shares of right answers (`_top1`) are left out: the last bit of one similarity turns an eighth of them.
    """
    assert [record["step"] for record in found] == [record["step"] for record in expected]
    largest = 0.0
    for ours, theirs in zip(found, expected, strict=True):
        assert ours.keys() == theirs.keys(), f"step {ours['step']}: {sorted(ours.keys() ^ theirs.keys())}"
        for key, value in theirs.items():
            if ours[key] != value and not key.endswith("_top1"):
                largest = max(largest, abs(ours[key] - value) / max(abs(value), 1e-3))
    return largest


def contents_of(run_dir: Path) -> dict[str, dict[str, list[Any]]]:
    """Of each tensor in the safetensors files of a run's last checkpoint: a digest of its bytes, and its norm."""
    import torch
    from safetensors.torch import load_file

    found: dict[str, dict[str, list[Any]]] = {}
    for file in sorted(max((run_dir / "checkpoints").iterdir()).glob("*.safetensors")):
        tensors = load_file(file)
        found[file.name] = {
            name: [
                hashlib.sha256(tensor.contiguous().reshape(-1).view(torch.uint8).numpy().tobytes()).hexdigest()[:16],
                float(f"{float(tensor.double().norm()):.9g}"),
            ]
            for name, tensor in sorted(tensors.items())
        }
    return found


# ------------------------------------------------------------------------------------------------- shrunk presets


def shrink_presets() -> None:
    """Put models of width 16 in the places of two debug presets, so that a checkpoint takes some 100 kB."""
    from evatool.model.presets import PRESETS, ModelConfig

    vision = {"image_size": 32, "patch_size": 8, "layers": 2, "width": 16, "head_width": 8, "head_init_scale": 1.0}
    eva02 = vision | {"rope": True, "intp_freq": True, "naiveswiglu": True, "subln": True, "mlp_ratio": 2.6667}
    text = {"context_length": 16, "width": 16, "heads": 2, "layers": 1}
    for name, embed_dim, tower in (("EVA02-CLIP-debug", 8, eva02), ("EVA01-CLIP-debug", 12, vision)):
        PRESETS[name] = ModelConfig.from_json(
            {"embed_dim": embed_dim, "vision_cfg": tower, "text_cfg": text}, name=name
        )


def run_forked(arguments: Sequence[str], world_size: int, before: Callable[[], None] = lambda: None) -> list[int]:
    """Run `evatool ARGUMENTS...` with the shrunk presets in forked processes; returns the exit status of each rank.

    Torch is imported once for all of them. Only for a process that has run no backward pass: its threads do not
    survive the fork.

    Args:
        before: called in each process before the command.
    """
    import deepspeed
    import open_clip
    import timm
    import torch

    assert all((deepspeed, open_clip, timm, torch))
    with socket.socket() as free:
        free.bind(("127.0.0.1", 0))
        port = free.getsockname()[1]
    processes = []
    for rank in range(world_size):
        process = os.fork()
        if process == 0:
            torch.set_num_threads(1)
            if world_size > 1:
                job = {"RANK": rank, "LOCAL_RANK": rank, "WORLD_SIZE": world_size, "MASTER_PORT": port}
                os.environ |= {key: str(value) for key, value in job.items()}
                os.environ |= {"MASTER_ADDR": "127.0.0.1", "GLOO_SOCKET_IFNAME": "lo"}
            os._exit(_run_shrunk(arguments, before))
        processes.append(process)
    return [os.waitstatus_to_exitcode(os.waitpid(process, 0)[1]) for process in processes]


def _run_shrunk(arguments: Sequence[str], before: Callable[[], None]) -> int:
    try:
        shrink_presets()
        before()
        sys.argv = ["evatool", *arguments]
        runpy.run_module("evatool", run_name="__main__")
    except SystemExit as stop:
        return int(stop.code or 0)
    except BaseException:
        traceback.print_exc()
        return 1
    return 0


if __name__ == "__main__":
    os.environ |= {"OMP_NUM_THREADS": "1", "DS_ACCELERATOR": "cpu"}
    sys.exit(max(run_forked(sys.argv[2:], int(sys.argv[1]))))
