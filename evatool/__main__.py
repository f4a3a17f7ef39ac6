"""`python -m evatool`, also under `torchrun -m evatool`."""

from __future__ import annotations

from evatool.core.stop_signals import end_at_once

if __name__ == "__main__":
    end_at_once()  # the import of the command line takes its time, and nothing is made yet
    from evatool.cli.app import main

    main()
