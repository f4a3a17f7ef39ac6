"""What was published of the models and of their training, to hold plans against.

Sources: docs/reference/eva.md#parameter-counts, #clip-recipes and #eva-clip-8b-and-18b.
"""

from __future__ import annotations

from dataclasses import dataclass

PARAMETERS = {
    "EVA01-CLIP-g-14": "1.0B + 124M = 1.1B",
    "EVA01-CLIP-g-14-plus": "1.0B + 354M = 1.3B",
    "EVA02-CLIP-B-16": "86M + 63M = 149M",
    "EVA02-CLIP-L-14": "304M + 124M = 428M",
    "EVA02-CLIP-L-14-336": "428M",
    "EVA02-CLIP-bigE-14": "4.4B + 354M = 4.7B",
    "EVA02-CLIP-bigE-14-plus": "4.4B + 695M = 5.0B",
    "EVA-CLIP-8B": "7.5B + 695M = 8.1B",
    "EVA-CLIP-8B-448": "7.5B + 695M = 8.1B",
    "EVA-CLIP-18B": "17.5B + 695M = 18.1B",
    "EVA-01-g": "1011M",
    "EVA-L": "304M (encoder)",
    "EVA-02-Ti": "6M",
    "EVA-02-S": "22M",
    "EVA-02-B": "86M",
    "EVA-02-L": "304M",
}
"""Preset -> image + text = total, as the papers and READMEs round them."""


@dataclass(frozen=True)
class PublishedRun:
    """One training run as it was published, or a change of it that cannot have fitted.

    Attributes:
        per_gpu: samples a GPU and step.
        patch_dropout, zero_stage: as the commands and the paper's tables give them, or as a control changes them.
        fits: whether it must fit.
        source: where the setting is written.
    """

    name: str
    preset: str
    gpu: str
    num_gpus: int
    per_gpu: int
    samples_seen: int
    patch_dropout: float
    zero_stage: int
    fits: bool
    source: str


_README = "EVA-CLIP README, released command (docs/reference/eva.md#clip-recipes)"
_PAPER = "arXiv 2402.04252, Tables 12 and 13 (docs/reference/eva.md#eva-clip-8b-and-18b)"

PUBLISHED_RUNS = (
    PublishedRun("B/16", "EVA02-CLIP-B-16", "a100-40", 64, 2048, 8_000_000_000, 0.0, 1, True, _README),
    PublishedRun("L/14", "EVA02-CLIP-L-14", "a100-40", 128, 1024, 4_000_000_000, 0.0, 1, True, _README),
    PublishedRun("L/14-336", "EVA02-CLIP-L-14-336", "a100-40", 128, 480, 2_000_000_000, 0.0, 1, True, _README),
    PublishedRun("E/14", "EVA02-CLIP-bigE-14", "a100-80", 144, 800, 4_000_000_000, 0.5, 1, True, _README),
    PublishedRun("E/14+", "EVA02-CLIP-bigE-14-plus", "a100-80", 144, 1000, 9_000_000_000, 0.5, 1, True, _README),
    PublishedRun("8B", "EVA-CLIP-8B", "a100-40", 384, 464, 9_000_000_000, 0.5, 3, True, _PAPER),
    PublishedRun("18B", "EVA-CLIP-18B", "a100-40", 360, 300, 6_000_000_000, 0.5, 3, True, _PAPER),
    PublishedRun(
        "E/14, all patches", "EVA02-CLIP-bigE-14", "a100-80", 144, 800, 4_000_000_000, 0.0, 1, False, "control"
    ),
    PublishedRun(
        "E/14+, all patches", "EVA02-CLIP-bigE-14-plus", "a100-80", 144, 1000, 9_000_000_000, 0.0, 1, False, "control"
    ),
    PublishedRun("8B, ZeRO-1", "EVA-CLIP-8B", "a100-40", 384, 464, 9_000_000_000, 0.5, 1, False, "control"),
    PublishedRun("18B, all patches", "EVA-CLIP-18B", "a100-40", 360, 300, 6_000_000_000, 0.0, 3, False, "control"),
)
"""Seven published settings, and four controls that cannot fit. All with block checkpointing and 16-bit weights."""
