"""The `eval` stage's part of a recipe. No torch here."""

from __future__ import annotations

from pathlib import Path
from typing import Annotated, Literal

from pydantic import Field, model_validator

from evatool.recipe.schema.base import NonNegative, Positive, PositiveFloat, Section


class LinearProbeSection(Section):
    """Logistic regression on frozen features of a labelled training set, for sets that have one."""

    weight_decays: list[PositiveFloat] = Field(default=[1e-6, 1e-5, 1e-4, 1e-3, 1e-2], min_length=1)
    """Strengths tried on the held-out share; the best one is used on all training features."""
    holdout: Annotated[float, Field(gt=0, lt=1)] = 0.2
    """Share of the training samples of each class that chooses the weight decay."""
    max_iterations: Positive = 200
    """L-BFGS iterations of one fit."""


class FewShotSection(Section):
    """Logistic regression on a few training samples a class."""

    shots: list[Positive] = Field(default=[1, 2, 4, 8], min_length=1)
    """Training samples a class; sizes that a class cannot give are refused by name."""
    draws: Positive = 3
    """Seeded draws of the training samples; the metric is their mean."""
    weight_decay: PositiveFloat = 1e-4
    """Strength of the regularisation: too few samples to choose one on."""
    max_iterations: Positive = 200
    """L-BFGS iterations of one fit."""


class EvalSection(Section):
    """What to evaluate, on what, and how."""

    models: Annotated[dict[str, str], Field(min_length=1)]
    """Name in the report -> model, as `evatool.load_clip` reads it, or `open_clip:NAME[/PRETRAINED]`."""
    model_configs: dict[str, str] = Field(default={})
    """Name in the report -> preset or JSON file, for a weight file that does not say which model it is."""
    suite: str = "drawings"
    """Name of a suite of evaluation sets, or a suite file of your own (docs/eval.md)."""
    data: Path
    """Folder with the evaluation sets, one folder a set."""
    sets: list[str] | None = None
    """Only these sets of the suite."""
    fetch: bool = False
    """Download sets that are missing from the Hugging Face hub into `data`."""
    allow_partial: bool = False
    """Evaluate sets with another sample count than the benchmark's: named a part, in no average."""
    batch_size: Positive = 256
    """Pictures a forward pass."""
    precision: Literal["fp32", "bf16", "fp16"] = "fp32"
    """Arithmetic and storage of the weights."""
    resize: Literal["shortest", "squash"] = "shortest"
    """`shortest`: shorter side to the model's input, centre crop. `squash`: both sides, as EVA's retrieval tables."""
    decode: Literal["exact", "fast"] = "exact"
    """`exact`: Pillow's bicubic, byte for byte. `fast`: near it, printed with the results."""
    num_threads: Positive | None = None
    """Threads that decode pictures; one a usable CPU core when absent."""
    shard_model: Literal["auto", "never", "always"] = "auto"
    """Divide the weights over the ranks; `auto`: where they fill more than 80 % of a GPU."""
    processes: Positive | None = None
    """Processes to start on this machine; one a GPU, or one without GPUs, when absent. Ignored under torchrun."""
    use_cache: bool = True
    """Keep text classifiers, probe features and fingerprints of weights between runs."""
    cache_dir: Path | None = None
    """Folder of the cache; `evatool` in the user's cache folder when absent."""
    linear_probe: LinearProbeSection | None = None
    """Also fit a linear probe on every set that has training data."""
    few_shot: FewShotSection | None = None
    """Also fit few-shot classifiers on every set that has training data."""
    num_bootstrap: Positive = 1000
    """Resamples behind each 95 % interval."""
    seed: NonNegative = 0
    """Seed of the resamples, of few-shot draws, and of the random weights where a model is a preset."""

    @model_validator(mode="after")
    def _settings_reach_something(self) -> EvalSection:
        unknown = [name for name in self.model_configs if name not in self.models]
        if unknown:
            raise ValueError(
                f"model_configs names {', '.join(unknown)}, which is not in models: {', '.join(self.models)}"
            )
        if self.cache_dir is not None and not self.use_cache:
            raise ValueError("cache_dir has no effect with use_cache = false: leave one of the two out")
        return self


class EvalRecipe(Section):
    """Zero-shot classification, retrieval, localisation and probes with intervals, and a report."""

    stage: Literal["eval"] = "eval"
    source: str | None = None
    """Where the figures of this recipe come from."""
    run_dir: Path | None = None
    """Output folder; `runs/<recipe name>` when absent."""
    eval: EvalSection
