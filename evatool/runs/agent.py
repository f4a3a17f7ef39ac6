"""The process between `evatool` and its ranks: torchrun's agent, which starts them on this machine and watches them.

    python -m evatool.runs.agent COUNT DESCRIPTOR ARGUMENTS...

runs `evatool ARGUMENTS...` in COUNT processes. Those that a signal killed are told through the open file DESCRIPTOR,
one line of JSON each. The agent ends with its parent, and its ranks with it. No torch before the first lines have run.
"""

from __future__ import annotations

import json
import logging
import os
import signal
import sys
from collections.abc import Sequence

from evatool.core.own_process import PARENT_VARIABLE, end_with_parent, launcher_pid
from evatool.core.stop_signals import end_at_once

log = logging.getLogger(__name__)


def main() -> int:
    """Body of the agent process; returns its exit code."""
    end_at_once()  # until torchrun starts the ranks, and answers itself
    end_with_parent(launcher_pid())
    os.environ[PARENT_VARIABLE] = str(os.getpid())
    return run_agent(int(sys.argv[1]), int(sys.argv[2]), sys.argv[3:])


def run_agent(count: int, report: int, argv: Sequence[str]) -> int:
    """torchrun on `evatool argv`, with its own account of failures kept to what matters."""
    from torch.distributed import run
    from torch.distributed.elastic.multiprocessing import SignalException
    from torch.distributed.elastic.multiprocessing.errors import ChildFailedError

    logging.disable(logging.ERROR)  # the ranks have said it already
    try:
        run.main(["--standalone", f"--nproc-per-node={count}", "-m", "evatool", *argv])
    except ChildFailedError as error:
        for rank, failure in sorted(error.failures.items(), key=lambda item: item[1].timestamp):
            if failure.exitcode < 0 and -failure.exitcode not in (signal.SIGTERM, signal.SIGINT):  # the agent's own
                name = signal.Signals(-failure.exitcode).name
                os.write(report, (json.dumps({"rank": rank, "signal": name}) + "\n").encode())
        return 1
    except SignalException as error:
        return 128 + int(error.sigval)
    return 0


if __name__ == "__main__":
    sys.exit(main())
