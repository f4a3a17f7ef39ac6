"""Faults of single ranks: overflow, flipped bits, hangs, kill -9 (rows R3, R12, R14, R15 of docs/faults.md).
"""

from __future__ import annotations

import json
import os
import random
import signal
from pathlib import Path
from types import SimpleNamespace

import pytest
import torch
from toy_run import NUM_STEPS, ToyLoader, ToyObjective, make_trainer, toy_engine, toy_groups

from evatool.checkpoint.load import Checkpoint, latest_checkpoint, load_checkpoint
from evatool.distributed.collectives import rank, world_size
from evatool.core.errors import ExitCode, UnhealthyNodeError
from evatool.train.hooks.health import ShardCheck, HangWatch, ReplicaCheck
from evatool.train.hooks.base import Hook
from evatool.train.state import TrainState

pytestmark = pytest.mark.dist


def overflow(kind: str) -> tuple[list[bool], list[float], bool, float]:
    """fp16 steps from a scale that overflows: whether each was finite, the scales, whether weights stayed at first."""
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups, kind, precision="fp16")
    high = {"loss_scale": torch.tensor([2.0**24]), "loss_scale_good_steps": torch.zeros(1, dtype=torch.int32)}
    engine.load_optimizer_state({"num_updates": torch.zeros(1, dtype=torch.int64)} | high)
    before = {name: tensor.clone() for name, tensor in engine.model_state().items()}
    batches = iter(ToyLoader(rank=rank(), world_size=world_size()))
    finite, scales, stayed = [], [], True
    for _ in range(20):
        engine.set_lrs([group.lr for group in groups])
        engine.backward(engine.forward(next(batches))["loss"])
        finite.append(bool(torch.isfinite(engine.step())))
        scales.append(float(engine.sharded_optimizer_state().pieces[-2].values) if rank() == 0 else 0.0)
        if not any(finite):
            stayed &= all(torch.equal(before[name], tensor) for name, tensor in engine.model_state().items())
    return finite, scales, stayed, float(engine.optimizer_state()["loss_scale"])


@pytest.mark.parametrize(("kind", "num_ranks"), [("single", 1), ("fsdp2", 2)])
def test_an_overflow_in_fp16_skips_the_step_and_halves_the_scale_on_all_ranks(run_on_ranks, kind, num_ranks):
    answers = run_on_ranks(overflow, num_ranks, kind)
    finite, scales, stayed, last = answers[0]
    assert not finite[0]
    assert finite[-1], "it finds a scale that fits"
    assert stayed, "no skipped step changes a weight"
    for step, (was_finite, scale) in enumerate(zip(finite, scales, strict=True)):
        before = scales[step - 1] if step else 2.0**24
        assert scale == (before if was_finite else before / 2)
    for other in answers[1:]:
        assert (other[0], other[3]) == (finite, last), "the same on every rank, and in the checkpoint"


def flip_a_bit(kind: str, zero_stage: int) -> str:
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0)
    engine = toy_engine(objective, toy_groups(objective), kind, zero_stage)
    trainer = SimpleNamespace(engine=engine)
    check = ReplicaCheck(every_steps=5)
    check.after_step(SimpleNamespace(step=5), trainer)
    if rank() == 1:
        objective.model.text.token_embedding.weight.data.view(torch.int32)[3, 2] ^= 1
    check.after_step(SimpleNamespace(step=9), trainer)
    try:
        check.after_step(SimpleNamespace(step=10), trainer)
    except UnhealthyNodeError as error:
        return f"{int(error.exit_code)} {error.where} {error.what}"
    return "not found"


@pytest.mark.parametrize(("kind", "zero_stage"), [("ddp", 0), ("deepspeed", 1)])
def test_a_flipped_bit_in_one_replica_is_found_and_the_rank_named(run_on_ranks, kind, zero_stage):
    for answer in run_on_ranks(flip_a_bit, 3, kind, zero_stage):
        assert answer.startswith("79 step 10 weights differ between ranks that hold the same: rank 1 on ")
        assert "rank 2" not in answer


class FlipABit(Hook):
    """One bit of one number of what a rank holds alone, after a step or within the next."""

    def __init__(self, which: int, step: int, is_within_step: bool) -> None:
        self.which, self.step, self.is_within_step = which, step, is_within_step

    def before_update(self, step, trainer):
        if self.is_within_step and trainer.state.step == self.step:
            self.flip(trainer)

    def after_step(self, result, trainer):
        if not self.is_within_step and result.step == self.step:
            self.flip(trainer)

    def flip(self, trainer):
        tensors = trainer.engine.sharded_tensors()
        # Of a number that counts: the lowest bit of a float that is not 0.
        tensor = next(t for t in [*tensors[self.which :], *tensors] if t.numel() and t.abs().max() > 0)
        flat = tensor.view(-1)
        flat.view(torch.int32)[int(flat.abs().argmax())] ^= 1


CELLS = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]


def watch_divided(folder: Path) -> dict[tuple[str, int, str], str]:
    """What each engine's run says where nothing happens, where a weight's bit flips and where a moment's does."""
    answers = {}
    for kind, stage in CELLS:
        for fault in ("none", "weight", "moment"):
            hooks: list[Hook] = [ShardCheck(every_steps=4)]
            if rank() == 1 and fault == "weight":  # within a step, before the check looks
                hooks.insert(0, FlipABit(0, 5, is_within_step=True))
            if rank() == 1 and fault == "moment":  # after a step, when the check has looked
                hooks.append(FlipABit(-1, 5, is_within_step=False))
            path = folder / f"{kind}{stage}{fault}"
            trainer = make_trainer(path, hooks=hooks, every_steps=None, kind=kind, zero_stage=stage)
            if fault != "none" and not trainer.engine.sharded_tensors():
                continue
            try:
                answers[kind, stage, fault] = f"trained to step {trainer.fit().step}"
            except UnhealthyNodeError as error:
                answers[kind, stage, fault] = f"{int(error.exit_code)} {error.where} {error.what}"
    return answers


