"""Recipe sections of data: what `data-prepare` reads and writes, and what the training stages read. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

# ---------------------------------------------------------------------------------------------------- data-prepare


class DrawingsSource(Section):
    """The 6,816 captioned drawings that ship with the package (docs/data.md)."""

    kind: Literal["drawings"] = "drawings"
    num_unseen: NonNegative = 120
    """Concepts removed from training in every set, for the never-seen evaluation."""
    split_seed: int = 0
    """Seed of the never-seen split."""
    max_concepts: Positive | None = None
    """Use only this many concepts, spread evenly over the groups (debug recipes)."""


class FolderSource(Section):
    """A folder of pictures and a caption file."""

    kind: Literal["folder"] = "folder"
    images: Path
    """Folder of pictures, searched recursively."""
    captions: Path
    """CSV, TSV or JSONL, told apart by its suffix; one picture a row."""
    image_column: str = "image"
    """Column (or JSON key) with the picture's path relative to `images`."""
    caption_column: str = "caption"
    """Column (or JSON key) with the caption."""
    encoding: str = "utf-8"
    """Text encoding of the caption file."""
    license: str | None = None
    """Licence of the pictures, for the manifest."""

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str) -> str:
        try:
            "".encode(encoding)  # refuses codecs that are not of text, such as base64, too
        except LookupError as error:
            raise ValueError(f"unknown text encoding {encoding!r}; for instance utf-8, utf-16 or cp1252") from error
        return encoding


class ShardSection(Section):
    """WebDataset shards to write."""

    samples_per_shard: Positive = 1000
    """Samples a tar file."""
    shuffle_seed: int = 0
    """Seed of the order in which samples are written."""
    max_bad_fraction: Fraction = 0.01
    """Pictures and rows that cannot be used, as a share of all: skipped and named up to here, refused beyond."""
    max_pixels: Positive = 89_478_485
    """Largest picture accepted, in pixels, judged by its header (Pillow's warning limit)."""
    contact_sheet_images: Positive = 60
    """Pictures on the contact sheet."""


