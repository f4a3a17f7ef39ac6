"""evatool: the EVA training pipeline, from image-text data to a released model.

`import evatool` stays free of torch; what needs it is imported on first use:

    import evatool
    clip = evatool.load_clip("runs/demo/distill")
    features = clip.encode_image(clip.preprocess(picture)[None])
"""

from __future__ import annotations

from typing import TYPE_CHECKING, Any

if TYPE_CHECKING:
    from evatool.inference.loaded_clip import LoadedClip, load_clip, register

__version__ = "0.1.0"
__all__ = ["LoadedClip", "__version__", "load_clip", "register"]


def __getattr__(name: str) -> Any:
    if name in ("LoadedClip", "load_clip", "register"):
        from evatool.inference import loaded_clip as api

        return getattr(api, name)
    raise AttributeError(f"module 'evatool' has no attribute {name!r}")