def test_a_flipped_bit_in_divided_state_is_found_and_the_rank_named(run_on_ranks, tmp_path):
    """R14 where no other rank holds the same; and training alone is never taken for it."""
    for answers in run_on_ranks(watch_divided, 2, tmp_path):
        assert len(answers) == len(CELLS) + 2 * 4, "fsdp2 and ZeRO 1 to 3 divide"
        for (kind, stage, fault), answer in answers.items():
            expected = f"trained to step {NUM_STEPS}"
            if fault != "none":
                expected = "79 step 8 weights or moments have changed between two steps: rank 1 on "
            assert answer.startswith(expected), (kind, stage, fault)


class SignalItself(Hook):
    """Sends one rank's own process a signal that it cannot hold."""

    def __init__(self, number: int, step: int, which: int) -> None:
        self.number, self.step, self.which = number, step, which

    def after_step(self, result, trainer):
        if rank() == self.number and result.step == self.step:
            os.kill(os.getpid(), self.which)


def hang(folder: Path) -> None:
    def record(exit_code: int, message: str) -> None:
        (folder / f"status{rank()}.json").write_text(json.dumps([exit_code, message]))

    watch = HangWatch(4.0, folder / "logs", record)
    make_trainer(folder, hooks=[watch, SignalItself(1, 4, signal.SIGSTOP)]).fit()


def test_a_rank_that_hangs_ends_the_others_with_their_stacks(start_ranks, tmp_path):
    ranks = start_ranks(hang, 2, tmp_path)
    waiting, stopped = ranks.processes
    waiting.join(timeout=60)
    stopped.kill()
    ranks.close()
    assert waiting.exitcode == ExitCode.TRANSIENT
    code, message = json.loads((tmp_path / "status0.json").read_text())
    assert code == ExitCode.TRANSIENT
    assert "rank 0" in message
    assert "--resume" in message
    stacks = (tmp_path / "logs" / "stacks_rank_00000.txt").read_text()
    assert "trainer.py" in stacks, "where the loop waits"


def train_or_resume(folder: Path, killed_rank: int, killed_after: int) -> None:
    hooks = [SignalItself(killed_rank, killed_after, signal.SIGKILL)] if killed_after else []
    resume = latest_checkpoint(folder) is not None if (folder / "checkpoints").exists() else False
    make_trainer(folder, hooks=hooks, every_steps=3, resume=resume).fit()


def assert_same_state(one: Checkpoint, other: Checkpoint) -> None:
    assert one.step == other.step
    for ours, theirs in ((one.objective_state, other.objective_state), (one.optimizer_state, other.optimizer_state)):
        assert ours.keys() == theirs.keys()
        assert all(torch.equal(ours[name], theirs[name]) for name in ours)


@pytest.mark.slow
def test_kill_9_at_fifty_random_times(start_ranks, run_on_ranks, tmp_path):
    """Ten runs, each killed five times (a random rank, at a random moment) and resumed, end with the same bits."""
    run_on_ranks(train_or_resume, 2, tmp_path / "whole", 0, 0)
    rng = random.Random(0)
    for run in range(10):
        folder, before = tmp_path / f"run{run}", 0
        for _ in range(5):
            killed_rank, step = rng.randrange(2), rng.randrange(before + 1, min(before + 5, NUM_STEPS))
            ranks = start_ranks(train_or_resume, 2, folder, killed_rank, step)
            ranks.processes[killed_rank].join(timeout=60)
            assert ranks.processes[killed_rank].exitcode == -signal.SIGKILL
            ranks.processes[1 - killed_rank].join(timeout=90)
            ranks.close()
            newest = latest_checkpoint(folder) if (folder / "checkpoints").exists() else None
            found = 0 if newest is None else load_checkpoint(newest).step
            # Written beside the steps: the save before the last one that was begun is whole at the least.
            assert max(before, step - 2 * 3) <= found <= step
            before = found
        run_on_ranks(train_or_resume, 2, folder, 0, 0)
        assert_same_state(*(load_checkpoint(latest_checkpoint(found)) for found in (tmp_path / "whole", folder)))


def test_kill_9_of_a_rank_loses_no_more_than_one_interval(start_ranks, run_on_ranks, tmp_path):
    """Killed twice, in a step and right after a save, then finished: the bits of a run that nothing happened to."""
    run_on_ranks(train_or_resume, 2, tmp_path / "whole", 0, 0)
    for killed_rank, step, saved in ((1, 5, 3), (0, 7, 6)):
        ranks = start_ranks(train_or_resume, 2, tmp_path / "killed", killed_rank, step)
        ranks.processes[killed_rank].join(timeout=60)
        assert ranks.processes[killed_rank].exitcode == -signal.SIGKILL
        ranks.processes[1 - killed_rank].join(timeout=90)
        ranks.close()
        assert latest_checkpoint(tmp_path / "killed").name == f"step_{saved:08d}"
    run_on_ranks(train_or_resume, 2, tmp_path / "killed", 0, 0)
    one, other = (load_checkpoint(latest_checkpoint(tmp_path / name)) for name in ("whole", "killed"))
    assert one.step == NUM_STEPS
    assert_same_state(one, other)
