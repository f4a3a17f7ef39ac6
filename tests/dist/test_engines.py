"""All engines and ZeRO stages train alike and resume one another's checkpoints."""

from __future__ import annotations

import errno
import json
import logging
import os
import signal
import sys
import threading
import time
from pathlib import Path

import pytest
import torch
from toy_run import LetSavesEnd, ToyLoader, ToyObjective, make_trainer, toy_engine, toy_groups, toy_optim

from evatool.checkpoint.load import latest_checkpoint, load_checkpoint
from evatool.checkpoint.save import save_run
from evatool.distributed import versions
from evatool.distributed.collectives import all_reduce_mean, rank, world_size
from evatool.distributed.engines.build import Engine
from evatool.distributed.versions import own_versions
from evatool.core.loader import Loader
from evatool.core.errors import NumericalError, Preempted, TransientError, UsageError
from evatool.formats.safetensors import SafetensorsMap
from evatool.train.loss_spike import SpikeGate
from evatool.train.hooks.guards import NonFiniteGuard
from evatool.train.hooks.base import Hook
from evatool.train.state import describe_groups, resume_from

pytestmark = pytest.mark.dist

CELLS = [("ddp", 0), ("fsdp2", 0), ("deepspeed", 0), ("deepspeed", 1), ("deepspeed", 2), ("deepspeed", 3)]
NUM_STEPS = 6
BAD_STEP = 3  # one rank's pictures make its loss NaN here
Outcome = tuple[list[float], list[float], dict[str, torch.Tensor], dict[str, torch.Tensor]]


def train(engine: Engine, groups: list, first: int, last: int, bad_step: int | None = None) -> tuple[list, list]:
    """Mean loss and gradient norm of steps first..last - 1."""
    losses, norms = [], []
    batches = iter(ToyLoader(position=first * 8, rank=rank(), world_size=world_size()))
    for step in range(first, last):
        batch = next(batches)
        if step == bad_step and rank() == world_size() - 1:
            batch.image = torch.full(batch.image.shape, torch.nan)
        # Later steps go back, so the temperature leaves its bound again: a master copy that was not held there shows.
        engine.set_lrs([group.lr * group.lr_scale * (1 - 0.4 * step) for group in groups])
        loss = engine.forward(batch)["loss"]
        engine.backward(loss)
        losses.append(all_reduce_mean(loss).item())
        norms.append(engine.step().item())
    return losses, norms


def run_cell(kind: str, zero_stage: int, bad_step: int | None = BAD_STEP, optim_kind: str = "adamw") -> Outcome:
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0, has_projection=True)
    start = objective.model.logit_scale.item()
    objective.parameter_bounds = {"model.logit_scale": (start - 0.005, 4.6)}  # reached in the first step
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups, kind, zero_stage, optim=toy_optim(kind=optim_kind))
    losses, norms = train(engine, groups, 0, NUM_STEPS, bad_step)
    clone = lambda state: {name: tensor.clone() for name, tensor in state.items()}  # noqa: E731
    return losses, norms, clone(engine.model_state()), clone(engine.optimizer_state())


def run_cells(cells: list[tuple[str, int]], extensions: Path, optim_kind: str) -> list[Outcome]:
    os.environ |= {"PATH": "", "TORCH_EXTENSIONS_DIR": str(extensions)}  # no compiler is found, and none is missed
    os.chdir(extensions.parent)
    outcomes = [run_cell(*cell, optim_kind=optim_kind) for cell in cells]
    assert not extensions.exists(), "DeepSpeed compiled something"
    assert not list(extensions.parent.iterdir()), "no rank writes a configuration into the working folder"
    streams = [handler.stream for handler in logging.getLogger("DeepSpeed").handlers]
    assert streams == [sys.stderr], "stdout belongs to the command's result"
    return outcomes


