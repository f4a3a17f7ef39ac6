"""Recipe sections of data: what `data-prepare` reads and writes, and what the training stages read. No torch."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, field_validator, model_validator

from evatool.recipe.schema.base import Fraction, NonNegative, NonNegativeFloat, Positive, PositiveFloat, Section

# ---------------------------------------------------------------------------------------------------- data-prepare


class DrawingsSource(Section):
    """Captioned drawings that ship with evatool: 6,816 small pictures of 849 concepts (docs/data.md).

    They need no download, so the demo and the debug recipes use them.
    """

    kind: Literal["drawings"] = "drawings"
    """Selects the drawings as the pictures to prepare."""
    num_unseen: NonNegative = 120
    """Number of concepts that are left out of training in every set. They form the evaluation set `never-seen`. The
    default, 120 of 849, leaves most concepts for training. Lower it together with `max_concepts`."""
    split_seed: int = 0
    """Seed that decides which concepts are left out of training. Two recipes with the same seed leave out the same
    ones; change it to repeat an experiment with other concepts."""
    max_concepts: Positive | None = None
    """Largest number of concepts to use, spread evenly over the groups of drawings. All are used when it is absent.
    Debug recipes set it so that they finish in seconds."""


class FolderSource(Section):
    """A folder of your own pictures, and a file with their captions."""

    kind: Literal["folder"] = "folder"
    """Selects a folder of pictures and a caption file as what to prepare."""
    images: Path
    """Folder of the pictures. It is searched recursively."""
    captions: Path
    """File with the captions: CSV, TSV or JSONL, told apart by its suffix. Each row names one picture; several rows for
    one picture give it several captions."""
    image_column: str = "image"
    """Column (in JSONL: key) that holds the picture's path, relative to `images`. Change it where your file calls the
    column something else."""
    caption_column: str = "caption"
    """Column (in JSONL: key) that holds the caption. Change it where your file calls the column something else."""
    encoding: str = "utf-8"
    """Text encoding of the caption file, by Python's name. Set it to `utf-16` or `cp1252`, for instance, for a file
    that is not UTF-8."""
    license: str | None = None
    """Licence of the pictures, written to the manifest. It changes nothing else."""

    @field_validator("encoding")
    @classmethod
    def _encoding_is_known(cls, encoding: str) -> str:
        try:
            "".encode(encoding)  # refuses codecs that are not of text, such as base64, too
        except LookupError as error:
            raise ValueError(f"unknown text encoding {encoding!r}; for instance utf-8, utf-16 or cp1252") from error
        return encoding


class ShardSection(Section):
    """The WebDataset shards that are written."""

    samples_per_shard: Positive = 1000
    """Number of samples in one tar file. At 1,000 a shard of web pictures has 8 to 40 MB. Raise it for sets of many
    millions of samples, so that there are fewer files."""
    shuffle_seed: int = 0
    """Seed of the order in which samples are written to the shards. Training shuffles again, so there is rarely a
    reason to change it."""
    max_bad_fraction: Fraction = 0.01
    """Largest share of pictures and rows that may be unusable, from 0 to 1. Up to it they are skipped and named; beyond
    it the stage ends with exit code 78 and writes nothing. The default of 1 % bears a few damaged files and still
    notices a wrong folder."""
    max_pixels: Positive = 89_478_485
    """Largest picture that is accepted, in pixels, judged by its header before it is decoded. The default is the size
    at which Pillow warns of a decompression bomb. Raise it for very large scans that you trust."""
    contact_sheet_images: Positive = 60
    """Number of pictures on the contact sheet, a glance at what was prepared."""


class DataPrepareRecipe(Section):
    """Turns pictures and captions into WebDataset shards, evaluation sets, a manifest and a contact sheet."""

    stage: Literal["data-prepare"] = "data-prepare"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    source: str | None = None
    """Text that says where the values of this recipe come from. It is shown by `evatool recipe list` and changes
    nothing."""
    run_dir: Path | None = None
    """Folder to write. It is `runs/<recipe name>` when absent."""
    data: Annotated[DrawingsSource | FolderSource, Field(discriminator="kind")]
    """Pictures and captions to prepare; its `kind` says where they are."""
    shards: ShardSection = ShardSection()
    """How the shards are written."""


# ---------------------------------------------------------------------------------------------------- training data


class AugmentSection(Section):
    """Random changes of each training picture.

    The defaults are EVA-CLIP's: a crop and nothing else (docs/reference/eva.md#clip-data).
    """

    crop_scale: tuple[PositiveFloat, PositiveFloat] = (0.9, 1.0)
    """Smallest and largest area of the random crop, as shares of the picture. The default keeps nearly the whole
    picture, since captions describe all of it. Lower the first number where pictures are few or repeated often."""
    crop_ratio: tuple[PositiveFloat, PositiveFloat] = (0.75, 1.3333333333333333)
    """Smallest and largest aspect ratio (width / height) of the random crop before it is scaled to a square. The
    default is torchvision's."""
    horizontal_flip: Fraction = 0.0
    """Probability of mirroring a picture left to right. It is 0 because captions may speak of left and right, and
    pictures may show text."""
    rotate_degrees: NonNegativeFloat = 0.0
    """Largest rotation to either side, in degrees; corners are filled with white. At 0 nothing is rotated. It helps
    small sets of drawings."""
    color_jitter: NonNegativeFloat = 0.0
    """Strength of random changes of brightness, contrast, saturation and hue; 0 switches them off and 0.4 is strong. It
    is off because captions name colours."""
    grayscale: Fraction = 0.0
    """Probability of removing the colour. It is 0 because captions name colours."""

    @model_validator(mode="after")
    def _ranges_are_ordered(self) -> AugmentSection:
        for name in ("crop_scale", "crop_ratio"):
            low, high = getattr(self, name)
            if low > high:
                raise ValueError(f"{name} = [{low}, {high}] is empty: the first number must not exceed the second")
        return self


