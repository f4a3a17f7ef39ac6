"""Scenes with masks, composed from pictures on white: which pixels show which class is then known exactly."""

from __future__ import annotations

import hashlib
from dataclasses import dataclass, field

import numpy as np

from evatool.core.errors import DataError
from evatool.data.eval.samples import Samples
from evatool.data.image.decode import decode_image
from evatool.data.image.header import encode_png

_WHITE = 248  # grey levels; what is lighter in all channels and connected to the border is background


@dataclass
class SceneSamples:
    """Scenes of `side` x `side` pictures of a classification set, every picture in at most one.

    ImageSheets share a scene by a seeded permutation; where two of one class would meet, both count as that class. Each
    picture fills a square cell of its scene.
    """

    source: Samples
    side: int
    seed: int
    cell: int = 64
    keys: list[str] = field(init=False)

    def __post_init__(self) -> None:
        each = self.side * self.side
        if len(self.source) < each:
            raise DataError(
                f"{len(self.source)} pictures do not fill a scene of {self.side} x {self.side}",
                expected=f"at least {each} pictures",
                fix="prepare the set with more concepts",
            )
        order = np.random.default_rng(self.seed).permutation(len(self.source))
        self._members = order[: len(order) // each * each].reshape(-1, each)
        self.keys = [f"scene-{i:05d}" for i in range(len(self._members))]

    def __len__(self) -> int:
        return len(self._members)

    def image(self, i: int) -> bytes:
        return encode_png(self._compose([self._drawing(int(j)) for j in self._members[i]]))

    def mask(self, i: int) -> np.ndarray:
        parts = [_outline(self._drawing(int(j))) * (self.source.label(int(j)) + 1) for j in self._members[i]]
        return self._compose(parts).astype(np.int32)

    def label(self, i: int) -> int:
        raise DataError(f"{self.keys[i]} shows several classes", where=self.where(i))

    def captions(self, i: int) -> list[str]:
        return []

    def where(self, i: int) -> str:
        return self.source.where(int(self._members[i][0]))

    def close(self) -> None:
        self.source.close()

    @property
    def fingerprint(self) -> str:
        about = f"{self.source.fingerprint} {self.side} {self.seed} {self.cell} {_WHITE}"
        return hashlib.sha256(about.encode()).hexdigest()

    @property
    def stamp(self) -> str:
        return hashlib.sha256(f"{self.source.stamp} {self.fingerprint}".encode()).hexdigest()

    def _drawing(self, j: int) -> np.ndarray:
        from PIL import Image

        pixels = decode_image(self.source.image(j))
        if pixels.shape[:2] == (self.cell, self.cell):
            return pixels
        return np.asarray(Image.fromarray(pixels).resize((self.cell, self.cell), Image.Resampling.BICUBIC))

    def _compose(self, parts: list[np.ndarray]) -> np.ndarray:
        rows = [np.concatenate(parts[r * self.side : (r + 1) * self.side], axis=1) for r in range(self.side)]
        return np.concatenate(rows, axis=0)


def _outline(pixels: np.ndarray) -> np.ndarray:
    """The drawing's pixels as bool (H, W): those that are not white, and white ones that the drawing encloses."""
    from scipy import ndimage

    light = (pixels >= _WHITE).all(axis=-1)
    regions, _ = ndimage.label(light)
    border = np.concatenate([regions[0], regions[-1], regions[:, 0], regions[:, -1]])
    return ~np.isin(regions, np.unique(border[border > 0]))
