"""Two processes of a debug run, started by each launcher that docs/engines.md names, with the command it names.

torchrun and DeepSpeed's launcher are the real ones. There is no Slurm here: a stand-in for `srun` starts the tasks of a
step on this machine with the variables that Slurm sets for them.
"""

from __future__ import annotations

import json
import os
import re
import shlex
import stat
import subprocess
import sys
from pathlib import Path

import pytest

from evatool.recipe.load import resolve_table
from evatool.stages import run_stage
from evatool.runs.run_dir import RunOptions

pytestmark = [pytest.mark.dist, pytest.mark.e2e]
DOCS = Path(__file__).parents[2] / "docs" / "engines.md"

SRUN = """#!{python}
import os, subprocess, sys
assert sys.argv[1] == "--ntasks-per-node"
tasks = int(sys.argv[2])
step = {{"SLURM_JOB_ID": str(os.getpid()), "SLURM_STEP_NUM_TASKS": str(tasks), "SLURM_STEP_NODELIST": "localhost"}}
started = [
    subprocess.Popen(sys.argv[3:], env=os.environ | step | {{"SLURM_PROCID": str(task), "SLURM_LOCALID": str(task)}})
    for task in range(tasks)
]
sys.exit(max(process.wait() for process in started))
"""


@pytest.fixture(scope="module")
def drawings(tmp_path_factory) -> Path:
    folder = tmp_path_factory.mktemp("drawings") / "data"
    table = {"data": {"kind": "drawings", "max_concepts": 8, "num_unseen": 1}}
    run_stage(resolve_table(table, "data-prepare"), RunOptions(name="data", run_dir=folder))
    return folder / "train"


@pytest.fixture
def programs(tmp_path) -> Path:
    """A folder with `python`, `torchrun` and `deepspeed` of this environment, and the stand-in for `srun`."""
    folder = tmp_path / "bin"
    folder.mkdir()
    (folder / "srun").write_text(SRUN.format(python=sys.executable))
    (folder / "torchrun").write_text(f'#!/bin/sh\nexec {sys.executable} -m torch.distributed.run --standalone "$@"\n')
    launcher = "--num_accelerators 2 --master_port $((20000 + $$ % 20000))"  # a CPU counts as one
    (folder / "deepspeed").write_text(
        f'#!/bin/sh\nexec {sys.executable} -m deepspeed.launcher.runner {launcher} "$@"\n'
    )
    (folder / "python").write_text(f'#!/bin/sh\nexec {sys.executable} "$@"\n')
    for path in folder.iterdir():
        path.chmod(path.stat().st_mode | stat.S_IXUSR)
    return folder


def documented(launcher: str) -> list[str]:
    """The launcher's command in the table of docs/engines.md, for two processes."""
    (command,) = re.findall(rf"^\|[^|]*\| `({launcher} [^`]*)` \|$", DOCS.read_text(), flags=re.M)
    return shlex.split(command.replace(" N ", " 2 "))


@pytest.mark.parametrize(
    ("launcher", "engine"),
    [
        ("torchrun", "engine.kind=fsdp2"),
        pytest.param("deepspeed", "engine.kind=deepspeed", marks=pytest.mark.slow),
        pytest.param("srun", "engine.kind=ddp", marks=pytest.mark.slow),
    ],
)
def test_the_documented_command_starts_two_ranks(drawings, programs, tmp_path, launcher, engine):
    run_dir = tmp_path / "run"
    command = documented(launcher)
    assert command[-1] == "R"
    command[-1:] = ["debug/train-clip", "--run-dir", str(run_dir)]
    for setting in (f"data.train={drawings}", "train.samples_seen=16", "train.global_batch_size=8", engine):
        command += ["--set", setting]
    command += ["--set", "schedule.warmup_samples=8", "--set", "train.log_every=1"]
    given = ("RANK", "WORLD_SIZE", "LOCAL_RANK", "MASTER_ADDR", "MASTER_PORT")
    env = {name: value for name, value in os.environ.items() if name not in given and not name.startswith("SLURM_")}
    env |= {"PATH": f"{programs}{os.pathsep}{env['PATH']}", "OMP_NUM_THREADS": "1", "GLOO_SOCKET_IFNAME": "lo"}
    env |= {"DS_ACCELERATOR": "cpu"} if launcher == "deepspeed" else {}
    done = subprocess.run(command, env=env, cwd=tmp_path, capture_output=True, text=True, timeout=200)
    assert done.returncode == 0, done.stderr[-4000:]
    assert json.loads((run_dir / "environment.json").read_text())["world_size"] == 2
    assert [json.loads(line)["step"] for line in (run_dir / "metrics.jsonl").read_text().splitlines()] == [1, 2]
    assert json.loads((run_dir / "status.json").read_text())["state"] == "done"
    assert (run_dir / "logs" / "rank_00001.log").exists()