def assert_same(ours: Outcome, expected: Outcome, cell: str) -> None:
    for which, rtol, atol in ((2, 1e-5, 1e-6), (3, 1e-4, 1e-7)):
        assert ours[which].keys() == expected[which].keys()
        for name, tensor in expected[which].items():
            message = f"{cell}: {name}"
            torch.testing.assert_close(ours[which][name], tensor, rtol=rtol, atol=atol, msg=message)
    for step in range(NUM_STEPS):
        if step == BAD_STEP:
            assert not any(torch.isfinite(torch.tensor([x[step] for x in (*ours[:2], *expected[:2])])))
        else:
            assert ours[0][step] == pytest.approx(expected[0][step], rel=1e-5), cell
            assert ours[1][step] == pytest.approx(expected[1][step], rel=1e-4), cell


@pytest.mark.parametrize("optim_kind", ["adamw", "lamb"])
@pytest.mark.parametrize(
    "num_ranks", [pytest.param(1, marks=pytest.mark.slow), 2, pytest.param(4, marks=pytest.mark.slow)]
)
def test_every_engine_is_the_single_process_engine(run_on_ranks, num_ranks, optim_kind, tmp_path):
    expected = run_cell("single", 0, optim_kind=optim_kind)
    assert expected[3]["num_updates"] == NUM_STEPS - 1
    for outcomes in run_on_ranks(run_cells, num_ranks, CELLS, tmp_path / "extensions", optim_kind):
        for cell, outcome in zip(CELLS, outcomes, strict=True):
            assert_same(outcome, expected, str(cell))


def save_after(folder: Path, kind: str, zero_stage: int, num_steps: int, optim_kind: str) -> None:
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0, has_projection=True)
    groups = toy_groups(objective)
    engine = toy_engine(objective, groups, kind, zero_stage, optim=toy_optim(kind=optim_kind))
    train(engine, groups, 0, num_steps)
    states = {"objective_state": engine.sharded_model_state(), "optimizer_state": engine.sharded_optimizer_state()}
    rest = {"groups": describe_groups(groups), "train_state": {"step": num_steps}, "model_config": {}}
    save_run(folder, num_steps, **states, **rest, resolved_toml="", keep=1)


def resume_and_train(folder: Path, cells: list[tuple[str, int]], optim_kind: str) -> list[list[float]]:
    losses = []
    for kind, zero_stage in cells:
        torch.manual_seed(123)  # other weights, which must not matter
        objective = ToyObjective(dropout=0.0, has_projection=True)
        groups = toy_groups(objective)
        engine = toy_engine(objective, groups, kind, zero_stage, optim=toy_optim(kind=optim_kind))
        state = resume_from(load_checkpoint(folder), engine, groups)
        losses.append(train(engine, groups, state.step, NUM_STEPS)[0])
    return losses


def save_and_resume(
    folder: Path, writers: list[tuple[str, int]], readers: list[tuple[str, int]], optim_kind: str
) -> list[list[float]]:
    losses = []
    for kind, zero_stage in writers:
        path = folder / f"{kind}{zero_stage}"
        save_after(path, kind, zero_stage, 3, optim_kind)
        losses += resume_and_train(path / "step_00000003", readers, optim_kind)
    return losses


@pytest.mark.parametrize(
    ("optim_kind", "num_ranks"),
    [("adamw", 2), pytest.param("lamb", 2, marks=pytest.mark.slow), pytest.param("adamw", 4, marks=pytest.mark.slow)],
)
def test_any_engine_resumes_any_other(run_on_ranks, optim_kind, num_ranks, tmp_path):
    torch.manual_seed(0)
    objective = ToyObjective(dropout=0.0, has_projection=True)
    groups = toy_groups(objective)
    whole, _ = train(toy_engine(objective, groups, optim=toy_optim(kind=optim_kind)), groups, 0, NUM_STEPS)
    writers = CELLS[1::2] if num_ranks == 2 else CELLS  # every way to hold a state: divided by rows, by groups, by both
    for answer in run_on_ranks(save_and_resume, num_ranks, tmp_path, writers, CELLS, optim_kind, timeout_sec=300):
        for losses in answer:
            assert losses == pytest.approx(whole[3:], rel=1e-5)
    # And across world sizes: what two ranks wrote, one process resumes.
    headers = set()
    for path in sorted(tmp_path.iterdir()):
        for losses in resume_and_train(path / "step_00000003", [("single", 0)], optim_kind):
            assert losses == pytest.approx(whole[3:], rel=1e-5), path.name
        files = [path / "step_00000003" / name for name in ("model.safetensors", "optimizer.safetensors")]
        headers.add(tuple((file.stat().st_size, tuple(SafetensorsMap(file))) for file in files))
    assert len(headers) == 1, "the files have one layout, whichever engine wrote them"


