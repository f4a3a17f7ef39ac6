"""The loop: one batch, one step, then the hooks, until the run is long enough or someone asks it to stop."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from pathlib import Path
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evatool.core.batch import Batch, LossDict
from evatool.core.errors import Interrupted, NumericalError, Preempted
from evatool.core.loader import Loader
from evatool.core.param_group import ParamGroup
from evatool.core.step import StepContext
from evatool.distributed.collectives import all_reduce_mean, gather_objects, rank, waited_sec
from evatool.distributed.engines.build import Engine
from evatool.objective.base import Objective
from evatool.train.grad_cache import forward_backward
from evatool.train.loss_spike import SpikeGate
from evatool.train.signals import SAVE, StopRequests
from evatool.train.state import SavedRun, TrainState, resume_from
from evatool.train.throughput import Throughput, Work, peak_memory_bytes
from evatool.train.tower_norms import TowerNorms

if TYPE_CHECKING:
    from evatool.train.hooks.base import Hook

log = logging.getLogger(__name__)


class Trainer:
    """Trains an objective for `num_steps` optimiser steps.

    Args:
        objective: the module that turns a batch into losses, already inside `engine`.
        engine: carries out the steps; every rank has its own part.
        loader: batches without end, from `state.position` on.
        groups: the engine's parameter groups, for their peak learning rates.
        schedule: factor on every peak learning rate by step.
        hooks: called in this order, on every rank.
        state: where the run stands; moves on as it trains.
        num_steps: optimiser steps of the whole run, the ones before a resume too.
        global_batch_size: samples of a step over all ranks.
        log_every: steps between two records of figures. Losses are fetched only then: a fetch makes a GPU wait.
        micro_batch_size: samples of a rank that go through the model at once; all of its batch when None.
        gate: sees each step's loss before its gradient is taken.
        restore: the newest whole checkpoint to roll back to, the same on every rank; None where there is none yet.
        stop_file, save_every_sec: as in `StopRequests`.
        work: what a sample costs, for the share of the hardware's peak that is used.
        tower_norms: finds the gradient norm of each tower.
    """

    def __init__(
        self,
        objective: Objective,
        engine: Engine,
        loader: Loader,
        groups: Sequence[ParamGroup],
        schedule: Callable[[int], float],
        hooks: Sequence[Hook],
        state: TrainState,
        num_steps: int,
        global_batch_size: int,
        log_every: int = 10,
        *,
        micro_batch_size: int | None = None,
        gate: SpikeGate | None = None,
        restore: Callable[[], SavedRun | None] | None = None,
        stop_file: Path | None = None,
        save_every_sec: float | None = None,
        work: Work | None = None,
        tower_norms: TowerNorms | None = None,
    ) -> None:
        self.objective, self.engine, self.loader, self.groups = objective, engine, loader, groups
        self.schedule, self.hooks, self.state = schedule, hooks, state
        self.num_steps, self.global_batch_size, self.log_every = num_steps, global_batch_size, log_every
        self.gate = gate if gate is not None else SpikeGate(None)
        self.restore = restore
        self.rollback_reason = ""  # set by a hook: go back to the last checkpoint after this step
        self.rollback_where = ""  # its step, ranks and sample keys
        self.batch: Batch | None = None  # of the step just done, for messages
        self.grad_norm: Tensor | None = None  # of the step just done, before clipping; not finite if it was skipped
        self.record: dict[str, float] = {}  # the last figures
        self._micro_batch_size, self._work, self._tower_norms = micro_batch_size, work, tower_norms
        self._busy_sec, self._before_sec, self._busy_steps = 0.0, 0.0, 0
        self._requests = StopRequests(engine.device, stop_file=stop_file, save_every_sec=save_every_sec)
        self._throughput = Throughput(work)

    def fit(self) -> TrainState:
        """Train to the end; every rank must call it.

        Returns: the final state.
        Raises: Preempted after SIGTERM, SIGUSR1 or a STOP file and Interrupted after Ctrl-C, once the hooks have saved;
            NumericalError from the guard; whatever the loader and hooks raise.
        """
        self.objective.train()
        with ExitStack() as stack:
            requests = stack.enter_context(self._requests)
            for hook in self.hooks:
                stack.callback(hook.close)
                hook.at_start(self)
            batches = iter(self.loader)
            self._throughput = Throughput(self._work)
            while self.state.step < self.num_steps:
                self._one_step(batches)
                if self.rollback_reason:
                    del batches  # ends the loader's processes
                    self._roll_back()
                    batches = iter(self.loader)
                asked = requests.agreed() if self.state.step < self.num_steps else None
                if asked == SAVE:
                    for hook in self.hooks:
                        hook.on_save(self)
                elif asked is not None:
                    self._stop(asked)
            for hook in self.hooks:
                hook.at_end(self)
        return self.state

    def _one_step(self, batches: Iterator[Batch]) -> None:
        start, waited = time.perf_counter(), waited_sec()
        batch = self.batch = next(batches)
        data_wait_sec = time.perf_counter() - start
        self._before_sec += data_wait_sec
        state, engine = self.state, self.engine

        context = StepContext(state.step, state.samples_seen, self.num_steps)
        factor = self.schedule(state.step)
        engine.set_lrs([group.lr * group.lr_scale * factor for group in self.groups])
        losses = forward_backward(
            engine,
            self.objective,
            batch,
            context,
            micro_batch_size=self._micro_batch_size or len(batch.keys),
            seed=step_seed(state.seed, state.step, rank()),
            gate=self.gate,
        )
        self._busy_sec += time.perf_counter() - start - (waited_sec() - waited)
        self._busy_steps += 1
        if self._tower_norms is not None:
            self._tower_norms.is_wanted = self._is_logged(state.step + 1)
        for hook in self.hooks:
            hook.before_update(self)
        self.grad_norm = engine.step()

        state.step += 1
        state.samples_seen += self.global_batch_size
        state.position = batch.position
        self._throughput.add(self.global_batch_size, data_wait_sec)
        if self.is_log_step:
            self.record = self._figures(losses, factor)
            weights = self.objective.changing_weights(context)
            self.record |= {f"train/weight/{name}": weight for name, weight in weights.items()}
        state.train_sec += time.perf_counter() - start
        for hook in self.hooks:
            hook.after_step(state, losses, self)

    @property
    def is_log_step(self) -> bool:
        """True after a step whose figures are in `record`: every `log_every`-th, the first and the last."""
        return self._is_logged(self.state.step)

    def _is_logged(self, step: int) -> bool:
        return step % self.log_every == 0 or step == 1 or step == self.num_steps

    def read_busy_sec(self) -> tuple[float, float]:
        """How long this rank was busy by itself, a step, since the last reading, and the part before its forward pass.

        See `stragglers`.
        """
        steps = max(1, self._busy_steps)
        busy = self._busy_sec / steps, self._before_sec / steps
        self._busy_sec, self._before_sec, self._busy_steps = 0.0, 0.0, 0
        return busy

    def _figures(self, losses: LossDict, factor: float) -> dict[str, float]:
        # One exchange and one fetch for all losses, which are means over the global batch.
        assert self.grad_norm is not None
        local = torch.stack([value.reshape(()).float() for value in (*losses.values(), self.grad_norm)])
        means = all_reduce_mean(local).tolist()
        figures: dict[str, float] = {"step": self.state.step, "samples_seen": self.state.samples_seen}
        figures |= {f"train/{name}": value for name, value in zip(losses, means, strict=False)}
        figures["optim/grad_norm"] = means[-1]
        if self._tower_norms is not None:
            norms = self._tower_norms.read(self.grad_norm)
            figures |= {f"optim/grad_norm/{tower}": float(norm) for tower, norm in norms.items()}
        for group in self.groups:
            key = f"optim/lr/{group.tower}"
            figures[key] = max(figures.get(key, 0.0), group.lr * group.lr_scale * factor)
        samples_left = (self.num_steps - self.state.step) * self.global_batch_size
        figures |= self._throughput.read(samples_left)
        figures |= self.data_counts()
        figures["memory/peak_bytes"] = peak_memory_bytes(self.engine.device)
        return figures

    def data_counts(self) -> dict[str, float]:
        """What the loaders of all ranks count (bad samples by cause, spares), summed; every rank must call it."""
        total: Counter[str] = Counter()
        for figures in gather_objects(dict(self.loader.counts())):
            total.update(figures)
        return dict(total)

    def _roll_back(self) -> None:
        """Weights, moments and schedule of the last checkpoint, and the samples after those that were met since."""
        before, what, where = self.state, self.rollback_reason, self.rollback_where or f"step {self.state.step}"
        self.rollback_reason = self.rollback_where = ""
        reason = f"{what} ({where})"
        saved = None if self.restore is None else self.restore()
        if saved is None:
            raise NumericalError(
                f"{what}; there is no checkpoint to go back to",
                where=where,
                fix="lower optim.*.lr or lengthen schedule.warmup_samples; set checkpoint.every_steps to be able to go "
                "back",
            )
        state = self.state = resume_from(saved, self.engine, self.groups)
        jumped_over = [state.position, before.position]
        jumped = {"from_step": before.step, "to_step": state.step, "jumped_over": jumped_over}
        state.rollbacks = [*before.rollbacks, {**jumped, "reason": reason}]
        state.position, state.train_sec = before.position, before.train_sec
        self.loader.position = state.position
        self.gate.reset(state.recent_losses)
        log.warning(
            "%s: back to the checkpoint of step %d; samples %d to %d are jumped over",
            reason,
            state.step,
            *jumped_over,
        )
        for hook in self.hooks:
            hook.load(saved, self)
            hook.on_rollback(self)

    def ask_for_save(self) -> None:
        """Have all ranks' hooks save after a step soon, the same one on every rank; one rank may ask alone."""
        self._requests.wants_save = True

    def saved_state(self) -> dict[str, object]:
        """`state` as a checkpoint keeps it; every rank must call it."""
        self.state.data_counts = self.data_counts()
        self.state.recent_losses = self.gate.state()
        return self.state.to_json()

    def _stop(self, reason: str) -> None:
        for hook in self.hooks:
            hook.on_stop(self)
        what = f"stopped by {reason} after step {self.state.step} of {self.num_steps}"
        kind = Interrupted if reason == "Ctrl-C" else Preempted
        raise kind(what, fix="run the same command with --resume to go on from there")


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one step's dropout on one rank: different for neighbouring seeds, steps and ranks."""
    # Odd 64-bit constants spread the three numbers over all bits; torch takes any 64-bit seed.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**64 - 1)
    mixed ^= mixed >> 31
    return mixed & (2**63 - 1)