class DataSource(Section):
    """One set of shards among several that are mixed."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the set in logs, metrics and `phases`."""
    shards: str | Annotated[list[str], Field(min_length=1)]
    """Where the shards are: a folder or manifest written by `evatool data-prepare`, or tars as a path, a URL that
    fsspec can open, a glob, or a list with `{000..123}`. A folder of tars without a manifest, such as img2dataset
    writes, is taken as it is."""
    sequential: bool = False
    """Whether the tars are read from their beginning to their end, in their order, without shuffling. Set it for
    compressed tars (`.tar.gz`), which cannot be read in any other way. Every loader process of every rank then reads
    all of them, and a resumed run skips what it has seen."""
    allow_pipe: bool = False
    """Whether `shards` may be a command, `pipe:aws s3 cp s3://bucket/{000..123}.tar -`, whose output is read as
    `sequential` says. It runs in a shell with your rights, so it is off unless this recipe turns it on."""
    num_samples: Positive | None = None
    """Number of samples of a source that is read sequentially or from a command. When absent, everything is read once
    to count them before the run begins."""
    weight: NonNegativeFloat | None = None
    """Share of this set in what is read, relative to the weights of the other sets. When absent its number of samples
    counts, so that all samples are equally frequent. With 0 only the phases that name the set read it."""

    @model_validator(mode="after")
    def _commands_are_allowed(self) -> DataSource:
        specs = [self.shards] if isinstance(self.shards, str) else self.shards
        is_pipe = any(spec.startswith("pipe:") for spec in specs)
        if is_pipe and not isinstance(self.shards, str):
            raise ValueError("a command (`pipe:`) stands alone in `shards`, not in a list")
        if is_pipe and not self.allow_pipe:
            raise ValueError("`pipe:` runs a command in a shell: set allow_pipe = true in the source if you trust it")
        if self.allow_pipe and not is_pipe:
            raise ValueError("allow_pipe has no effect: shards is no command (`pipe:...`)")
        if self.num_samples is not None and not (is_pipe or self.sequential):
            raise ValueError("num_samples has no effect: only sources read in order (sequential, `pipe:`) need it")
        return self


