"""The loop: one batch, one step, then the hooks, until the run is long enough or someone asks it to stop."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import Protocol

import torch
from torch import Tensor

from evatool.core.batch import Batch, LossDict
from evatool.core.errors import Interrupted, NumericalError, Preempted
from evatool.core.loader import BatchList, Loader
from evatool.core.param_group import ParamGroup
from evatool.core.step import StepContext
from evatool.distributed.collectives import all_reduce_mean, gather_objects, rank, waited_sec, world_size
from evatool.distributed.engines.base import Engine
from evatool.objective.base import Objective
from evatool.train.control import RunSnapshot, StepResult, TrainerConfig, TrainerControl
from evatool.train.grad_cache import forward_backward
from evatool.train.hooks.base import Hook
from evatool.train.loss_spike import SpikeGate
from evatool.train.signals import END, SAVE, StopRequests, StopWhileWaiting
from evatool.train.state import SavedRun, TrainState, describe_groups, resume_from
from evatool.train.throughput import Throughput, Work, peak_memory_bytes
from evatool.train.tower_norms import TowerNorms

log = logging.getLogger(__name__)


def constant_schedule(step: int) -> float:
    """1 at every step: learning rates stay at their peak."""
    return 1.0


class Trainer(TrainerControl):
    """Trains an objective for `config.num_steps` optimiser steps.

    Args:
        config: the plain values of the loop.
        objective: the module that turns a batch into losses, already inside `engine`.
        engine: carries out the steps; every rank has its own part.
        loader: batches without end, from `state.position` on; a list of batches is gone through again and again.
        groups: the engine's parameter groups, for their peak learning rates.
        schedule: factor on every peak learning rate by step, counted from 0.
        hooks: called in this order, on every rank.
        state: where the run stands, and moves on as it trains; at its beginning when None.
        gate: sees each step's loss before its gradient is taken; lets every loss through when None.
        restore: finds the newest whole checkpoint to roll back to, the same on every rank, and returns None where there
            is none yet; without it the run cannot roll back.
        work: what a sample costs, for the share of the hardware's peak that is used.
        tower_norms: finds the gradient norm of each tower.
        draws: what the model draws by sample; all its random numbers are torch's when None.

    Attributes:
        metrics: those of the step that was logged last; empty before the first.
    """

    def __init__(
        self,
        config: TrainerConfig,
        *,
        objective: Objective,
        engine: Engine,
        loader: Loader | Sequence[Batch],
        groups: Sequence[ParamGroup],
        schedule: Callable[[int], float] = constant_schedule,
        hooks: Sequence[Hook] = (),
        state: TrainState | None = None,
        gate: SpikeGate | None = None,
        restore: Callable[[], SavedRun | None] | None = None,
        work: Work | None = None,
        tower_norms: TowerNorms | None = None,
        draws: SampleDraws | None = None,
    ) -> None:
        self.config, self.objective, self.engine, self.groups = config, objective, engine, groups
        self.state = TrainState(seed=config.seed) if state is None else state
        if not isinstance(loader, Loader):
            loader = BatchList(loader, config.global_batch_size, self.state.position)
        self.loader, self.schedule, self.hooks = loader, schedule, list(hooks)
        self.gate = gate if gate is not None else SpikeGate(None)
        self.metrics: dict[str, float] = {}
        self._restore, self._work, self._tower_norms, self._draws = restore, work, tower_norms, draws
        self._rollback: tuple[str, str] | None = None  # reason and where, once one was requested
        self._requests = StopRequests(engine.device, stop_file=config.stop_file, save_every_sec=config.save_every_sec)
        self._throughput = Throughput(work)

    def fit(self) -> TrainState:
        """Train to the end; every rank must call it.

        Returns: the final state.
        Raises: Preempted after SIGTERM, SIGUSR1, a STOP file or a hook's request, and Interrupted after Ctrl-C, once
            the hooks have saved; NumericalError from the guard; whatever the loader and hooks raise.
        """
        self.objective.train()
        with ExitStack() as stack:
            requests = stack.enter_context(self._requests)
            for hook in self.hooks:
                stack.callback(hook.close)
                hook.at_start(self)
            self._throughput = Throughput(self._work)
            try:
                self._train(requests)
            except StopWhileWaiting:
                self._stop_between_steps(requests)
            except RuntimeError as error:
                if world_size() == 1 or requests.reason is None:
                    raise
                # Another rank has stopped without this one: an exchange between them was cut off.
                raise self._stopped(requests.reason, " without a save") from error
            for hook in self.hooks:
                hook.at_end(self)
        return self.state

    def _train(self, requests: StopRequests) -> None:
        """Step by step to the end of the run, or until it is to end early."""
        batches = iter(self.loader)
        asked: str | None = None
        while self.state.step < self.config.num_steps and asked != END:
            self._make_step(batches)
            if self._rollback is not None:
                del batches  # ends the loader's processes
                self._roll_back()
                batches = iter(self.loader)
            asked = requests.agreed() if self.state.step < self.config.num_steps else None
            if asked == SAVE:
                for hook in self.hooks:
                    hook.on_save(self)
            elif asked is not None and asked != END:
                self._stop(asked)

    # ------------------------------------------------------------------------------------------------- one step

    def _make_step(self, batches: Iterator[Batch]) -> None:
        start, waited = time.perf_counter(), waited_sec()
        with self._requests.waiting_for_data():
            batch = next(batches)
        data_wait_sec = time.perf_counter() - start
        state, engine, config = self.state, self.engine, self.config
        context = StepContext(state.step, state.samples_seen, config.num_steps)
        is_logged = config.is_logged(state.step + 1)

        factor = self.schedule(state.step)
        engine.set_lrs([group.lr * group.lr_scale * factor for group in self.groups])
        losses = forward_backward(
            engine,
            self.objective,
            batch,
            context,
            micro_batch_size=config.micro_batch_size or len(batch.keys),
            seed=step_seed(state.seed, state.step, rank()),
            gate=self.gate,
            draw=self._draw_of_step(),
        )
        busy_sec = time.perf_counter() - start - (waited_sec() - waited)
        if self._tower_norms is not None:
            self._tower_norms.start_step(is_read=is_logged)
        for hook in self.hooks:
            hook.before_update(context, self)
        grad_norm = engine.step()

        state.step += 1
        state.samples_seen += config.global_batch_size
        state.position = batch.position
        self._throughput.add(config.global_batch_size, data_wait_sec)
        if is_logged:
            self.metrics = self._read_metrics(losses, grad_norm, factor)
            weights = self.objective.changing_weights(context)
            self.metrics |= {f"train/weight/{name}": weight for name, weight in weights.items()}
        state.train_sec += time.perf_counter() - start
        result = StepResult(
            context=context,
            step=state.step,
            samples_seen=state.samples_seen,
            losses=losses,
            batch=batch,
            grad_norm=grad_norm,
            is_spike=self.gate.is_closed,
            busy_sec=busy_sec,
            data_wait_sec=data_wait_sec,
            is_logged=is_logged,
            metrics=self.metrics if is_logged else {},
        )
        for hook in self.hooks:
            hook.after_step(result, self)

    def _read_metrics(self, losses: LossDict, grad_norm: Tensor, factor: float) -> dict[str, float]:
        """The metrics of the step just made; every rank must call it."""
        # One exchange and one fetch for all losses, which are means over the global batch.
        local = torch.stack([value.reshape(()).float() for value in (*losses.values(), grad_norm)])
        means = all_reduce_mean(local).tolist()
        metrics: dict[str, float] = {"step": self.state.step, "samples_seen": self.state.samples_seen}
        metrics |= {f"train/{name}": value for name, value in zip(losses, means, strict=False)}
        metrics["optim/grad_norm"] = means[-1]
        if self._tower_norms is not None:
            norms = self._tower_norms.read(grad_norm)
            metrics |= {f"optim/grad_norm/{tower}": float(norm) for tower, norm in norms.items()}
        for group in self.groups:
            key = f"optim/lr/{group.tower}"
            metrics[key] = max(metrics.get(key, 0.0), group.lr * group.lr_scale * factor)
        samples_left = (self.config.num_steps - self.state.step) * self.config.global_batch_size
        metrics |= self._throughput.read(samples_left)
        metrics |= self.data_counts()
        metrics["memory/peak_bytes"] = peak_memory_bytes(self.engine.device)
        return metrics

    def data_counts(self) -> dict[str, float]:
        """The loaders' counters (bad samples by cause, replacements) summed over ranks; every rank must call it."""
        total: Counter[str] = Counter()
        for counts in gather_objects(dict(self.loader.counts())):
            total.update(counts)
        return dict(total)

    # ------------------------------------------------------------------------------------- what hooks ask of the run

    @property
    def can_roll_back(self) -> bool:
        return self._restore is not None

    @property
    def is_rolling_back(self) -> bool:
        return self._rollback is not None

    def request_save(self) -> None:
        self._requests.request_save()

    def request_stop(self, reason: str) -> None:
        self._requests.request_stop(reason)

    def request_end(self) -> None:
        self._requests.request_end()

    def request_rollback(self, reason: str, where: str = "") -> None:
        self._rollback = reason, where or f"step {self.state.step}"

    def snapshot(self) -> RunSnapshot:
        objective_state = self.engine.sharded_model_state()
        for hook in self.hooks:
            own = hook.sharded_state(self)
            objective_state = objective_state if own is None else objective_state.merged(own)
        optimizer_state = self.engine.sharded_optimizer_state()
        self.state.data_counts = self.data_counts()
        self.state.recent_losses = self.gate.state()
        return RunSnapshot(
            self.state.step, objective_state, optimizer_state, describe_groups(self.groups), self.state.to_json()
        )

    def _roll_back(self) -> None:
        """Weights, moments and schedule of the last checkpoint, and the samples after those that were met since."""
        assert self._rollback is not None
        (what, where), self._rollback = self._rollback, None
        before, reason = self.state, f"{what} ({where})"
        saved = None if self._restore is None else self._restore()
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
            hook.load_state(saved, self)
            hook.on_rollback(self)

    def _stop(self, asked: str) -> None:
        for hook in self.hooks:
            hook.on_stop(self)
        raise self._stopped(asked)

    def _stop_between_steps(self, requests: StopRequests) -> None:
        """A stop while this rank waited for data. One rank alone saves what it has; several could not all take part."""
        assert requests.reason is not None
        if world_size() > 1:
            log.warning("no batch came: this rank stops without a save, since the others wait for it inside a step")
            raise self._stopped(requests.reason, " without a save")
        if self.state.step == 0:
            raise self._stopped(requests.reason, "; there is nothing to save")
        self._stop(requests.reason)

    def _draw_of_step(self) -> Callable[[Batch], None]:
        """What is drawn before a forward pass, by the rule that the run began with."""
        draws, state, device = self._draws, self.state, self.engine.device
        if draws is None:
            return lambda chunk: None
        if state.draws_keyed_by != "sample":
            return lambda chunk: draws.start(None, state.seed, device)
        return lambda chunk: draws.start(chunk.sample, state.seed, device)

    def _stopped(self, asked: str, how: str = "") -> Interrupted | Preempted:
        reason, state = self._requests.reason_of(asked), self.state
        what = f"stopped by {reason} after step {state.step} of {self.config.num_steps}{how}"
        kind = Interrupted if asked == "Ctrl-C" else Preempted
        there = "the last save" if how else "there"
        return kind(what, fix=f"run the same command with --resume to go on from {there}")


class SampleDraws(Protocol):
    """Layers that draw by sample (`model.keyed_draws.StepDraws` is one)."""

    def start(self, samples: Tensor | None, seed: int, device: torch.device) -> None:
        """Draw for a forward pass over samples (B,) of these places in the run; None for torch's random numbers."""
        ...


def step_seed(seed: int, step: int, rank: int) -> int:
    """Seed of one step's torch random numbers on one rank: different for neighbouring seeds, steps and ranks."""
    # Odd 64-bit constants spread the three numbers over all bits; torch takes any 64-bit seed.
    mixed = (seed * 0x9E3779B97F4A7C15 + step * 0xBF58476D1CE4E5B9 + rank * 0x94D049BB133111EB) & (2**64 - 1)
    mixed ^= mixed >> 31
    return mixed & (2**63 - 1)
