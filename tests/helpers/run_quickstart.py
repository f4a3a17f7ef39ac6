"""Run the `sh` blocks of docs/quickstart.md in an empty folder, at debug size: `demo/` recipes become `debug/` ones.

    python tests/helpers/run_quickstart.py [--keep DIR]

Exits with the first failing command's code, and 1 if the chain did not leave what the page promises.
"""

from __future__ import annotations

import argparse
import json
import os
import re
import subprocess
import sys
import tempfile
from pathlib import Path

PAGE = Path(__file__).resolve().parents[2] / "docs" / "quickstart.md"
PROMISED = [
    "data-prepare/train/manifest.json",
    "data-prepare/contact_sheet.png",
    "train-clip/metrics.jsonl",
    "train-clip/loss_curve.png",
    "pretrain-mim/mim_pictures.png",
    "train-clip-mim/status.json",
    "distill/resolved.toml",
    "export/open_clip_config.json",
    "eval/results.json",
    "eval/report.html",
]


def script() -> str:
    """The page's commands as one shell script that stops at the first failure."""
    blocks = re.findall(r"^```sh\n(.*?)^```", PAGE.read_text(encoding="utf-8"), re.MULTILINE | re.DOTALL)
    return "set -euxo pipefail\n" + "".join(blocks).replace(" demo/", " debug/")


def run(folder: Path) -> int:
    # The commands on the page are those of the environment that runs this file.
    path = os.pathsep.join([str(Path(sys.executable).parent), os.environ["PATH"]])
    done = subprocess.run(["bash", "-c", script()], cwd=folder, env={**os.environ, "PATH": path})
    if done.returncode:
        return done.returncode
    missing = [name for name in PROMISED if not (folder / "runs" / "debug" / name).is_file()]
    if missing:
        print(f"docs/quickstart.md promises files that its commands did not make: {missing}", file=sys.stderr)
        return 1
    summary = json.loads((folder / "results-summary.json").read_text())
    print(f"quickstart: ok, {len(PROMISED)} files made, eval says {summary['metrics']}")
    return 0


def main() -> int:
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("--keep", type=Path, help="run here and keep the result")
    keep = parser.parse_args().keep
    if keep:
        keep.mkdir(parents=True, exist_ok=True)
        return run(keep.resolve())
    with tempfile.TemporaryDirectory(prefix="evatool-quickstart-") as folder:
        return run(Path(folder))


if __name__ == "__main__":
    sys.exit(main())