class DataPhase(Section):
    """Other weights of the sources, from a point of the run on."""

    from_samples: Positive
    """Number of samples seen at which the phase begins. It is rounded up to a whole global batch."""
    weights: Annotated[dict[str, NonNegativeFloat], Field(min_length=1)]
    """Weight of each source from there on, by the source's name. A source that is not named is not read."""


class CaptionChoice(Section):
    """One place of a sample in which its captions may stand."""

    member: str = "txt"
    """Extension of the sample's file that holds the caption: UTF-8 text, or a JSON object whose key `field` names."""
    field: str | None = None
    """Key in the JSON object. Its value is a string, or a list of strings of which one is drawn each time. A text file
    has no `field`."""
    probability: PositiveFloat = 1.0
    """Frequency with which this place is drawn, relative to the other places in which the sample has a caption. Lower
    it for captions that are worse than the others."""

    @model_validator(mode="after")
    def _field_is_of_json(self) -> CaptionChoice:
        if (self.member.rpartition(".")[2] == "json") != (self.field is not None):
            raise ValueError(
                f"member {self.member!r} with field {self.field!r}: a json member needs `field`, a text member has none"
            )
        return self


class ExtraMember(Section):
    """An array that is stored beside each sample, for instance a teacher's features."""

    name: Annotated[str, Field(min_length=1)]
    """Name of the array in `Batch.extras`."""
    member: str
    """Extension of the sample's file that holds the array. It ends in `npy` or `safetensors`, for instance
    `teacher.npy`."""
    tensor: str | None = None
    """Name of the tensor in a `safetensors` file; an `npy` file has none."""
    shape: list[Positive]
    """Shape of the array. A sample whose array has another shape counts as a bad sample."""

    @model_validator(mode="after")
    def _format_is_read(self) -> ExtraMember:
        suffix = self.member.rpartition(".")[2]
        if suffix not in ("npy", "safetensors"):
            raise ValueError(f"member = {self.member!r} is not read: its extension must end in npy or safetensors")
        if (suffix == "safetensors") != (self.tensor is not None):
            raise ValueError(f"member {self.member!r} with tensor {self.tensor!r}: `tensor` belongs to safetensors")
        return self


class RemoteSection(Section):
    """How shards on other machines are read: each is fetched whole into a folder of bounded size on this machine."""

    cache_dir: Path | None = None
    """Folder of the fetched shards, shared by all processes of a machine. When absent, a folder of this user's alone in
    the system's temporary folder is used. Set it to the machine's fastest local disk. A folder that everyone can write
    is refused."""
    cache_bytes: Positive = 64 * 2**30
    """Largest number of bytes in that folder; the shards that were not used for longest are removed first. It must hold
    the windows that are being read. The default is 64 GiB."""
    attempts: Positive = 4
    """Number of tries to fetch a shard before all of its samples count as bad. Raise it for a store that fails often.
    """
    timeout_sec: PositiveFloat = 30.0
    """Seconds without a byte after which a try fails. Raise it for a slow connection."""
    backoff_sec: PositiveFloat = 1.0
    """Seconds of pause after the first failed try. The pause doubles after each further one, up to 30 s."""
    allow_private_redirects: bool = False
    """Whether a web server may redirect to an address that only this machine or its network can reach. The recipe's own
    addresses may be of that kind. It is off because such a redirect can reach services that trust this machine; set it
    for a store behind a firewall whose servers answer so."""


