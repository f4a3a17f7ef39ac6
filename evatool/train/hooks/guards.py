"""Hooks that watch a run: steps that were kept from the weights, and a loss that never moves."""

from __future__ import annotations

import json
import logging
import math
from pathlib import Path
from typing import Any, Literal

import torch
from torch import Tensor

from evatool.core.disk import LineFile
from evatool.core.errors import NumericalError
from evatool.distributed.collectives import all_reduce_mean, gather_objects, rank
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook
from evatool.train.state import TrainState

log = logging.getLogger(__name__)


class NonFiniteGuard(Hook):
    """Reports the steps that were skipped, and rolls the run back or ends it when they become too many.

    A step is skipped where loss or gradient is not finite (an overflow in fp16 too) or the loss was a spike; the engine
    has already kept it from the weights, on every rank alike. Here they are counted: at once on a CPU, on logging steps
    on a GPU, which must not wait for every step.

    Args:
        policy: "skip" bears `budget` skipped steps in any `window`, then goes back once to the last checkpoint and on
            behind the samples that it has met since, then ends the run; "rollback" goes back at the first skipped step;
            "stop" ends the run there.
        journal: file that gets a line of JSON for each skipped step and rollback, on rank 0.
    Raises: NumericalError (exit code 80), on every rank, naming step, ranks and sample keys.
    """

    def __init__(
        self,
        budget: int = 8,
        window: int = 100,
        policy: Literal["skip", "rollback", "stop"] = "skip",
        journal: Path | None = None,
    ) -> None:
        self._budget = budget if policy == "skip" else 0
        self._window, self._policy = window, policy
        self._journal = None if journal is None else LineFile(journal)
        self._unread: list[tuple[int, Tensor, Tensor, Tensor | None, list[str]]] = []

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._unread.append((result.step, result.grad_norm, result.losses["loss"], result.is_spike, result.batch.keys))
        if trainer.engine.device.type == "cpu" or result.is_logged:
            self._read(trainer)

    def on_stop(self, trainer: TrainerControl) -> None:
        self._read(trainer)

    def on_rollback(self, trainer: TrainerControl) -> None:
        self._unread.clear()
        self._note({"event": "rollback", **trainer.state.rollbacks[-1]})

    def _read(self, trainer: TrainerControl) -> None:
        unread, self._unread = self._unread, []
        if not unread:
            return
        finite = torch.isfinite(torch.stack([norm for _, norm, _, _, _ in unread])).tolist()
        for (step, _, loss, is_spike, keys), is_finite in zip(unread, finite, strict=True):
            if not is_finite:  # the same on every rank, so all of them gather
                self._skipped(trainer, step, float(loss), is_spike is not None and bool(is_spike), keys)

    def _skipped(self, trainer: TrainerControl, step: int, loss: float, is_spike: bool, keys: list[str]) -> None:
        state = trainer.state
        state.add_skipped_step(step)
        recent = [s for s in state.skipped_steps if s > step - self._window]
        # All ranks of a contrastive loss may see a NaN that one of them made.
        reports = gather_objects((rank(), loss, keys[:4]))
        worst = [r for r in reports if not math.isfinite(r[1])] or reports
        where = "; ".join(f"rank {r}: loss {value:g}, samples {', '.join(names)}, ..." for r, value, names in worst[:4])
        cause = "the loss is a spike" if is_spike else "loss or gradient is not finite"
        log.warning(
            "step %d skipped, %s (%d of the last %d steps; %d are borne): %s",
            step,
            cause,
            len(recent),
            self._window,
            self._budget,
            where,
        )
        named = [{"rank": r, "loss": value if math.isfinite(value) else None, "samples": k} for r, value, k in worst]
        self._note({"event": "skipped", "step": step, "cause": "spike" if is_spike else "not finite", "ranks": named})
        if len(recent) > self._budget and not trainer.is_rolling_back:
            what = (
                f"{len(recent)} of the last {self._window} steps had a loss or gradient that is not finite or a spike"
            )
            self._too_many(trainer, what, f"step {step}, {where}")

    def _too_many(self, trainer: TrainerControl, what: str, where: str) -> None:
        if self._policy != "stop" and not trainer.state.rollbacks and trainer.can_roll_back:
            trainer.request_rollback(what, where)
            return
        again = " again, after the one rollback" if trainer.state.rollbacks else ""
        raise NumericalError(
            what + again,
            where=where,
            expected=f"at most {self._budget} in {self._window}",
            fix="lower optim.*.lr, lengthen schedule.warmup_samples or set optim.grad_clip_norm, then start from "
            "the last checkpoint",
        )

    def _note(self, event: dict[str, Any]) -> None:
        if self._journal is not None and rank() == 0:
            self._journal.append(json.dumps(event))

    def close(self) -> None:
        if self._journal is not None:
            self._journal.close()


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

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        self._recent = [*self._recent[1 - self._window :], result.losses[self._loss_key]]
        if result.step == self._look_at:
            self._look(trainer.state, f"after the warm-up (step {result.step})")

    def at_end(self, trainer: TrainerControl) -> None:
        if trainer.config.num_steps >= self._look_at and self._recent:
            self._look(trainer.state, f"at the end of the run (step {trainer.state.step})")

    def _look(self, state: TrainState, when: str) -> None:
        mean = float(all_reduce_mean(torch.stack(self._recent).float().mean()))
        if mean <= self._limit:
            state.drop_note("stuck_at_start")
            return
        note = (
            f"the contrastive loss is still {mean:.3f} {when}, no better than ln(batch) = {self._start_loss:.3f}: "
            "the features tell nothing apart. Lower optim.*.lr, lengthen the warm-up or check the captions"
        )
        state.add_note("stuck_at_start", note)
        log.warning("%s", note)
