"""`python -m evatool`, also under `torchrun -m evatool`."""

from __future__ import annotations

from evatool.cli.app import main

if __name__ == "__main__":
    main()
