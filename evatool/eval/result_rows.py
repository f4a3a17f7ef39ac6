"""Kept predictions to rows of `results.json`: every metric with its interval, chance and published value. No torch."""

from __future__ import annotations

from evatool.eval.prediction_store import KeptPredictions
from evatool.eval.published import published_value
from evatool.eval.results import ResultRow


def result_rows(kept: KeptPredictions, *, num_bootstrap: int, seed: int) -> list[ResultRow]:
    """One row for each metric of the predictions, then of their probes.

    Args:
        num_bootstrap, seed: of the resamples behind each interval.
    """
    model, record = kept.model, kept.set
    rows = []
    for metric in kept.predictions.metrics() + (kept.probes.metrics() if kept.probes else []):
        interval = metric.interval(num_resamples=num_bootstrap, seed=seed)
        published = None
        if not record.partial and not record.not_comparable:
            published = published_value(model.preset, record.name, metric.metric, kept.settings["resize"])
        rows.append(
            ResultRow(
                model=model.name,
                fingerprint=model.fingerprint,
                set=record.name,
                variant=record.variant,
                kind=record.kind,
                metric=metric.metric,
                value=interval.value,
                low=interval.low,
                high=interval.high,
                chance=metric.chance,
                n=len(metric.values),
                num_classes=record.num_classes,
                seed=seed,
                seconds=kept.seconds,
                published=published.value if published else None,
                published_source=published.source if published else "",
                **kept.settings,
            )
        )
    return rows