class DataPrepareRecipe(Section):
    """Pictures and captions to WebDataset shards, evaluation sets, a manifest and a contact sheet."""

    stage: Literal["data-prepare"] = "data-prepare"
    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Output folder; `runs/<recipe name>` when absent."""
    data: Annotated[DrawingsSource | FolderSource, Field(discriminator="kind")]
    shards: ShardSection = ShardSection()


# ---------------------------------------------------------------------------------------------------- training data


class AugmentSection(Section):
    """Random transforms of a training picture. The defaults are EVA-CLIP's: a crop and nothing else
    (docs/reference/eva.md#clip-data).
    """

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Area of the random crop as a share of the picture (low, high)."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    """Aspect ratio of the random crop (low, high)."""
    horizontal_flip: Fraction = 0.0
    """Probability of mirroring left and right."""
    rotate_degrees: NonNegativeFloat = 0.0
    """Largest rotation either way, corners filled with white."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of random brightness, contrast, saturation and hue changes; 0 is off."""
    grayscale: Fraction = 0.0
    """Probability of dropping the colour."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> AugmentSection:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] is empty: the first number must not exceed the second")
        return self


class DataSource(Section):
    """One set of shards among several."""

    name: Annotated[str, Field(min_length=1)]
    """What logs, metrics and `phases` call it."""
    shards: str | Annotated[list[str], Field(min_length=1)]
    """A folder or manifest written by `evatool data-prepare`, or tars: path, URL (fsspec), glob, `{000..123}` list."""
    weight: NonNegativeFloat | None = None
    """Its share of what is read, relative to the other sources'; its number of samples when absent. 0: only phases
    that name it read it."""


class DataPhase(Section):
    """Other weights from a point of the run on."""

    from_samples: Positive
    """Samples seen when it begins, rounded up to a whole global batch."""
    weights: Annotated[dict[str, NonNegativeFloat], Field(min_length=1)]
    """Source name -> weight from here on; a source that is not named is not read."""


class CaptionChoice(Section):
    """One place of a sample where captions may stand."""

    member: str = "txt"
    """Extension of the member: UTF-8 text, or JSON with `field`."""
    field: str | None = None
    """Key in the JSON object: a string, or a list of strings of which one is drawn each time."""
    probability: PositiveFloat = 1.0
    """How often it is drawn, relative to the other places where the sample has a caption."""

    @model_validator(mode="after")
    def _field_is_of_json(self) -> CaptionChoice:
        if (self.member.rpartition(".")[2] == "json") != (self.field is not None):
            raise ValueError(
                f"member {self.member!r} with field {self.field!r}: a json member needs `field`, a text member has none"
            )
        return self


class ExtraMember(Section):
    """An array stored beside each sample, for instance a teacher's features."""

    name: Annotated[str, Field(min_length=1)]
    """Its name in the batch."""
    member: str
    """Extension of the member: ends in `npy` or `safetensors`, for instance `teacher.npy`."""
    tensor: str | None = None
    """Name of the tensor in a `safetensors` member."""
    shape: list[Positive]
    """Its shape; a sample with another is a bad sample."""

    @model_validator(mode="after")
    def _format_is_read(self) -> ExtraMember:
        suffix = self.member.rpartition(".")[2]
        if suffix not in ("npy", "safetensors"):
            raise ValueError(f"member = {self.member!r} is not read: its extension must end in npy or safetensors")
        if (suffix == "safetensors") != (self.tensor is not None):
            raise ValueError(f"member {self.member!r} with tensor {self.tensor!r}: `tensor` belongs to safetensors")
        return self


class RemoteSection(Section):
    """How shards on other machines are read: whole, into a bounded folder on this one."""

    cache_dir: Path | None = None
    """Folder of fetched shards, shared by a machine's processes; one in the system's temporary folder when absent."""
    cache_bytes: Positive = 64 * 2**30
    """Most bytes kept there; what was not used longest goes first. The windows under way must fit."""
    attempts: Positive = 4
    """Tries to fetch a shard before its samples count as bad."""
    timeout_sec: PositiveFloat = 30.0
    """A try fails when no byte arrives for so long."""
    backoff_sec: PositiveFloat = 1.0
    """Pause after the first failed try; doubled after each further one, up to 30 s."""


class TrainDataSection(Section):
    """Shards to train on."""

    train: Path | None = None
    """Folder with shards and their `manifest.json`, as `evatool data-prepare` writes it; or local tars by glob."""
    sources: Annotated[list[DataSource], Field(min_length=1)] | None = None
    """Sets of shards that are mixed, instead of `train`."""
    sampling: Literal["epochs", "with-replacement"] = "epochs"
    """`epochs`: each sample of a source once before any comes again. `with-replacement`: drawn independently."""
    mixing: Literal["samples", "alternating", "weighted-batches"] = "samples"
    """`samples`: each batch holds every source in its share. EVA's whole-batch modes: in turn, or drawn by weight."""
    phases: Annotated[list[DataPhase], Field(min_length=1)] | None = None
    """Changes of the sources' weights at stated samples seen."""
    window_shards: Positive | None = None
    """Shards shuffled together; when absent 64, or 16 where any shard is remote."""
    streams: Positive = 1
    """Places of an epoch read at once. As many as ranks (or a multiple): each rank fetches only its own shards."""
    caption: Literal["txt", "json-captions"] | Annotated[list[CaptionChoice], Field(min_length=1)] = "txt"
    """`txt`: the txt member; `json-captions`: one of the `captions` in the json member; or a list of places."""
    extras: Annotated[list[ExtraMember], Field(min_length=1)] | None = None
    """Arrays stored beside the samples that come with each batch."""
    augment: AugmentSection = AugmentSection()
    decode: Literal["fast", "exact", "scaled"] = "fast"
    """`exact`: Pillow's bicubic, byte for byte. `fast`: 2 grey levels from it. `scaled`: large JPEGs at 1/2 or 1/4."""
    nonstandard: Literal["skip", "convert"] = "skip"
    """CMYK, 16-bit and animated pictures: `skip` replaces them as bad samples, `convert` makes RGB of them as EVA's."""
    num_workers: NonNegative = 0
    """Loader processes per rank; 0 reads in the training process."""
    max_wait_sec: PositiveFloat = 900.0
    """Longest wait for a batch from the loader processes before the run ends with exit code 76."""
    max_bad_fraction: Fraction = 0.01
    """Samples that cannot be read, as a share of those tried: replaced and counted up to here, refused beyond."""
    remote: RemoteSection = RemoteSection()

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> TrainDataSection:
        if (self.train is None) == (self.sources is None):
            raise ValueError("give either train (one folder of shards) or sources (a list), and not both")
        if self.train is not None and ":/" in str(self.train):
            raise ValueError(f"train = {str(self.train)!r} looks like a URL: put it into `sources`, as `shards`")
        names = [source.name for source in self.sources or []]
        if len(set(names)) < len(names):
            raise ValueError(f"sources have the same name: {', '.join(names)}")
        extras = [extra.name for extra in self.extras or []]
        if len(set(extras)) < len(extras):
            raise ValueError(f"extras have the same name: {', '.join(extras)}")
        if names and all(source.weight == 0 for source in self.sources or []):
            raise ValueError("the run begins by reading nothing: all weights of `sources` are 0")
        if len(names) < 2 and (self.mixing != "samples" or self.phases):
            setting = f'mixing = "{self.mixing}"' if self.mixing != "samples" else "phases"
            raise ValueError(f"{setting} has no effect with one source: name several in `sources`")
        return self

    @model_validator(mode="after")
    def _phases_fit(self) -> TrainDataSection:
        names = [source.name for source in self.sources or []]
        starts = [phase.from_samples for phase in self.phases or []]
        if starts != sorted(set(starts)):
            raise ValueError(f"phases begin at {starts}: each must begin after the one before it")
        for phase in self.phases or []:
            unknown = sorted(set(phase.weights) - set(names))
            if unknown:
                raise ValueError(f"phases name {', '.join(unknown)}, which is no source; sources: {', '.join(names)}")
            if not any(phase.weights.values()):
                raise ValueError(f"the phase from {phase.from_samples} samples on reads nothing: all weights are 0")
            if self.mixing == "alternating" and len({w for w in phase.weights.values() if w}) > 1:
                raise ValueError('mixing = "alternating" takes sources in turn: weights in a phase are 0 or equal')
        return self
