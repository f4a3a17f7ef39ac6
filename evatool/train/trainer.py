"""The loop: one batch, one step, then the hooks, until the run is long enough or someone asks it to stop."""

from __future__ import annotations

import logging
import time
from collections import Counter
from collections.abc import Callable, Iterator, Sequence
from contextlib import ExitStack
from typing import TYPE_CHECKING

import torch
from torch import Tensor, nn

from evatool.distributed.collectives import all_reduce_mean, gather_objects, rank
from evatool.distributed.engine import Engine
from evatool.errors import Interrupted, Preempted
from evatool.train.signals import StopRequests
from evatool.train.state import TrainState
from evatool.train.throughput import Throughput, peak_memory_bytes
from evatool.types import Batch, Loader, LossDict, ParamGroup

if TYPE_CHECKING:
    from evatool.train.hooks import Hook

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
    """

    def __init__(
        self,
        objective: nn.Module,
        engine: Engine,
        loader: Loader,
        groups: Sequence[ParamGroup],
        schedule: Callable[[int], float],
        hooks: Sequence[Hook],
        state: TrainState,
        num_steps: int,
        global_batch_size: int,
        log_every: int = 10,
    ) -> None:
        self.objective, self.engine, self.loader, self.groups = objective, engine, loader, groups
        self.schedule, self.hooks, self.state = schedule, hooks, state
        self.num_steps, self.global_batch_size, self.log_every = num_steps, global_batch_size, log_every
        self.batch: Batch | None = None  # of the step just done, for messages
        self.grad_norm: Tensor | None = None  # of the step just done, before clipping; not finite if it was skipped
        self.record: dict[str, float] = {}  # the last figures
        self._throughput = Throughput()

    def fit(self) -> TrainState:
        """Train to the end; every rank must call it.

        Returns: the final state.
        Raises: Preempted after SIGTERM or SIGUSR1 and Interrupted after Ctrl-C, once the hooks have saved;
            NumericalError from the guard; whatever the loader and hooks raise.
        """
        self.objective.train()
        with ExitStack() as stack:
            stops = stack.enter_context(StopRequests(self.engine.device))
            for hook in self.hooks:
                stack.callback(hook.close)
                hook.at_start(self)
            batches = iter(self.loader)
            self._throughput = Throughput()
            while self.state.step < self.num_steps:
                self._one_step(batches)
                reason = stops.agreed() if self.state.step < self.num_steps else None
                if reason is not None:
                    self._stop(reason)
            for hook in self.hooks:
                hook.at_end(self)
        return self.state

    def _one_step(self, batches: Iterator[Batch]) -> None:
        start = time.perf_counter()
        batch = self.batch = next(batches)
        data_wait_sec = time.perf_counter() - start
        state, engine = self.state, self.engine

        factor = self.schedule(state.step)
        engine.set_lrs([group.lr * group.lr_scale * factor for group in self.groups])
        torch.manual_seed(step_seed(state.seed, state.step, rank()))
        losses = engine.forward(batch)
        engine.backward(losses["loss"])
        losses = {name: loss.detach() for name, loss in losses.items()}
        self.grad_norm = engine.step()

        state.step += 1
        state.samples_seen += self.global_batch_size
        state.position = batch.position
        self._throughput.add(self.global_batch_size, data_wait_sec)
        if self.is_log_step:
            self.record = self._figures(losses, factor)
        state.train_sec += time.perf_counter() - start
        for hook in self.hooks:
            hook.after_step(state, losses, self)

    @property
    def is_log_step(self) -> bool:
        """True after a step whose figures are in `record`: every `log_every`-th, the first and the last."""
        step = self.state.step
        return step % self.log_every == 0 or step == 1 or step == self.num_steps

    def _figures(self, losses: LossDict, factor: float) -> dict[str, float]:
        # One exchange and one fetch for all losses, which are means over the global batch.
        assert self.grad_norm is not None
        local = torch.stack([value.reshape(()).float() for value in (*losses.values(), self.grad_norm)])
        means = all_reduce_mean(local).tolist()
        figures: dict[str, float] = {"step": self.state.step, "samples_seen": self.state.samples_seen}
        figures |= {f"train/{name}": value for name, value in zip(losses, means, strict=False)}
        figures["optim/grad_norm"] = means[-1]
        for group in self.groups:
            key = f"optim/lr/{group.tower}"
            figures[key] = max(figures.get(key, 0.0), group.lr * group.lr_scale * factor)
        figures |= self._throughput.read()
        figures |= self.data_figures()
        figures["memory/peak_bytes"] = peak_memory_bytes(self.engine.device)
        return figures

    def data_figures(self) -> dict[str, float]:
        """What the loaders of all ranks count (bad samples by cause, spares), summed; every rank must call it."""
        counted = getattr(self.loader, "figures", dict)  # a plain iterator of batches counts nothing
        total: Counter[str] = Counter()
        for figures in gather_objects(counted()):
            total.update(figures)
        return dict(total)

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
