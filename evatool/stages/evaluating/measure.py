"""Models on sets, one by one: opened, checked, predicted or taken from an earlier start, kept, measured."""

from __future__ import annotations

import hashlib
import json
import logging
import time
from collections.abc import Callable
from pathlib import Path

from evatool.core.errors import DataError, EvatoolError, RunFolderTakenError
from evatool.core.progress import progress
from evatool.data.eval.eval_set import EvalSet
from evatool.distributed.collectives import gather_objects
from evatool.eval.cache import TensorCache
from evatool.eval.encode import Encoding, ImageMemory
from evatool.eval.encoder import SetEncoder
from evatool.eval.lockstep import fail_on_all_ranks
from evatool.eval.prediction_store import KeptPredictions, prediction_path, read_predictions, write_predictions
from evatool.eval.predictions import Predictions
from evatool.eval.report.gallery import read_gallery, write_gallery
from evatool.eval.result_rows import result_rows
from evatool.eval.results import EvalFailure, SetRecord
from evatool.eval.suite import Suite, SuiteSet, check_counts
from evatool.eval.tasks.base import EvalTask
from evatool.eval.tasks.build import task_of
from evatool.eval.tasks.probes import Probes
from evatool.eval.text_classifier import ClassifierMemory, TensorStore, prompts_hash
from evatool.recipe.schema import EvalSection
from evatool.stages.evaluating.models import EvalModel, load_eval_model
from evatool.stages.evaluating.suite_evaluation import SuiteEvaluation

log = logging.getLogger(__name__)


def measure_models(evaluation: SuiteEvaluation) -> None:
    """Every model on every set; failures are added to the results. Raises: EvatoolError where the only model fails."""
    started = time.perf_counter()
    models, sets = evaluation.section.models, evaluation.chosen
    with progress("evaluate", total=len(models) * len(sets), unit="sets") as bar:
        for name, source in models.items():
            _measure_model(evaluation, name, source, on_set=lambda: bar.advance(1))
    evaluation.results.seconds = round(time.perf_counter() - started, 3)


def _measure_model(evaluation: SuiteEvaluation, name: str, source: str, on_set: Callable[[], None]) -> None:
    """Load one model, evaluate it on every set, let it go."""
    results = evaluation.results
    try:
        with fail_on_all_ranks():
            model = load_eval_model(name, source, evaluation.section, evaluation.world, evaluation.cache)
    except (EvatoolError, OSError, RuntimeError) as error:
        if len(evaluation.section.models) == 1:
            raise
        log.error("model %s cannot be loaded: %s", name, error)
        results.failures.append(EvalFailure(name, None, str(error)))
        return
    results.models.append(model.record)
    evaluation.transforms[name] = model.transform
    for entry in evaluation.chosen:
        try:
            measure_set(evaluation, model, entry)
        except RunFolderTakenError:
            raise
        except Exception as error:  # whatever one set meets must not lose the others
            log.error("%s on %s failed: %s", name, entry.name, error)
            log.debug("trace of the failure", exc_info=True)
            kind = "" if isinstance(error, EvatoolError) else f"{type(error).__name__}: "
            results.failures.append(EvalFailure(name, entry.name, f"{kind}{error}"))
        on_set()
    evaluation.images.pop(name, None)


def measure_set(evaluation: SuiteEvaluation, model: EvalModel, entry: SuiteSet) -> None:
    """One model on one set: predictions kept, metrics with intervals added to the results; every rank must call it.

    Raises: EvatoolError where the set is not what the suite says, or cannot be read.
    """
    started = time.perf_counter()
    section, task = evaluation.section, task_of(entry.kind)
    opened = evaluation.open(entry, model.transform)
    folder = evaluation.folders[entry.name]
    partial = check_counts(evaluation.suite, entry, task.counts(opened), folder, allow_partial=section.allow_partial)
    settings = _settings(section, model, opened)
    key = _key(section, model, opened, settings)
    path = prediction_path(evaluation.run_dir, model.record.name, entry.name)
    kept = gather_objects(_earlier(path, key) if evaluation.world.is_main else None)[0]
    if kept is None:
        predictions = _predict(evaluation, model, entry, opened)
        probes = _probe(evaluation, model, entry, opened)
        record = _set_record(evaluation.suite, entry, opened, partial, predictions)
        seconds = round(time.perf_counter() - started, 3)
        kept = KeptPredictions(key, model.record, record, settings, seconds, predictions, probes)
        if evaluation.world.is_main:
            evaluation.check_owner()
            write_predictions(path, kept)
    else:
        log.info("%s on %s: answers are kept from an earlier start", model.record.name, entry.name)
        if _gallery_path(path).is_file():
            evaluation.galleries[model.record.name, entry.name] = read_gallery(_gallery_path(path))
    _add(evaluation, opened, kept)
    opened.samples.close()  # a suite has more tars than a process may hold open


