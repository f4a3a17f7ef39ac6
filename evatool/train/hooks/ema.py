"""A moving average of the weights, kept beside them."""

from __future__ import annotations

from collections.abc import Mapping

import torch
from torch import Tensor

from evatool.distributed.engines.sharded_state import ShardedState, StateShard, read_piece
from evatool.train.control import StepResult, TrainerControl
from evatool.train.hooks.base import Hook
from evatool.train.state import SavedRun

PREFIX, MODEL = "ema.", "model."


class WeightAverage(Hook):
    """average = d average + (1 - d) weights after every step, d = min(decay, (1 + step) / (10 + step)).

    Each rank averages the numbers it holds, so it works on every engine and costs a rank one copy of them. Checkpoints
    keep that of the model's weights; a run that is resumed or rolled back takes it from there.

    Args:
        decay: of the average.
        saved: the checkpoint that the run goes on from.
    Source: the rising decay of tensorflow/tensorflow: tensorflow/python/training/moving_averages.py with `num_updates`.
    """

    def __init__(self, decay: float, saved: SavedRun | None = None) -> None:
        self._decay, self._saved = decay, saved
        self._average: dict[tuple[str, int], Tensor] = {}

    def at_start(self, trainer: TrainerControl) -> None:
        if self._saved is not None:
            self.load_state(self._saved, trainer)
        else:
            self._average = {
                key: values.clone() for key, values in _floats(trainer.engine.sharded_model_state()).items()
            }

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        weight = 1 - min(self._decay, (1 + result.step) / (10 + result.step))
        live = _floats(trainer.engine.sharded_model_state())
        if live:  # a rank that is no writer of whole weights averages none
            torch._foreach_lerp_([self._average[key] for key in live], list(live.values()), weight)

    def sharded_state(self, trainer: TrainerControl) -> ShardedState:
        whole = trainer.engine.sharded_model_state()
        names = [name for name, dtype in whole.dtypes.items() if _is_averaged(name, dtype)]
        average = ShardedState(
            {name: whole.shapes[name] for name in names}, {name: whole.dtypes[name] for name in names}
        )
        average.pieces = [StateShard(name, start, values) for (name, start), values in self._average.items()]
        return average.renamed({name: PREFIX + name for name in names})

    def load_state(self, saved: SavedRun, trainer: TrainerControl) -> None:
        state, average = trainer.engine.sharded_model_state(), saved.averaged_state
        self._average = {
            (name, start): read_piece(average, PREFIX + name, start, values.numel(), state.shapes[name])
            .to(values.device, values.dtype)
            .clone()
            for (name, start), values in _floats(state).items()
        }


def _floats(state: ShardedState) -> Mapping[tuple[str, int], Tensor]:
    """The model's floating-point numbers that this rank holds, by name and start."""
    return {(p.name, p.start): p.values for p in state.pieces if _is_averaged(p.name, p.values.dtype)}


def _is_averaged(name: str, dtype: torch.dtype) -> bool:
    return name.startswith(MODEL) and dtype.is_floating_point
