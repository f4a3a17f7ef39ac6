"""Our presets in timm's and open_clip's registries, so that both build them by name."""

from __future__ import annotations

import json
import tempfile
from functools import cache
from pathlib import Path

import open_clip

from evatool.model.clip import open_clip_model_config
from evatool.model.presets import PRESETS
from evatool.model.vision import register_rms_norm_base, timm_name


@cache
def register() -> tuple[str, ...]:
    """Add every CLIP preset to open_clip, and the towers that timm lacks to timm; returns the names. Idempotent.

    Afterwards `open_clip.create_model("EVA-CLIP-18B")` and `timm.create_model("eva_18b_patch14_clip_224")` work.
    """
    clips = [config for config in PRESETS.values() if config.task == "clip"]
    with tempfile.TemporaryDirectory(prefix="evatool-presets-") as folder:
        for config in clips:
            Path(folder, f"{config.name}.json").write_text(json.dumps(open_clip_model_config(config)))
        # open_clip's only public way in is a folder that it scans; it keeps what it has read.
        open_clip.add_model_config(folder)
    for config in PRESETS.values():
        if config.task == "mim" and config.decoder is None:
            timm_name(config)
    register_rms_norm_base()
    return tuple(config.name for config in clips)