class TrainDataSection(Section):
    """The shards to train on, their order, and how their pictures and captions are read."""

    train: Path | None = None
    """Folder with shards and their `manifest.json`, as `evatool data-prepare` writes it, or local tars given by a glob.
    Use `sources` instead to mix several sets or to read from another machine."""
    sources: Annotated[list[DataSource], Field(min_length=1)] | None = None
    """Sets of shards that are mixed, each in a table `[[data.sources]]`. They take the place of `train`."""
    sampling: Literal["epochs", "with-replacement"] = "epochs"
    """Order in which the samples of a source come. With `epochs` each sample comes once before any comes again. With
    `with-replacement` every sample is drawn independently, so that some come again before others have come."""
    mixing: Literal["samples", "alternating", "weighted-batches"] = "samples"
    """How sources share the batches. With `samples` every batch holds each source in its share. `alternating` and
    `weighted-batches` give whole batches to one source, in turn or drawn by weight, as EVA's released code does; choose
    them to repeat such a run."""
    phases: Annotated[list[DataPhase], Field(min_length=1)] | None = None
    """Changes of the sources' weights at stated numbers of samples seen, each in a table `[[data.phases]]`. The weights
    stay the same when it is absent."""
    window_shards: Positive | None = None
    """Number of shards whose samples are shuffled together. It is 64 when absent, or 16 where any shard is remote. More
    of them mix the samples better; fewer keep less on the disk, and more samples of one shard close together."""
    streams: Positive = 1
    """Number of places of an epoch that are read at the same time. Set it to the number of ranks, or a multiple, where
    machines fetch remote shards: each machine then fetches only the shards of its own ranks. At 1 every machine fetches
    all shards."""
    image: Annotated[str, Field(min_length=1)] | Annotated[list[str], Field(min_length=1)] | None = None
    """Extension of the sample's file that holds the image, where it is not called `jpg`, `jpeg`, `png` or `webp`: for
    instance `photo.jpg` for a file `000123.photo.jpg`. Of a list, the first that a sample has is read. The file's
    content says which format it has."""
    caption: Literal["txt", "json-captions"] | Annotated[list[CaptionChoice], Field(min_length=1)] = "txt"
    """Where the caption of a sample is. `txt` is the text file; `json-captions` draws one of the `captions` in the JSON
    file; or a list of places, each with a probability."""
    extras: Annotated[list[ExtraMember], Field(min_length=1)] | None = None
    """Arrays that are stored beside the samples and come with each batch. None are read when it is absent."""
    augment: AugmentSection = AugmentSection()
    """Random changes of each training picture."""
    decode: Literal["fast", "exact", "scaled"] = "fast"
    """How pictures are decoded and resized. `exact` gives the bytes of Pillow's decoder and bicubic, as EVA's code
    does. `fast` is faster and near that: mostly within two grey levels, up to 17 were seen where hard edges are
    enlarged. `scaled` also decodes large JPEGs at half or a quarter of their size where that is enough; choose it where
    the CPU is the bottleneck."""
    nonstandard: Literal["skip", "convert"] = "skip"
    """What becomes of CMYK, 16-bit and animated pictures, whose right colours cannot be known. `skip` replaces them as
    bad samples; `convert` makes RGB of the first frame as EVA's readers did, without a limit on their number."""
    num_workers: NonNegative = 0
    """Number of loader processes of each rank. With 0 the training process reads by itself, which suits small sets and
    debugging. On a GPU take as many as the cores of the rank allow."""
    max_wait_sec: PositiveFloat = 900.0
    """Seconds of waiting for a batch from the loader processes after which the run ends with exit code 76. It has no
    effect with `num_workers = 0`."""
    max_bad_fraction: Fraction = 0.01
    """Largest share of the samples tried that may be unreadable, from 0 to 1. Up to it they are replaced, named and
    counted; beyond it the run ends with exit code 78. The default of 1 % bears the broken pictures of a web set."""
    remote: RemoteSection = RemoteSection()
    """How shards on other machines are fetched and kept."""

    @model_validator(mode="after")
    def _one_kind_of_source(self) -> TrainDataSection:
        if (self.train is None) == (self.sources is None):
            raise ValueError("give either train (one folder of shards) or sources (a list), and not both")
        if self.train is not None and ":/" in str(self.train):
            raise ValueError(f"train = {str(self.train)!r} looks like a URL: put it into `sources`, as `shards`")
        if self.train is not None and str(self.train).startswith("pipe:"):
            raise ValueError("train takes no command (`pipe:`): put it into `sources`, with allow_pipe = true")
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
