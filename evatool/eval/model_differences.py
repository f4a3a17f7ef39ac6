"""Figures that follow from several models' predictions: averages, differences, intervals over seeds. No torch."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import numpy as np

from evatool.eval.aggregate import Combined, combined_metrics, metrics_for, paired
from evatool.eval.intervals import over_seeds
from evatool.eval.metrics import Metric
from evatool.eval.predictions import Predictions
from evatool.eval.published import published_value
from evatool.eval.results import AVERAGE, DifferenceRow, EvalResults, ModelRecord, ResultRow, SeedRow, SetRecord
from evatool.eval.suite import Suite

PredictionsOf = Mapping[tuple[str, str], Predictions]
"""By model and set."""


def add_averages(results: EvalResults, predictions: PredictionsOf, suite: Suite) -> None:
    """Rows and sets for the suite's averages and gaps, for every model that was measured on all of their sets."""
    for figure in combined_metrics(suite):
        for model in results.models:
            metrics = _metrics(figure, results, predictions, model.name)
            if metrics is None:
                continue
            if all(s.name != figure.name for s in results.sets):
                results.sets.append(_record(figure, suite))
            results.results.append(_row(figure, results, model, metrics))


def add_differences(
    results: EvalResults, predictions: PredictionsOf, suite: Suite | None, pairs: Sequence[tuple[str, str]]
) -> None:
    """Paired differences between models on every set, and on the averages that both have."""
    how = {"num_resamples": results.num_bootstrap, "seed": results.seed}
    for before, after in pairs:
        for record in results.sets:
            first, second = (predictions.get((model, record.name)) for model in (before, after))
            if first is None or second is None:
                continue
            later = {m.metric: m for m in second.metrics()}
            for a in first.metrics():
                if a.metric in later:
                    change = a.difference_to(later[a.metric], **how)
                    bounds = (change.value, change.low, change.high)
                    results.differences.append(
                        DifferenceRow(before, after, record.name, a.metric, *bounds, len(a.values))
                    )
        for figure in combined_metrics(suite) if suite else ():
            both = [_metrics(figure, results, predictions, model) for model in (before, after)]
            if both[0] is None or both[1] is None:
                continue
            changes = paired(both[0], both[1])
            change = figure.interval(changes, **how)
            n = sum(len(m.values) for m in changes.values())
            bounds = (change.value, change.low, change.high)
            results.differences.append(DifferenceRow(before, after, figure.name, AVERAGE, *bounds, n))


def add_seed_rows(results: EvalResults, predictions: PredictionsOf) -> None:
    """The mean over training seeds for models of one recipe, with intervals that cover another seed as well."""
    groups: dict[str, list[ModelRecord]] = {}
    for model in results.models:
        if model.recipe:
            groups.setdefault(model.recipe, []).append(model)
    for group in groups.values():
        if len({m.train_seed for m in group}) < 2:
            continue
        names = [m.name for m in group]
        for record in results.sets:
            found = [p for name in names if (p := predictions.get((name, record.name))) is not None]
            if len(found) < len(names):
                continue
            for metric in [m.metric for m in found[0].metrics()]:
                metrics = [m for p in found if (m := p.metric(metric)) is not None]
                interval = over_seeds([m.value for m in metrics], _sample_deviation(metrics, results))
                results.over_seeds.append(
                    SeedRow(names, record.name, metric, interval.value, interval.low, interval.high, len(names))
                )


def _sample_deviation(metrics: Sequence[Metric], results: EvalResults) -> float:
    """Standard deviation of the mean over seeds when the samples are drawn again, the same ones for every seed."""
    mean = np.mean([m.values for m in metrics], axis=0)
    of_mean = Metric("", mean, 0.0, metrics[0].clusters, metrics[0].classes)
    return float(of_mean.resamples(num_resamples=results.num_bootstrap, seed=(results.seed,)).std())


def _metrics(
    figure: Combined, results: EvalResults, predictions: PredictionsOf, model: str
) -> dict[str, Metric] | None:
    own = {set_name: p for (name, set_name), p in predictions.items() if name == model}
    return metrics_for(figure, own, [s.name for s in results.sets if not s.partial])


def _record(figure: Combined, suite: Suite) -> SetRecord:
    return SetRecord(
        name=figure.name,
        title=figure.title,
        phrase=figure.title.lower(),
        about=figure.about,
        kind=AVERAGE,
        variant=f"{suite.name}/{figure.name}",
        n=0,
        metric=figure.metric,
    )


def _row(figure: Combined, results: EvalResults, model: ModelRecord, metrics: Mapping[str, Metric]) -> ResultRow:
    interval = figure.interval(metrics, num_resamples=results.num_bootstrap, seed=results.seed)
    own = [r for r in results.results if r.model == model.name and r.set in figure.weights]
    comparable = not any(s.not_comparable for s in results.sets if s.name in figure.weights)
    published = published_value(model.preset, figure.name, AVERAGE, own[0].resize) if comparable else None
    return ResultRow(
        model=model.name,
        fingerprint=model.fingerprint,
        set=figure.name,
        variant=f"{results.suite}/{figure.name}",
        kind=AVERAGE,
        metric=AVERAGE,
        value=interval.value,
        low=interval.low,
        high=interval.high,
        chance=figure.chance(metrics),
        n=sum(len(m.values) for m in metrics.values()),
        num_classes=None,
        seed=results.seed,
        seconds=round(sum({r.set: r.seconds for r in own}.values()), 3),
        precision=own[0].precision,
        resize=own[0].resize,
        decode=own[0].decode,
        published=published.value if published else None,
        published_source=published.source if published else "",
    )
