"""The `eval` stage's part of a recipe. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import NonNegative, Positive, PositiveFloat, Section


class LinearProbeSection(Section):
    """Logistic regression on frozen features of a labelled training set, for evaluation sets that have one."""

    weight_decays: list[PositiveFloat] = Field(default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2], min_length=1)
    """Strengths of regularisation that are tried on the held-out share. The best one is used to fit all training
    features. Extend the range where the best one is at its end."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training samples of each class that chooses the weight decay, between 0 and 1."""
    max_iterations: Positive = 200
    """Largest number of L-BFGS iterations of one fit."""


class FewShotSection(Section):
    """Logistic regression on a few training samples of each class."""

    shots: list[Positive] = Field(default=[1, 2, 4, 8], min_length=1)
    """Numbers of training samples of each class, each of which is evaluated. A number that a class cannot give is
    refused with the class's name."""
    draws: Positive = 3
    """Number of seeded draws of the training samples. The metric is the mean over them; more draws make it steadier."""
    weight_decay: PositiveFloat = 1e-4
    """Strength of the regularisation. It is fixed, since a few samples are too few to choose one on."""
    max_iterations: Positive = 200
    """Largest number of L-BFGS iterations of one fit."""


class EvalSection(Section):
    """The models to evaluate, the sets to evaluate them on, and how."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Models by the name that they get in the report. A model is whatever `evatool.load_clip` reads (a run folder,
    checkpoint, exported folder, released file or preset), or a stock open_clip model as `open_clip:NAME[/PRETRAINED]`.
    """
    model_configs: dict[str, str] = Field(default={})
    """Architecture of models whose weight file does not say it: the name in the report, and a preset or JSON file. Most
    files need none."""
    model_weights: dict[str, str] = Field(default={})
    """Which of several models in a file is evaluated: the name in the report, and `raw`, `ema` for the moving average,
    or the prefix of its names. Without it the raw weights of a checkpoint, and of other files the average, if any."""
    suite: str = "drawings"
    """Name of a suite of evaluation sets, or the path of a suite file of your own (docs/eval.md). `evatool suites list`
    shows the suites."""
    data: Path
    """Folder with the evaluation sets, one folder for each set."""
    sets: list[str] | None = None
    """Names of the sets of the suite to evaluate. All sets are evaluated when it is absent."""
    fetch: bool = False
    """Whether sets that are missing are downloaded from the Hugging Face hub into `data`. It is off so that nothing is
    downloaded unasked."""
    allow_partial: bool = False
    """Whether a set may have another number of samples than the benchmark has. Its results are then named a part, and
    count in no average. It is off so that a broken download is noticed."""
    batch_size: Positive = 256
    """Number of pictures in a forward pass on each rank. Lower it where a model does not fit into memory; results do
    not depend on it beyond rounding."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Numbers in which the model computes and its weights are kept. `fp32` is the reference; `bf16` and `fp16` are
    faster on a GPU and change results slightly."""
    resize: Literal["shortest", "squash", "longest"] | None = None
    """How a picture is brought to the input size of every model. `shortest` resizes the shorter side and takes the
    centre crop, as most published figures do; `squash` resizes both sides, as EVA's retrieval tables do; `longest`
    resizes the longer side and fills the rest. When it is absent, each model gets its images as it was trained on them,
    by the description beside its weights."""
    decode: Literal["exact", "fast"] = "exact"
    """How pictures are decoded and resized. `exact` gives the bytes of Pillow's decoder and bicubic; `fast` is near it,
    and is printed with the results."""
    num_threads: Positive | None = None
    """Number of threads that decode pictures. One for each usable CPU core is started when it is absent."""
    shard_model: Literal["auto", "never", "always"] = "auto"
    """Whether the weights are divided over the ranks. `auto` does so where they fill more than 80 % of a GPU."""
    processes: Positive | None = None
    """Number of processes to start on this machine. When absent, one is started for each GPU, or one where there are
    none. It is ignored under torchrun."""
    use_cache: bool = True
    """Whether text classifiers, probe features and fingerprints of weights are kept between runs. They are keyed by the
    weights, so a model that changed is never confused with an older one."""
    cache_dir: Path | None = None
    """Folder of that cache. It is `evatool` in the user's cache folder when absent."""
    linear_probe: LinearProbeSection | None = None
    """Settings of a linear probe on every set that has training data. None is fitted when it is absent."""
    few_shot: FewShotSection | None = None
    """Settings of few-shot classifiers on every set that has training data. None are fitted when it is absent."""
    num_bootstrap: Positive = 1000
    """Number of resamples behind each 95 % interval. More make the bounds steadier; fewer are faster."""
    seed: NonNegative = 0
    """Seed of the resamples, of few-shot draws, and of the random weights of a model that is a preset's name."""

    @model_validator(mode="after")
    def _settings_reach_something(self) -> EvalSection:
        for table in ("model_configs", "model_weights"):
            unknown = [name for name in getattr(self, table) if name not in self.models]
            if unknown:
                raise ValueError(
                    f"{table} names {', '.join(unknown)}, which is not in models: {', '.join(self.models)}"
                )
        if self.cache_dir is not None and not self.use_cache:
            raise ValueError("cache_dir has no effect with use_cache = false: leave one of the two out")
        return self


class EvalRecipe(Section):
    """Measures zero-shot classification, retrieval, localisation and probes with intervals, and writes a report."""

    stage: Literal["eval"] = "eval"
    """Stage that this recipe is for. The commands of other stages refuse it."""
    source: str | None = None
    """Text that says where the values of this recipe come from. It is shown by `evatool recipe list` and changes
    nothing."""
    run_dir: Path | None = None
    """Folder to write. It is `runs/<recipe name>` when absent."""
    eval: EvalSection
    """Models, evaluation sets and settings of the evaluation."""