class SignalOnRank(Hook):
    """Sends one rank's process a signal after a step."""

    def __init__(self, number: int, step: int) -> None:
        self.number, self.step = number, step

    def after_step(self, result, trainer):
        if rank() == self.number and result.step == self.step:
            os.kill(os.getpid(), signal.SIGTERM)


def stop_one_rank(folder: Path) -> tuple[str, int]:
    trainer = make_trainer(folder, hooks=[SignalOnRank(1, 4)])
    try:
        trainer.fit()
    except Preempted as stopped:
        return str(stopped), trainer.state.step
    return "not stopped", trainer.state.step


class StuckOnRank(Loader):
    """The batches of another loader; on one rank the source does not answer after a step, or before the first."""

    def __init__(self, loader: Loader, step: int) -> None:
        self.loader, self.step, self.position = loader, step, loader.position

    def __iter__(self):
        for made, batch in enumerate(self.loader):
            if rank() == 1 and made == self.step:
                time.sleep(300)
            yield batch


def stop_stuck_ranks(folder: Path, step: int, told: list[int]) -> tuple[str, int, float]:
    """Both ranks run; one waits for data, the other for it; those of `told` get SIGTERM after a while."""
    trainer = make_trainer(folder, every_steps=3, hooks=[LetSavesEnd()])
    trainer.loader = StuckOnRank(trainer.loader, step)
    start = time.monotonic() + 4
    if rank() in told:
        threading.Timer(4, os.kill, (os.getpid(), signal.SIGTERM)).start()
    try:
        trainer.fit()
    except Preempted as stopped:
        return str(stopped), trainer.state.step, time.monotonic() - start
    return "not stopped", trainer.state.step, time.monotonic() - start


def train_to_the_end(folder: Path, resume: bool) -> int:
    return make_trainer(folder, every_steps=3, resume=resume).fit().step


def fail_to_save(folder: Path) -> str:
    trainer = make_trainer(folder, hooks=[LetSavesEnd()])
    os.fsync = lambda descriptor: (_ for _ in ()).throw(OSError(errno.ENOSPC, "no space left"))  # this process only
    try:
        trainer.fit()
    except TransientError as error:
        return f"{int(error.exit_code)} after step {trainer.state.step}: {error.what}"
    return "saved"


def too_many_bad_steps(folder: Path) -> tuple[str, str]:
    trainer = make_trainer(folder, hooks=[NonFiniteGuard(budget=0)])
    clean = trainer.engine.forward

    def on_rank_1(batch):
        if rank() == 1 and trainer.state.step == 2:
            batch.image = torch.full(batch.image.shape, torch.nan)
        return clean(batch)

    trainer.engine.forward = on_rank_1
    try:
        trainer.fit()
    except NumericalError as error:
        return error.what, error.where or ""
    return "went on", ""


def test_a_signal_to_one_rank_stops_all_after_the_same_step(run_on_ranks, tmp_path):
    for message, step in run_on_ranks(stop_one_rank, 2, tmp_path):
        assert message.startswith("stopped by SIGTERM after step 4 of 12")
        assert step == 4
    assert load_checkpoint(tmp_path / "checkpoints" / "step_00000004").train_state["samples_seen"] == 32


