"""`python -m tests.fuzz NAME ... --seconds 600`: feed readers broken input; without a name, all of them."""

from __future__ import annotations

import argparse
import json
import sys
import tempfile
from dataclasses import asdict
from pathlib import Path

from tests.fuzz.fuzzers import FUZZERS
from tests.fuzz.harness import fuzz, run_case, run_fuzzer


def main() -> int:
    parser = argparse.ArgumentParser(prog="python -m tests.fuzz", description=__doc__)
    parser.add_argument("names", nargs="*", help=f"of {', '.join(FUZZERS)}; all of them when absent")
    parser.add_argument("--seconds", type=float, default=600, help="for each fuzzer")
    parser.add_argument("--seed", type=int, default=0)
    parser.add_argument("--folder", type=Path, help="where findings are kept; a new one when absent")
    parser.add_argument("--case", type=Path, help="read this one input")
    parser.add_argument("--here", action="store_true", help="in this process: a hang ends it")
    given = parser.parse_args()
    unknown = set(given.names) - set(FUZZERS)
    if unknown:
        parser.error(f"there is no fuzzer {', '.join(sorted(unknown))}")
    folder = given.folder or Path(tempfile.mkdtemp(prefix="evatool-fuzz-"))
    if given.case:
        folder.mkdir(parents=True, exist_ok=True)
        problem = run_case(FUZZERS[given.names[0]], given.case.read_bytes(), folder, None)
        print("refused" if problem is None else problem or "accepted")
        return bool(problem)
    if given.here:
        totals = fuzz(FUZZERS[given.names[0]], given.seconds, given.seed, folder)
        print("TOTALS " + json.dumps(asdict(totals)), flush=True)
        return bool(totals.findings)
    num_findings = 0
    for name in given.names or FUZZERS:
        totals = run_fuzzer(name, given.seconds, given.seed, folder / name)
        num_findings += len(totals.findings)
        print(
            f"{name}: {totals.executions} inputs in {totals.seconds:.0f} s, {totals.accepted} accepted, "
            f"{len(totals.findings)} findings",
            flush=True,
        )
    return bool(num_findings)


if __name__ == "__main__":
    sys.exit(main())
