"""Runs `open_clip_train` on a model that open_clip does not list; needs open_clip's own environment and no evatool.

`python open_clip_side.py SPEC ARGUMENTS...`: SPEC is JSON with `name`, `config` (open_clip's model configuration) and
`eva` (arguments of timm's `Eva`, or null where timm knows the tower); ARGUMENTS are the trainer's own.
"""

from __future__ import annotations

import json
import sys
import tempfile
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


def main() -> None:
    """Register the model, then hand over to open_clip's trainer."""
    spec = json.loads(Path(sys.argv[1]).read_text())
    import open_clip
    from open_clip_train.main import main as train

    if spec["eva"] is not None:
        register_tower(spec["config"]["vision_cfg"]["timm_model_name"], spec["eva"])
    with tempfile.TemporaryDirectory() as folder:
        path = Path(folder) / f"{spec['name']}.json"
        path.write_text(json.dumps(spec["config"]))
        open_clip.add_model_config(path)
        train(sys.argv[2:])


if __name__ == "__main__":
    main()
