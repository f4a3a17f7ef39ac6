"""Runs `open_clip_train` on a model that open_clip does not list; needs open_clip's own environment and no evatool.

`python open_clip_side.py SPEC ARGUMENTS...`: SPEC is JSON with `name`, `config` (open_clip's model configuration) and
`eva` (arguments of timm's `Eva`, or null where timm knows the tower), and in `also` the same of further models;
ARGUMENTS are the trainer's own. With STEP_TIMES in the environment, the process's CPU time after each step of the
optimiser goes to that file.
"""

from __future__ import annotations

import atexit
import json
import os
import sys
import tempfile
import time
from pathlib import Path
from typing import Any


def register_tower(name: str, arguments: dict[str, Any]) -> None:
    """Give timm an entry point for a tower of these arguments."""
    from timm.models import build_model_with_cfg, register_model
    from timm.models.eva import Eva

    side = arguments["img_size"]

    def entry(pretrained: bool = False, **kwargs: Any) -> Eva:
        kwargs.setdefault("pretrained_cfg", {"url": "", "input_size": (3, side, side), "num_classes": 0})
        return build_model_with_cfg(Eva, name, pretrained, **(arguments | kwargs))

    entry.__name__ = name
    register_model(entry)


def keep_step_times(path: Path) -> None:
    """CPU seconds of this process after each step of any optimiser, as JSON, once the process ends."""
    from torch.optim.optimizer import register_optimizer_step_post_hook

    times: list[float] = []
    register_optimizer_step_post_hook(lambda *_: times.append(time.process_time()))
    atexit.register(lambda: path.write_text(json.dumps(times)))


def main() -> None:
    """Register the model, then hand over to open_clip's trainer."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    import open_clip
    from open_clip_train.main import main as train

    if "STEP_TIMES" in os.environ:
        keep_step_times(Path(os.environ["STEP_TIMES"]))
    with tempfile.TemporaryDirectory() as folder:
        for model in [spec, *spec.get("also", [])]:
            if model["eva"] is not None:
                register_tower(model["config"]["vision_cfg"]["timm_model_name"], model["eva"])
            path = Path(folder) / f"{model['name']}.json"
            path.write_text(json.dumps(model["config"]))
            open_clip.add_model_config(path)
        train(sys.argv[2:])


if __name__ == "__main__":
    main()
