"""The contract of a hook: something that is done around the steps, such as logging, saving or watching."""

from __future__ import annotations

from evatool.core.step import StepContext
from evatool.distributed.engines.sharded_state import ShardedState
from evatool.train.control import StepResult, TrainerControl
from evatool.train.state import SavedRun


class Hook:
    """Something done around the loop, on every rank; a hook overrides the methods that it needs.

    Hooks are called in the order in which the stage lists them: one that adds metrics stands before those that write
    them. A hook reads what it is handed and asks for the rest through the methods of `TrainerControl`. An exception
    ends the run, and `close` is still called on every hook.
    """

    def at_start(self, trainer: TrainerControl) -> None:
        """Called before the first step of this attempt; a run that is resumed stands at `trainer.state.step`."""

    def before_update(self, step: StepContext, trainer: TrainerControl) -> None:
        """Called in every step once its gradients are there, before weights or moments have changed."""

    def after_step(self, result: StepResult, trainer: TrainerControl) -> None:
        """Called after every step, whether it changed the weights or was skipped."""

    def on_save(self, trainer: TrainerControl) -> None:
        """Called when a checkpoint is due by the clock or was requested."""

    def on_stop(self, trainer: TrainerControl) -> None:
        """Called when a signal, a STOP file or a hook ends the run early, resumable."""

    def on_rollback(self, trainer: TrainerControl) -> None:
        """Called when the run has gone back to a checkpoint, whose step is `trainer.state.step`."""

    def sharded_state(self, trainer: TrainerControl) -> ShardedState | None:
        """Tensors of this hook that a checkpoint keeps, under names that no other part of the run has."""
        return None

    def load_state(self, saved: SavedRun, trainer: TrainerControl) -> None:
        """Take back what `sharded_state` gave, from a checkpoint that the run goes back to; before `on_rollback`."""

    def at_end(self, trainer: TrainerControl) -> None:
        """Called after the last step."""

    def close(self) -> None:
        """Called at the very end, also after an error in this or another hook; frees what the hook holds."""
