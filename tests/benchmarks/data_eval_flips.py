"""Zero-shot predictions that change when evaluation decodes with `decode = "fast"` instead of `"exact"`.

`python tests/benchmarks/data_eval_flips.py MODEL DATA [--json FILE]` with a trained model (a run or export folder) and
a folder of classification sets, such as those of `evatool demo` (docs/quickstart.md). Each picture is taken as it is
stored, and once more as a JPEG (4:2:0, quality 75-90) enlarged to a shorter side of 160 to 480 pixels, as photographs
on the web have it. A prediction is the class of the largest logit.

Gate: at most 0.1 % of all predictions differ.
"""

from __future__ import annotations

import argparse
import io
import random
from collections.abc import Callable
from pathlib import Path
from typing import Any

import numpy as np
import torch
from PIL import Image
from side_by_side import finish, machine, versions

from evatool.data.eval.eval_set import EvalSet, open_eval_set
from evatool.data.image.eval_transforms import EvalTransform
from evatool.eval.encoder import SetEncoder
from evatool.eval.tasks.zero_shot import ZeroShotClassification
from evatool.inference.loaded_clip import LoadedClip, load_clip

MOST_FLIPS = 0.001


def as_stored(data: bytes) -> bytes:
    return data


def as_photograph(data: bytes) -> bytes:
    """The same picture as a large JPEG; its size and quality come from its bytes."""
    rng = random.Random(data)
    with Image.open(io.BytesIO(data)) as image:
        scale = rng.randrange(160, 481) / min(image.size)
        sides = [round(scale * side) for side in image.size]
        large = image.convert("RGB").resize((sides[0], sides[1]), Image.Resampling.BICUBIC)
    out = io.BytesIO()
    large.save(out, "JPEG", quality=rng.randrange(75, 91), subsampling="4:2:0")
    return out.getvalue()


FORMS: dict[str, Callable[[bytes], bytes]] = {"as stored": as_stored, "as large JPEGs": as_photograph}


class Reformed:
    """An evaluation transform of pictures that were changed first."""

    def __init__(self, form: Callable[[bytes], bytes], transform: EvalTransform) -> None:
        self.form, self.transform, self.size = form, transform, transform.size

    def __call__(self, data: bytes) -> torch.Tensor:
        return self.transform(self.form(data))


def opened(folder: Path, transform: Any) -> EvalSet:
    return open_eval_set(folder, transform=transform, batch_size=128)


def predictions(model: LoadedClip, folder: Path, form: str, decode: Any) -> np.ndarray:
    """Predicted class of each picture of a set."""
    transform = Reformed(FORMS[form], EvalTransform(model.image_size, decode=decode))
    found: np.ndarray = (
        ZeroShotClassification()
        .run(SetEncoder(model, model.tokenizer), opened(folder, transform))
        .predictions.top[:, 0]
    )
    return found


def main() -> None:
    """Print the predictions that differ, a line a set."""
    parser = argparse.ArgumentParser(description=__doc__)
    parser.add_argument("model", type=Path)
    parser.add_argument("data", type=Path)
    parser.add_argument("--json", type=Path)
    options = parser.parse_args()
    model = load_clip(options.model)
    folders = [path.parent for path in sorted(options.data.glob("*/classnames.txt"))]
    folders += [path.parent.parent for path in sorted(options.data.glob("*/test/classnames.txt"))]
    report: dict[str, Any] = {"machine": machine(), "versions": versions(), "sets": {}}
    flips = total = 0
    for form in FORMS:
        for folder in folders:
            if opened(folder, EvalTransform(model.image_size)).kind != "classification":
                continue
            exact, fast = (predictions(model, folder, form, decode) for decode in ("exact", "fast"))
            differing = int((exact != fast).sum())
            flips, total = flips + differing, total + len(exact)
            report["sets"][f"{folder.name}, {form}"] = [differing, len(exact)]
            print(f"{folder.name:16s} {form:15s} {differing} of {len(exact)} predictions differ", flush=True)
    print(f"all: {flips} of {total} = {flips / max(1, total):.3%}")
    failures = [] if total and flips <= MOST_FLIPS * total else [f"{flips} of {total} predictions differ"]
    finish(report, failures, options.json)


if __name__ == "__main__":
    main()