def _settings(section: EvalSection, model: EvalModel, opened: EvalSet) -> dict[str, str]:
    """Values of each result row that say how it was measured."""
    prompts = prompts_hash(opened.classnames, opened.templates) if opened.classnames else ""
    how = {"resize": model.transform.resize, "decode": model.transform.decode}
    return {"precision": section.precision, **how, "prompts": prompts}


def _key(section: EvalSection, model: EvalModel, opened: EvalSet, settings: dict[str, str]) -> str:
    """Digest of all that the predictions depend on; the batch size is not among it."""
    probes = [s.model_dump(mode="json") if s else None for s in (section.linear_probe, section.few_shot)]
    parts = [
        model.origin,
        model.tokenizer_key,
        model.record.name,
        opened.samples.stamp,
        settings,
        probes,
        section.seed,
    ]
    parts += model.transform_facts
    return hashlib.sha256(json.dumps(parts, sort_keys=True).encode()).hexdigest()


def _earlier(path: Path, key: str) -> KeptPredictions | None:
    """Predictions of an earlier start of this run, if they are of the same model, set and settings."""
    try:
        kept = read_predictions(path)
    except DataError:
        return None
    return kept if kept.key == key else None


def _predict(evaluation: SuiteEvaluation, model: EvalModel, entry: SuiteSet, opened: EvalSet) -> Predictions:
    """Predictions of the task of the set's kind; rank 0 also keeps the examples that the task shows."""
    name = model.record.name
    with progress(f"{name}: {entry.title}", total=len(opened.loader.indices), unit="pictures") as bar:
        task: EvalTask[Predictions] = task_of(entry.kind)
        predicted = task.run(_encoder(evaluation, model, bar.advance), opened)
        if predicted.gallery is not None and evaluation.world.is_main:
            gallery = predicted.gallery()
            evaluation.galleries[name, entry.name] = gallery
            evaluation.check_owner()
            write_gallery(_gallery_path(prediction_path(evaluation.run_dir, name, entry.name)), gallery)
        return predicted.predictions


def _encoder(
    evaluation: SuiteEvaluation, model: EvalModel, on_batch: Callable[[int], None] | None = None
) -> SetEncoder:
    """The model with what it remembers between sets: text classifiers, in memory and on disk, and image features."""
    stores: list[TensorStore] = [evaluation.classifiers.setdefault(model.record.name, ClassifierMemory())]
    if evaluation.cache is not None:
        origin = (model.origin, model.tokenizer_key)
        stores.append(TensorCache(evaluation.cache, "classifiers", *origin, writes=evaluation.world.is_main))
    return SetEncoder(
        model,
        model.tokenizer,
        Encoding(model.device, model.trims_text, model.lockstep),
        name=model.record.name,
        patch_tokens=model.patch_tokens,
        stores=stores,
        memory=evaluation.images.setdefault(model.record.name, ImageMemory()),
        on_batch=on_batch,
    )


def _probe(evaluation: SuiteEvaluation, model: EvalModel, entry: SuiteSet, opened: EvalSet) -> Predictions | None:
    """Linear probe and few-shot scores, where the recipe asks for them and the set has training data."""
    section = evaluation.section
    if not task_of(entry.kind).takes_probes or not (section.linear_probe or section.few_shot):
        return None
    training = evaluation.open_training(entry, model.transform)
    if training is None:
        return None
    store = None
    if evaluation.cache is not None:
        origin = (model.origin, model.transform.resize, model.transform.decode, *model.transform_facts)
        store = TensorCache(evaluation.cache, "features", *origin, writes=evaluation.world.is_main)
    probes = Probes(
        training,
        linear_probe=section.linear_probe.model_dump() if section.linear_probe else None,
        few_shot=section.few_shot.model_dump() if section.few_shot else None,
        seed=section.seed,
        store=store,
    )
    return probes.run(_encoder(evaluation, model), opened).predictions


def _add(evaluation: SuiteEvaluation, opened: EvalSet, kept: KeptPredictions) -> None:
    """Kept predictions to the results."""
    results, section = evaluation.results, evaluation.section
    model, name = kept.model.name, kept.set.name
    evaluation.predictions[model, name] = kept.predictions
    if all(s.name != name for s in results.sets):
        results.sets.append(kept.set)
    results.results += result_rows(kept, num_bootstrap=section.num_bootstrap, seed=section.seed)
    near_ties = kept.predictions.near_ties
    if len(near_ties):
        results.near_ties.setdefault(model, {})[name] = [opened.samples.keys[i] for i in near_ties.tolist()]


def _set_record(suite: Suite, entry: SuiteSet, opened: EvalSet, partial: str, predictions: Predictions) -> SetRecord:
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
        largest_class_share=predictions.largest_class_share,
        headline=entry.headline,
        metric=entry.metric,
        partial=partial,
        samples=opened.fingerprint,
        not_comparable=entry.not_comparable,
    )


def _gallery_path(predictions: Path) -> Path:
    return predictions.with_suffix(".gallery.json")
