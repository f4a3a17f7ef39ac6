"""One model on one set: opened, checked, answered or taken from an earlier start, kept, measured."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from dataclasses import dataclass, field
from pathlib import Path

from evatool.core.errors import DataError, EvatoolError
from evatool.core.progress import progress
from evatool.data.eval.sets import EvalSet, open_eval_set, scenes_of, usable_cores
from evatool.data.image.eval_transforms import EvalTransform
from evatool.distributed.collectives import gather_objects
from evatool.distributed.world import World
from evatool.eval.cache import TensorCache
from evatool.eval.encode import Encoding, ImageMemory
from evatool.eval.metrics import metrics_of
from evatool.eval.prediction_store import Kept, prediction_path, read_predictions, write_predictions
from evatool.eval.predictions import DIRECTIONS, ClassificationResult, Predictions, RetrievalResult, ScoreResult
from evatool.eval.published import published_value
from evatool.eval.report.gallery import Gallery, build_gallery, needed_images, read_gallery, write_gallery
from evatool.eval.results import EvalResults, ResultRow, SetRecord
from evatool.eval.suite import Suite, SuiteSet, check_counts, fetch_command, find_set
from evatool.eval.tasks.localization import localize
from evatool.eval.tasks.probes import few_shot, image_features, linear_probe
from evatool.eval.tasks.retrieval import PairFeatures, best_and_worst_retrievals, encode_pairs, retrieve
from evatool.eval.tasks.zero_shot import classify
from evatool.eval.text_classifier import Memory, TensorStore, prompts_hash
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.models import EvalModel

log = logging.getLogger(__name__)


@dataclass
class Evaluation:
    """What is known so far: filled model by model and set by set."""

    section: EvalSection
    suite: Suite
    chosen: list[SuiteSet]
    folders: dict[str, Path]
    run_dir: Path
    results: EvalResults
    world: World
    cache: Path | None
    answers: dict[tuple[str, str], Predictions] = field(default_factory=dict)  # by model and set
    galleries: dict[tuple[str, str], Gallery] = field(default_factory=dict)  # of retrieval sets, likewise
    keys: dict[str, list[str]] = field(default_factory=dict)  # sample keys of each set
    memories: dict[str, Memory] = field(default_factory=dict)  # text classifiers of each model
    images: dict[str, ImageMemory] = field(default_factory=dict)  # features of pictures of each model
    opened: dict[tuple[str, int], EvalSet] = field(default_factory=dict)  # by set and side in pixels


def measure_set(evaluation: Evaluation, model: EvalModel, entry: SuiteSet) -> None:
    """One model on one set: answers kept, metrics with intervals added to the results; every rank must call it.

    Raises: EvatoolError where the set is not what the suite says, or cannot be read.
    """
    started = time.perf_counter()
    opened = open_set(evaluation, entry, model.record.image_size)
    partial = check_counts(
        evaluation.suite,
        entry,
        _counts(opened),
        evaluation.folders[entry.name],
        allow_partial=evaluation.section.allow_partial,
    )
    settings = _settings(evaluation.section, opened)
    key = _key(evaluation.section, model, opened, settings)
    path = prediction_path(evaluation.run_dir, model.record.name, entry.name)
    kept = gather_objects(_earlier(path, key) if evaluation.world.is_main else None)[0]
    if kept is None:
        answers = _predict(evaluation, model, entry, opened)
        probes = _probe(evaluation, model, entry, opened)
        record = _set_record(evaluation.suite, entry, opened, partial, answers)
        seconds = round(time.perf_counter() - started, 3)
        kept = Kept(key, model.record, record, settings, seconds, answers, probes)
        if evaluation.world.is_main:
            write_predictions(path, kept)
    else:
        log.info("%s on %s: answers are kept from an earlier start", model.record.name, entry.name)
        if _gallery_path(path).is_file():
            evaluation.galleries[model.record.name, entry.name] = read_gallery(_gallery_path(path))
    _add(evaluation, model, opened, kept)
    opened.samples.close()  # a suite has more tars than a process may hold open


def open_set(evaluation: Evaluation, entry: SuiteSet, image_size: int, *, split: str | None = None) -> EvalSet:
    """A set of the suite, as this rank's share of it; its test split is opened once.

    Raises: DataError where it is missing or wrong.
    """
    key = (entry.name, image_size)
    if split is not None:
        return _open(evaluation, entry, image_size, split)
    if key not in evaluation.opened:
        evaluation.opened[key] = _open(evaluation, entry, image_size, entry.split)
    return evaluation.opened[key]


def _open(evaluation: Evaluation, entry: SuiteSet, image_size: int, split: str) -> EvalSet:
    section, folder = evaluation.section, evaluation.folders[entry.name]
    if not folder.is_dir():
        raise DataError(
            f"evaluation set {entry.name} is missing",
            where=str(folder),
            expected=f"{entry.title}: {entry.num_samples or 'any number of'} samples",
            fix=fetch_command(entry, folder) or evaluation.suite.prepare,
        )
    opened = open_eval_set(
        folder,
        transform=EvalTransform(image_size, section.resize, section.decode),
        batch_size=section.batch_size,
        split=split,
        num_threads=section.num_threads or usable_cores(),
        rank=evaluation.world.rank,
        world_size=evaluation.world.world_size,
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
            fix=fetch_command(entry, folder) or evaluation.suite.prepare,
        )
    return opened


def _counts(opened: EvalSet) -> dict[str, int | None]:
    captions = None
    if opened.kind == "retrieval":
        captions = sum(len(opened.samples.captions(i)) for i in range(opened.num_samples))
    return {"pictures": opened.num_samples, "classes": len(opened.classnames) or None, "captions": captions}


def _settings(section: EvalSection, opened: EvalSet) -> dict[str, str]:
    prompts = prompts_hash(opened.classnames, opened.templates) if opened.classnames else ""
    return {
        "precision": section.precision,
        "resize": section.resize,
        "decode": section.decode,
        "prompts": prompts,
    }


def _key(section: EvalSection, model: EvalModel, opened: EvalSet, settings: dict[str, str]) -> str:
    """Digest of all that the answers depend on; the batch size is not among it."""
    probes = [s.model_dump(mode="json") if s else None for s in (section.linear_probe, section.few_shot)]
    parts = [model.origin, model.tokenizer_key, model.record.name, opened.samples.stamp, settings, probes, section.seed]
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _earlier(path: Path, key: str) -> Kept | None:
    """Answers of an earlier start of this run, if they are of the same model, set and settings."""
    try:
        kept = read_predictions(path)
    except DataError:
        return None
    return kept if kept.key == key else None


def _predict(evaluation: Evaluation, model: EvalModel, entry: SuiteSet, opened: EvalSet) -> Predictions:
    stores, memory = _stores(evaluation, model), evaluation.images.setdefault(model.record.name, ImageMemory())
    with progress(f"{model.record.name}: {entry.title}", total=len(opened.loader.indices), unit="pictures") as bar:
        if opened.kind == "classification":
            return classify(
                model,
                model.tokenizer,
                opened,
                device=model.device,
                stores=stores,
                memory=memory,
                trim_text=model.trims_text,
                lockstep=model.lockstep,
                on_batch=bar.advance,
            )
        if opened.kind == "localisation":
            return _localize(model, opened, stores, bar.advance)
        features = encode_pairs(
            model,
            model.tokenizer,
            opened,
            device=model.device,
            trim_text=model.trims_text,
            lockstep=model.lockstep,
            memory=memory,
            on_batch=bar.advance,
        )
        answers = retrieve(features, device=model.device)
        if evaluation.world.is_main:
            gallery = _gallery(model.record.name, opened, features, answers)
            evaluation.galleries[model.record.name, entry.name] = gallery
            path = prediction_path(evaluation.run_dir, model.record.name, entry.name)
            write_gallery(_gallery_path(path), gallery)
        return answers


def _localize(
    model: EvalModel, opened: EvalSet, stores: list[TensorStore], on_batch: Callable[[int], None]
) -> ScoreResult:
    if model.patch_tokens is None:
        raise EvatoolError(
            f"{model.record.name} gives no patch tokens",
            where=opened.name,
            expected="a model that load_clip reads",
            fix="leave the set out with eval.sets, or evaluate the model from its file",
        )
    return localize(
        model,
        model.patch_tokens,
        model.tokenizer,
        opened,
        device=model.device,
        stores=stores,
        trim_text=model.trims_text,
        lockstep=model.lockstep,
        on_batch=on_batch,
    )


def _stores(evaluation: Evaluation, model: EvalModel) -> list[TensorStore]:
    """Where text classifiers of the model are kept: in memory, and on disk."""
    memory = evaluation.memories.setdefault(model.record.name, Memory())
    if evaluation.cache is None:
        return [memory]
    origin = (model.origin, model.tokenizer_key)
    return [memory, TensorCache(evaluation.cache, "classifiers", *origin, writes=evaluation.world.is_main)]


def _probe(evaluation: Evaluation, model: EvalModel, entry: SuiteSet, opened: EvalSet) -> ScoreResult | None:
    """Linear probe and few-shot scores, where the recipe asks for them and the set has training data."""
    section = evaluation.section
    has_training = bool(entry.train_split or entry.train_set)
    if opened.kind != "classification" or not has_training or not (section.linear_probe or section.few_shot):
        return None
    source = evaluation.suite.set(entry.train_set) if entry.train_set else entry
    evaluation.folders.setdefault(source.name, find_set(section.data, source))
    training = open_set(
        evaluation, source, model.record.image_size, split=None if entry.train_set else entry.train_split
    )
    if training.classnames != opened.classnames:
        raise DataError(
            f"probes of {entry.name} are trained on {training.name}, whose classes are others",
            expected="the same classnames.txt",
            fix="prepare both sets in one run",
        )
    how = Encoding(model.device, model.trims_text, model.lockstep)
    store = None
    if evaluation.cache is not None:
        origin = (model.origin, section.resize, section.decode)
        store = TensorCache(evaluation.cache, "features", *origin, writes=evaluation.world.is_main)
    memory = evaluation.images.get(model.record.name)
    train, test = (
        image_features(model, s, how, store=store, key=s.samples.stamp, memory=memory) for s in (training, opened)
    )
    scores = ScoreResult({}, {})
    num_classes = len(opened.classnames)
    if section.linear_probe:
        found = linear_probe(
            train, test, num_classes, seed=section.seed, device=model.device, **section.linear_probe.model_dump()
        )
        scores = ScoreResult(scores.scores | found.scores, scores.chance | found.chance)
    if section.few_shot:
        found = few_shot(
            train,
            test,
            num_classes,
            seed=section.seed,
            device=model.device,
            name=training.name,
            **section.few_shot.model_dump(),
        )
        scores = ScoreResult(scores.scores | found.scores, scores.chance | found.chance)
    return scores


def _add(evaluation: Evaluation, model: EvalModel, opened: EvalSet, kept: Kept) -> None:
    """Kept answers to the results."""
    results, section = evaluation.results, evaluation.section
    name = kept.set.name
    evaluation.answers[model.record.name, name] = kept.answers
    evaluation.keys[name] = opened.samples.keys
    if all(s.name != name for s in results.sets):
        results.sets.append(kept.set)
    measures = metrics_of(kept.answers) + (metrics_of(kept.probes) if kept.probes else [])
    for measure in measures:
        interval = measure.interval(num_resamples=section.num_bootstrap, seed=section.seed)
        published = None
        if not kept.set.partial and not kept.set.not_comparable:
            published = published_value(model.record.preset, name, measure.metric, section.resize)
        results.results.append(
            ResultRow(
                model=model.record.name,
                fingerprint=model.record.fingerprint,
                set=name,
                variant=kept.set.variant,
                kind=kept.set.kind,
                metric=measure.metric,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                chance=measure.chance,
                n=len(measure.values),
                num_classes=kept.set.num_classes,
                seed=section.seed,
                seconds=kept.seconds,
                published=published.value if published else None,
                published_source=published.source if published else "",
                **kept.settings,
            )
        )
    if isinstance(kept.answers, ClassificationResult) and len(kept.answers.near_ties):
        ties = results.near_ties.setdefault(model.record.name, {})
        ties[name] = [opened.samples.keys[i] for i in kept.answers.near_ties.tolist()]


def _set_record(suite: Suite, entry: SuiteSet, opened: EvalSet, partial: str, answers: Predictions) -> SetRecord:
    """The set as it was found; a part of the full set does not carry the full set's name alone."""
    variant = f"{suite.name}/{entry.name}" + (f", {entry.variant}" if entry.variant else "")
    return SetRecord(
        name=entry.name,
        title=entry.title,
        phrase=entry.phrase,
        about=entry.about,
        kind=entry.kind,
        variant=f"{variant} ({partial})" if partial else variant,
        n=opened.num_samples,
        num_classes=len(opened.classnames) or None,
        largest_class_share=answers.largest_class_share if isinstance(answers, ClassificationResult) else None,
        headline=entry.headline,
        metric=entry.metric,
        partial=partial,
        samples=opened.fingerprint,
        not_comparable=entry.not_comparable,
    )


def _gallery_path(predictions: Path) -> Path:
    return predictions.with_suffix(".gallery.json")


def _gallery(model: str, eval_set: EvalSet, features: PairFeatures, answers: RetrievalResult) -> Gallery:
    """The clearest hits and misses in both directions, with their pictures."""
    chosen = [best_and_worst_retrievals(features, answers, direction=direction) for direction in DIRECTIONS]
    best = [example for some, _ in chosen for example in some]
    worst = [example for _, some in chosen for example in some]
    return build_gallery(
        model,
        eval_set.name,
        best,
        worst,
        images={i: eval_set.image(i) for i in sorted(needed_images([*best, *worst]))},
        captions=features.captions,
        num_images=len(features.image),
    )
