"""Hooks that watch a run: values that are not finite, and a loss that never moves."""

from __future__ import annotations

import logging
import math
from typing import TYPE_CHECKING

import torch
from torch import Tensor

from evatool.distributed.collectives import all_reduce_mean, gather_objects, rank
from evatool.errors import NumericalError
from evatool.train.hooks import Hook
from evatool.train.state import TrainState
from evatool.types import LossDict

if TYPE_CHECKING:
    from evatool.train.trainer import Trainer

log = logging.getLogger(__name__)


class NonFiniteGuard(Hook):
    """Reports the steps that the engine skipped because loss or gradient was not finite, and ends the run when they
    become too many.

    The engine has already kept such values from the weights, on every rank alike. Here they are counted: at once on a
    CPU, on logging steps on a GPU, which must not wait for every step.

    Args:
        budget: skipped steps that are borne in any `window` steps.
    Raises: NumericalError (exit code 80), on every rank, naming step, ranks and sample keys.
    """

    def __init__(self, budget: int = 8, window: int = 100) -> None:
        self._budget, self._window = budget, window
        self._unread: list[tuple[int, Tensor, Tensor, list[str]]] = []

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        assert trainer.grad_norm is not None
        assert trainer.batch is not None
        self._unread.append((state.step, trainer.grad_norm, losses["loss"], trainer.batch.keys))
        if trainer.engine.device.type == "cpu" or trainer.is_log_step or state.step == trainer.num_steps:
            self._read(state)

    def on_stop(self, trainer: Trainer) -> None:
        self._read(trainer.state)

    def _read(self, state: TrainState) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        finite = torch.isfinite(torch.stack([norm for _, norm, _, _ in unread])).tolist()
        for (step, _, loss, keys), is_finite in zip(unread, finite, strict=True):
            if not is_finite:  # the same on every rank, so all of them gather
                self._skipped(state, step, float(loss), keys)

    def _skipped(self, state: TrainState, step: int, loss: float, keys: list[str]) -> None:
        state.skipped_steps.append(step)
        recent = [s for s in state.skipped_steps if s > step - self._window]
        # All ranks of a contrastive loss may see a NaN that one of them made.
        reports = gather_objects((rank(), loss, keys[:4]))
        worst = [r for r in reports if not math.isfinite(r[1])] or reports
        where = "; ".join(f"rank {r}: loss {value:g}, samples {', '.join(names)}, ..." for r, value, names in worst[:4])
        log.warning(
            "step %d skipped, loss or gradient is not finite (%d of the last %d steps; %d are borne): %s",
            step,
            len(recent),
            self._window,
            self._budget,
            where,
        )
        if len(recent) > self._budget:
            raise NumericalError(
                f"{len(recent)} of the last {self._window} steps had a loss or gradient that is not finite",
                where=f"step {step}, {where}",
                expected=f"at most {self._budget} in {self._window}",
                fix="lower optim.*.lr, lengthen schedule.warmup_samples or set optim.grad_clip_norm, then start from "
                "the last checkpoint",
            )


class StuckAtStart(Hook):
    """Says so when a contrastive loss has not left ln(batch), its value for features that tell nothing apart.

    Looks once, `window` steps after the warm-up, and again at the end of the run; the finding is logged and kept in
    `state.notes["stuck_at_start"]` for the result, until the loss has moved after all.

    Args:
        global_batch_size: candidates of each softmax.
        warmup_steps: length of the warm-up.
        loss_key: the contrastive loss among the objective's losses.
        window: steps averaged.
        margin: a loss above (1 - margin) ln(batch) counts as stuck.
    """

    def __init__(
        self,
        *,
        global_batch_size: int,
        warmup_steps: int,
        loss_key: str = "loss",
        window: int = 20,
        margin: float = 0.02,
    ) -> None:
        self._start_loss = math.log(global_batch_size)
        self._limit = (1 - margin) * self._start_loss
        self._look_at = warmup_steps + window
        self._loss_key, self._window = loss_key, window
        self._recent: list[Tensor] = []

    def after_step(self, state: TrainState, losses: LossDict, trainer: Trainer) -> None:
        self._recent = [*self._recent[1 - self._window :], losses[self._loss_key]]
        if state.step == self._look_at:
            self._look(state, f"after the warm-up (step {state.step})")

    def at_end(self, trainer: Trainer) -> None:
        if trainer.num_steps >= self._look_at and self._recent:
            self._look(trainer.state, f"at the end of the run (step {trainer.state.step})")

    def _look(self, state: TrainState, when: str) -> None:
        mean = float(all_reduce_mean(torch.stack(self._recent).float().mean()))
        if mean <= self._limit:
            state.notes.pop("stuck_at_start", None)
            return
        note = (
            f"the contrastive loss is still {mean:.3f} {when}, no better than ln(batch) = {self._start_loss:.3f}: "
            "the features tell nothing apart. Lower optim.*.lr, lengthen the warm-up or check the captions"
        )
        state.notes["stuck_at_start"] = note
        log.warning("%s", note)
