"""The state of one evaluation of a suite, and its sets, opened once."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from evatool.core.errors import DataError, EvatoolError
from evatool.data.eval.eval_set import EvalSet, open_eval_set, scenes_of, usable_cores
from evatool.data.image.eval_transforms import EvalTransform
from evatool.distributed.world import World
from evatool.eval.encode import ImageMemory
from evatool.eval.predictions import Predictions
from evatool.eval.report.gallery import Gallery
from evatool.eval.results import EvalResults
from evatool.eval.suite import Suite, SuiteSet, fetch_command, find_set
from evatool.eval.text_classifier import ClassifierMemory
from evatool.recipe.schema import EvalSection


@dataclass
class SuiteEvaluation:
    """Everything that is known so far of models on the sets of a suite: filled model by model and set by set."""

    section: EvalSection
    suite: Suite
    chosen: list[SuiteSet]
    folders: dict[str, Path]
    run_dir: Path
    results: EvalResults
    world: World
    cache: Path | None
    check_owner: Callable[[], None] = lambda: None  # before writing; raises where another run has it
    predictions: dict[tuple[str, str], Predictions] = field(default_factory=dict)  # by model and set
    galleries: dict[tuple[str, str], Gallery] = field(default_factory=dict)  # likewise
    classifiers: dict[str, ClassifierMemory] = field(default_factory=dict)  # text classifiers of each model
    images: dict[str, ImageMemory] = field(default_factory=dict)  # features of images of each model
    transforms: dict[str, EvalTransform] = field(default_factory=dict)  # how images are made, by model
    opened: dict[tuple[str, EvalTransform], EvalSet] = field(default_factory=dict)

    def open(self, entry: SuiteSet, transform: EvalTransform) -> EvalSet:
        """The test split of a set, as this rank's share of it; opened once for models that want the same images.

        Raises: DataError where it is missing or wrong; EvatoolError where it is of another kind than the suite says.
        """
        key = (entry.name, transform)
        if key not in self.opened:
            self.opened[key] = self._open(entry, transform, entry.split)
        return self.opened[key]

    def open_training(self, entry: SuiteSet, transform: EvalTransform) -> EvalSet | None:
        """The set with the same classes that probes of a set are trained on; None where the suite names none.

        Raises: as `open`.
        """
        if entry.train_set:
            source = self.suite.set(entry.train_set)
            self.folders.setdefault(source.name, find_set(self.section.data, source))
            return self.open(source, transform)
        return self._open(entry, transform, entry.train_split) if entry.train_split else None

    def _open(self, entry: SuiteSet, transform: EvalTransform, split: str) -> EvalSet:
        section, folder = self.section, self.folders[entry.name]
        if not folder.is_dir():
            raise DataError(
                f"evaluation set {entry.name} is missing",
                where=str(folder),
                expected=f"{entry.title}: {entry.num_samples or 'any number of'} samples",
                fix=fetch_command(entry, folder) or self.suite.prepare,
            )
        opened = open_eval_set(
            folder,
            transform=transform,
            batch_size=section.batch_size,
            split=split,
            num_threads=section.num_threads or usable_cores(),
            rank=self.world.rank,
            world_size=self.world.world_size,
            name=entry.name if entry.compose is None else entry.compose.from_,
            prompts=entry.prompts,
        )
        if entry.compose is not None:
            opened = scenes_of(opened, entry.name, side=entry.compose.side, seed=entry.compose.seed)
        if opened.kind != entry.kind:
            raise EvatoolError(
                f"evaluation set {entry.name} is a {opened.kind} set",
                where=str(folder / "dataset_type.txt"),
                expected=entry.kind,
                fix=fetch_command(entry, folder) or self.suite.prepare,
            )
        return opened
