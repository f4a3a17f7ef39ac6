"""One sample's stored fields to what training uses: pixels, captions to choose from, arrays beside the image.

Why arrays are parsed here: training data is not trusted, and `numpy.load` takes any type, shape and length that a file
names; (256, 768) float16 takes 152 us here, 236 us there. `safetensors.numpy.load` copies every tensor of a member to
give one: 83 us here, 134 us there where three of that size stand together (best of 5 x 300 by `timeit`).
"""

from __future__ import annotations

import ast
import math
import struct
from collections.abc import Callable, Mapping, Sequence
from dataclasses import dataclass, field
from typing import Any

import numpy as np
import torch
from torch import Tensor

from evatool.core.bounded_json import parse_json
from evatool.data.image.header import IMAGE_MEMBERS
from evatool.data.sources.base import MissingField, UnreadableSample
from evatool.recipe.schema import CaptionChoice, ExtraMember

MAX_TEXT_BYTES = 2**20
"""A caption or json member larger than this makes a bad sample."""

MAX_CAPTION_CHARS = 4096
"""Characters of a caption that are kept; the rest is cut off before tokenising, and 77 tokens hold a tenth of them."""

_CONCEPT_MEMBER = "json"  # its key `concept` says which captions count as equal
_SAFETENSORS_TYPES = {"F32": "<f4", "F16": "<f2"}
_NPY_TYPES = frozenset({"<f4", "<f2"})
_MAX_HEADER_BYTES = 2**16

# H, W: sides of an image as stored


@dataclass(frozen=True)
class DecodedSample:
    """A sample as training uses it, before augmentation.

    Attributes:
        image: uint8 (3, H, W), channels last in memory.
        captions: (probability, captions) of each place of the recipe where this sample has any.
        concept: captions of samples with equal concepts count as equal; None where the sample names none.
        extras: float16 or float32 arrays by name, of the recipe's shapes.
        conversion: why the image was converted, for instance "cmyk"; None for an ordinary one.
    """

    image: Tensor
    captions: tuple[tuple[float, tuple[str, ...]], ...] = ()
    concept: str | None = None
    extras: Mapping[str, Tensor] = field(default_factory=dict)
    conversion: str | None = None


class SampleDecoder:
    """Decodes the fields of a sample that the recipe asks for, and says which those are.

    Args:
        caption: the recipe's `data.caption`; None leaves captions out.
        image: the recipe's `data.image`; None takes the usual names.
        extras: the recipe's `data.extras`.
        decode: takes an encoded image and the limit on its pixels; returns uint8 (H, W, 3) and, where the image was not
            an ordinary one, why it had to be converted. Raises BadImage.
    Attributes:
        fields: names of the fields that are read; a source need give no others.
        needed: those of them without which a sample may be bad; the others only tell more where they can be read.
    """

    def __init__(
        self,
        caption: str | Sequence[CaptionChoice] | None,
        extras: Sequence[ExtraMember],
        decode: Callable[[bytes, int], tuple[np.ndarray, str | None]],
        image: str | Sequence[str] | None = None,
    ) -> None:
        match caption:
            case None:
                choices: list[CaptionChoice] = []
            case "txt":
                choices = [CaptionChoice()]
            case "json-captions":
                choices = [CaptionChoice(member="json", field="captions")]
            case _:
                choices = [place for place in caption if isinstance(place, CaptionChoice)]
        self.choices = [(_field_name(place.member), place) for place in choices]
        self.extras, self.decode = list(extras), decode
        given = [image] if isinstance(image, str) else image
        self.images = IMAGE_MEMBERS if given is None else tuple(map(_field_name, given))
        self.needed = frozenset(
            {*self.images, *(name for name, _ in self.choices), *(_field_name(extra.member) for extra in self.extras)}
        )
        self.fields = self.needed | ({_CONCEPT_MEMBER} if choices else frozenset())

    def __call__(self, members: Mapping[str, bytes], max_pixels: int) -> DecodedSample:
        """The decoded sample. Raises: BadImage, UnreadableSample, both naming the cause."""
        encoded = next((members[name] for name in self.images if name in members), None)
        if encoded is None:
            raise MissingField("no-picture", f"no member {' or '.join(self.images)}")
        captions, concept = self._captions(members) if self.choices else ((), None)
        extras = {extra.name: _read_extra(members, extra) for extra in self.extras}
        decoded, conversion = self.decode(encoded, max_pixels)
        # Channels last in memory, as decoded: the resize is fastest on that.
        pixels = torch.from_numpy(decoded).permute(2, 0, 1)
        return DecodedSample(pixels, captions, concept, extras, conversion)

    def _captions(self, members: Mapping[str, bytes]) -> tuple[tuple[tuple[float, tuple[str, ...]], ...], str | None]:
        texts: dict[str, Any] = {}
        for name in dict.fromkeys(name for name, _ in self.choices):
            if name in members:
                text = _text(members[name], name)
                texts[name] = _object(text, name) if name.rpartition(".")[2] == "json" else text
        found = []
        for name, place in self.choices:
            if name in texts:
                value = texts[name]
                captions = _usable([value] if place.field is None else value.get(place.field))
                if captions:
                    found.append((place.probability, captions))
        if not found:
            wanted = [p.member if p.field is None else f"{p.field!r} in the {p.member} member" for _, p in self.choices]
            raise MissingField("no-caption", f"data.caption needs {' or '.join(wanted)}")
        return tuple(found), _concept(members)


def _field_name(member: str) -> str:
    """The name of a field as sources give it: webdataset's extensions are in lower case, without the first dot."""
    return member.removeprefix(".").lower()


