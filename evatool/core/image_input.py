"""What a model wants its images to be: statistics of the pixels, and how a picture is brought to the input size.
No torch."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, fields
from typing import Any, Literal, get_args

# OpenAI CLIP's statistics; every EVA recipe, MIM included, uses them (docs/reference/eva.md#mim-images).
CLIP_MEAN = (0.48145466, 0.4578275, 0.40821073)
CLIP_STD = (0.26862954, 0.26130258, 0.27577711)

Interpolation = Literal["bicubic", "bilinear"]
Resize = Literal["shortest", "squash", "longest"]
Rgb = tuple[float, float, float]


@dataclass(frozen=True)
class ImageInput:
    """How a model's images are made from pictures; the defaults are those of every EVA model.

    Attributes:
        mean, std: of the channels (red, green, blue), for values from 0 to 1.
        interpolation: the filter of the resize.
        resize: `shortest`: the shorter side to the input's, then the central crop; `squash`: both sides; `longest`: the
            longer side, the rest filled.
        fill: grey level, 0 to 255, of what `longest` fills.
    """

    mean: Rgb = CLIP_MEAN
    std: Rgb = CLIP_STD
    interpolation: Interpolation = "bicubic"
    resize: Resize = "shortest"
    fill: int = 0

    @property
    def is_default(self) -> bool:
        """True for what every EVA model wants."""
        return self == ImageInput()

    @property
    def differences(self) -> dict[str, Any]:
        """The attributes that are not the defaults, ready for JSON; `from_json` reads them back equal."""
        default = ImageInput()
        values = {each.name: getattr(self, each.name) for each in fields(self)}
        return {
            name: list(value) if isinstance(value, tuple) else value
            for name, value in values.items()
            if value != getattr(default, name)
        }

    @classmethod
    def from_json(cls, table: Mapping[str, Any]) -> ImageInput:
        """From names and values as `differences` has them; what is absent is the default.

        Raises: ValueError that says which value is wrong, and what would be right.
        """
        unknown = set(table) - {each.name for each in fields(cls)}
        if unknown:
            raise ValueError(f"unknown: {', '.join(sorted(map(str, unknown)))}")
        given = dict(table)
        for name in ("mean", "std"):
            if name in given:
                given[name] = _three(name, given[name])
        if any(value <= 0 for value in given.get("std", CLIP_STD)):
            raise ValueError(f"std = {list(given['std'])}: a standard deviation is larger than 0")
        for name, allowed in _ALLOWED.items():
            if name in given and given[name] not in allowed:
                raise ValueError(f"{name} = {given[name]!r} is not known; known are {', '.join(allowed)}")
        fill = given.get("fill", 0)
        if isinstance(fill, bool) or not isinstance(fill, int) or not 0 <= fill <= 255:
            raise ValueError(f"fill = {fill!r} is no whole number from 0 to 255")
        return cls(**given)


_ALLOWED = {"interpolation": get_args(Interpolation), "resize": get_args(Resize)}


def _three(name: str, value: Any) -> Rgb:
    """A number for each channel; one number stands for all three, as in open_clip."""
    values = [value] * 3 if isinstance(value, int | float) else value
    is_rgb = isinstance(values, list | tuple) and len(values) == 3
    if not is_rgb or any(isinstance(each, bool) or not isinstance(each, int | float) for each in values):
        raise ValueError(f"{name} = {value!r} is not three numbers")
    if not all(-1e6 < each < 1e6 for each in values):
        raise ValueError(f"{name} = {value!r} is no statistic of values from 0 to 1")
    red, green, blue = (float(each) for each in values)
    return red, green, blue