@pytest.mark.slow
def test_a_stop_is_obeyed_while_one_rank_waits_for_data_and_the_other_for_it(run_on_ranks, tmp_path):
    """Told both, as by a launcher. They cannot meet to save, so the last save counts: at most one interval is lost."""
    folder = tmp_path / "stopped"
    for message, step, sec in run_on_ranks(stop_stuck_ranks, 2, folder, 4, [0, 1]):
        assert message.startswith("stopped by SIGTERM after step 4 of 12 without a save")
        assert (step, sec < 20) == (4, True)
    assert [path.name for path in (folder / "checkpoints").iterdir()] == ["step_00000003"]
    assert run_on_ranks(train_to_the_end, 2, folder, True) == [12, 12]
    assert run_on_ranks(train_to_the_end, 2, tmp_path / "whole", False) == [12, 12]
    files = [each / "checkpoints/step_00000012/model.safetensors" for each in (folder, tmp_path / "whole")]
    assert files[0].read_bytes() == files[1].read_bytes()


@pytest.mark.slow
def test_a_stop_before_the_first_batch_ends_both_ranks(run_on_ranks, tmp_path):
    for message, step, sec in run_on_ranks(stop_stuck_ranks, 2, tmp_path, 0, [0, 1]):
        assert message.startswith("stopped by SIGTERM after step 0 of 12")
        assert (step, sec < 20) == (0, True)
    assert latest_checkpoint(tmp_path) is None


def test_a_full_disk_on_rank_0_ends_all_ranks(run_on_ranks, tmp_path):
    first, second = run_on_ranks(fail_to_save, 2, tmp_path)
    assert first.startswith("76 after step 8: 3 saves in a row failed; the last: the disk is full")
    assert "step_00000007 could not be saved by rank 0" in first
    assert second == first


def odd_versions() -> str:
    if rank() == 1:
        versions.own_versions = lambda: own_versions() | {"torch": "1.13.0"}
    try:
        versions.check_versions()
    except UsageError as error:
        return error.what
    return "the same"


def test_ranks_with_other_versions_are_named_and_refused(run_on_ranks):
    for answer in run_on_ranks(odd_versions, 3):
        assert answer.startswith("1 of 3 ranks run other versions: rank 1 on ")
        assert f"torch 1.13.0 (rank 0: {torch.__version__})" in answer


def test_bad_values_on_one_rank_end_all_ranks(run_on_ranks, tmp_path):
    answers = run_on_ranks(too_many_bad_steps, 2, tmp_path)
    assert answers[0] == answers[1]
    assert answers[0][0].startswith("1 of the last 100 steps")
    assert answers[0][1].startswith("step 3, rank 0: loss nan, samples sample16")
    assert "rank 1: loss nan, samples sample20" in answers[0][1]


def spike_on_one_rank(folder: Path) -> tuple[list[int], list[float], list[dict]]:
    trainer = make_trainer(
        folder, hooks=[NonFiniteGuard(journal=folder / "journal.jsonl")], gate=SpikeGate(6.0, window=6)
    )
    forward = trainer.engine.forward

    def spiking(batch, **options):
        losses = forward(batch, **options)
        return losses | {"loss": losses["loss"] * (500 if rank() == 1 and trainer.state.step == 9 else 1)}

    trainer.engine.forward = spiking
    state = trainer.fit()
    events = [json.loads(line) for line in (folder / "journal.jsonl").read_text().splitlines()] if rank() == 0 else []
    return state.skipped_steps, trainer.gate.state(), events


def test_a_spike_on_one_rank_is_skipped_on_all(run_on_ranks, tmp_path):
    first, second = run_on_ranks(spike_on_one_rank, 2, tmp_path)
    assert first[0] == second[0] == [10]
    assert first[1] == second[1], "one window of losses, which the spike has not entered"
    (event,) = first[2]
    assert (event["cause"], event["step"], len(event["ranks"])) == ("spike", 10, 2)
    losses = {each["rank"]: each["loss"] for each in event["ranks"]}
    assert losses[1] > 100 > losses[0], "whose it is can be seen"