def _concept(members: Mapping[str, bytes]) -> str | None:
    """The concept that the json member names. Most sets know none, so a member of any other kind is none, too."""
    if _CONCEPT_MEMBER not in members:
        return None
    try:
        concept = _object(_text(members[_CONCEPT_MEMBER], _CONCEPT_MEMBER), _CONCEPT_MEMBER).get("concept")
        return None if concept is None else str(concept)
    except (UnreadableSample, RecursionError):
        return None


def choose_caption(sample: DecodedSample, draw: float) -> str:
    """One of the sample's captions: the place by its probability, then evenly within it; `draw` in [0, 1)."""
    total = sum(probability for probability, _ in sample.captions)
    for number, (probability, captions) in enumerate(sample.captions):
        share = probability / total
        if draw < share or number == len(sample.captions) - 1:
            # What is left of the draw is again even on [0, 1).
            return captions[min(len(captions) - 1, int(draw / share * len(captions)))]
        draw -= share
    raise AssertionError("a sample without captions was asked for one")


def _text(data: bytes, name: str) -> str:
    if len(data) > MAX_TEXT_BYTES:
        raise UnreadableSample("huge-text", f"{name} of {len(data)} bytes, limit {MAX_TEXT_BYTES}")
    try:
        return data.decode("utf-8")
    except UnicodeDecodeError as err:
        raise UnreadableSample("bad-utf8", str(err)) from err


def _object(text: str, name: str) -> dict[str, Any]:
    try:
        value = parse_json(text)
    except ValueError as err:
        raise UnreadableSample("bad-json", f"{name}: {err}") from err
    if not isinstance(value, dict):
        raise UnreadableSample("bad-json", f"{name} holds {type(value).__name__}, not an object")
    return value


def _usable(value: Any) -> tuple[str, ...]:
    captions = [value] if isinstance(value, str) else value if isinstance(value, list) else []
    kept = (c[:MAX_CAPTION_CHARS] for c in captions if isinstance(c, str) and c.strip())
    # A lone surrogate (JSON can spell one) is no character: no tokeniser takes it.
    return tuple(c.encode("utf-8", "replace").decode("utf-8") for c in kept)


# -------------------------------------------------------------------------------------------------------- arrays


def _read_extra(members: Mapping[str, bytes], extra: ExtraMember) -> Tensor:
    if _field_name(extra.member) not in members:
        raise MissingField("no-array", f"there is no {extra.member} member")
    data = members[_field_name(extra.member)]
    try:
        array = parse_npy(data) if extra.tensor is None else parse_safetensors(data, extra.tensor)
    except (ValueError, KeyError, SyntaxError, RecursionError, MemoryError, TypeError, struct.error) as err:
        raise UnreadableSample("bad-array", f"{extra.member}: {err}") from err
    if list(array.shape) != list(extra.shape):
        raise UnreadableSample("array-shape", f"{extra.member} has shape {list(array.shape)}, not {list(extra.shape)}")
    if not np.isfinite(array).all():
        raise UnreadableSample("bad-array", f"{extra.member} holds values that are not finite")
    return torch.from_numpy(array.copy())


def parse_npy(data: bytes) -> np.ndarray:
    """A float16 or float32 array of a `.npy` file, parsed here: numpy's reader can run what an object array holds.

    Raises: ValueError, KeyError, TypeError, SyntaxError, struct.error where it is something else.
    """
    if data[:6] != b"\x93NUMPY" or data[6:7] not in (b"\x01", b"\x02", b"\x03"):
        raise ValueError("not a .npy file")
    width, code = (2, "<H") if data[6] == 1 else (4, "<I")
    (length,) = struct.unpack_from(code, data, 8)
    start = 8 + width + length
    if length > _MAX_HEADER_BYTES or start > len(data):
        raise ValueError(f"a header of {length} bytes")
    header = ast.literal_eval(data[8 + width : start].decode("latin-1").strip())
    descr, fortran, shape = header["descr"], header["fortran_order"], header["shape"]
    if descr not in _NPY_TYPES or fortran is not False:
        raise ValueError(f"type {descr!r}, fortran_order {fortran!r}: float32 or float16 in C order is read")
    return _array(data[start:], descr, shape)


def parse_safetensors(data: bytes, name: str) -> np.ndarray:
    """One float16 or float32 tensor of a safetensors file.

    Raises: ValueError, KeyError, TypeError, struct.error where it is not there.
    """
    (length,) = struct.unpack_from("<Q", data, 0)
    if length > min(len(data) - 8, 2**20):
        raise ValueError(f"a header of {length} bytes")
    header = parse_json(data[8 : 8 + length])
    entry = header.get(name) if isinstance(header, dict) else None
    if not isinstance(entry, dict):
        raise ValueError(f"there is no tensor {name!r}")
    if entry.get("dtype") not in _SAFETENSORS_TYPES:
        raise ValueError(f"tensor {name!r} is {entry.get('dtype')}: F32 or F16 is read")
    begin, end = entry["data_offsets"]
    if not 0 <= begin <= end <= len(data) - 8 - length:
        raise ValueError(f"tensor {name!r} lies outside the file")
    return _array(data[8 + length + begin : 8 + length + end], _SAFETENSORS_TYPES[entry["dtype"]], entry["shape"])


def _array(data: bytes, descr: str, shape: Any) -> np.ndarray:
    sizes = tuple(shape)
    if not all(isinstance(size, int) and size >= 0 for size in sizes) or len(sizes) > 8:
        raise ValueError(f"shape {shape!r}")
    expected = math.prod(sizes) * np.dtype(descr).itemsize
    if len(data) != expected:
        raise ValueError(f"{len(data)} bytes of data for shape {sizes}")
    return np.frombuffer(data, dtype=descr).reshape(sizes)
