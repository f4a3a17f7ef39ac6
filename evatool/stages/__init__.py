"""The stages of the pipeline. `run_stage` imports the one that is asked for, so that nothing else is paid for."""

from __future__ import annotations

import logging
import sys
from collections.abc import Iterator
from contextlib import contextmanager
from functools import partial
from importlib import import_module
from pathlib import Path

from evatool.core import logging as logs
from evatool.core import stop_signals
from evatool.core.disk import disk_error
from evatool.core.errors import EvatoolError, ExitCode, Preempted
from evatool.distributed import peers
from evatool.recipe.load import Resolved
from evatool.runs.result import Result
from evatool.runs.run_dir import RunDir, RunOptions, check_run_dir, run_path, stored_result

log = logging.getLogger(__name__)


def run_stage(resolved: Resolved, options: RunOptions, task: str | None = None) -> Result:
    """Run the recipe's stage and keep the run folder's `status.json` true, also when it fails.

    A finished run that is resumed hands back its stored result at once. Every exception is raised again.

    Args:
        task: something else to do with the stage's recipe, done anew whenever it is asked for ("store-features").
    """
    recipe = resolved.recipe
    stored = None if task is not None else stored_result(recipe, options)
    if stored is not None:
        log.info("%s is already done: nothing to do", stored.run_dir)
        return stored
    options.opened = None
    if logs.env_rank() == 0:
        check_run_dir(recipe, options)  # before the seconds that importing torch takes
    stop_signals.record_with(partial(_record_end, options))
    peers.listen(partial(_note_death, options))
    stage = import_module("evatool.stages." + (task or recipe.stage).replace("-", "_"))
    try:
        with stop_signals.raising(), _full_disk_in_words(run_path(recipe, options)):
            result: Result = stage.run(recipe, options)
            if options.opened is not None:
                options.opened.finish(result)
    except KeyboardInterrupt:
        _record_failure(options.opened, ExitCode.INTERRUPTED, "stopped by Ctrl-C")
        raise
    except stop_signals.Terminated as stop:
        _record_failure(options.opened, ExitCode.PREEMPTED, str(stop))
        raise Preempted(str(stop), fix="run again with --resume: saved work is not repeated") from stop
    except EvatoolError as error:
        _record_failure(options.opened, error.exit_code, str(error))
        raise
    except Exception as error:
        _record_failure(options.opened, ExitCode.FAILED, f"{type(error).__name__}: {error}")
        raise
    finally:
        stop_signals.record_with(None)
        peers.listen(None)
    return result


def _record_failure(run_dir: RunDir | None, exit_code: int, message: str) -> None:
    """Status and trace of a failed run; the terminal shows the message only, the run's log has the trace."""
    if run_dir is None:
        return
    with stop_signals.deaf():
        record = log.makeRecord(log.name, logging.ERROR, __file__, 0, "the stage failed", (), sys.exc_info())
        for handler in run_dir.handlers:
            handler.handle(record)
        run_dir.fail(exit_code, message, speaks_for_rank_0=peers.is_gone(0))


def _record_end(options: RunOptions, exit_code: int, message: str) -> None:
    """Status of a run whose main thread waits for ever, told by another."""
    if options.opened is not None:
        options.opened.fail(exit_code, message, speaks_for_rank_0=peers.is_gone(0))


def _note_death(options: RunOptions, death: peers.Death) -> None:
    if options.opened is not None:
        options.opened.note_killed(death.member.rank, str(death), death.signal)


@contextmanager
def _full_disk_in_words(path: Path) -> Iterator[None]:
    """A full or failing disk, wherever a stage meets it, as an error that says where and what to do (exit code 76)."""
    try:
        yield
    except Exception as error:
        in_words = disk_error(error, path, "run the same command with --resume")
        if in_words is None:
            raise
        raise in_words from error
