"""What an evaluation leaves behind: results.json, tables, the report; then the failures, if there were any."""

from __future__ import annotations

import logging
from pathlib import Path

from evatool.core.errors import EvatoolError
from evatool.eval.model_differences import add_averages, add_differences, add_seed_rows
from evatool.eval.predictions import ClassificationResult
from evatool.eval.report.class_accuracy import ClassPanel, class_panel, missed_samples
from evatool.eval.report.gallery import MissedImage, missed_image, write_gallery
from evatool.eval.report.page import how_measured, text_table, write_eval_report
from evatool.eval.report.tables import write_csv, write_markdown
from evatool.eval.results import EvalResults, compared_pairs, main_metrics, read_results, write_results
from evatool.runs.result import Result
from evatool.stages.evaluating.measure import Evaluation, open_set

log = logging.getLogger(__name__)

_MISSES_SHOWN = 8  # pictures a set


def write_outputs(evaluation: Evaluation) -> Result:
    """Everything that follows from the answers. Every rank may call it; rank 0 writes.

    Raises: EvatoolError naming the sets and models that failed, after everything else was written.
    """
    results, folder = evaluation.results, evaluation.run_dir
    order = {entry.name: i for i, entry in enumerate(evaluation.chosen)}
    results.sets.sort(key=lambda s: order[s.name])
    add_averages(results, evaluation.answers, evaluation.suite)
    add_differences(results, evaluation.answers, evaluation.suite, compared_pairs([m.name for m in results.models]))
    add_seed_rows(results, evaluation.answers)
    outputs = {"results": folder / "results.json", "report": folder / "report.html"}
    if results.results and evaluation.world.is_main:
        outputs |= _write(evaluation, outputs)
    for failure in results.failures:
        log.debug("failed: %s", failure)
    if results.failures:
        _raise_failures(results, outputs)
    log.info("measured with %s", how_measured(results))
    main = {(s.name, metric) for s in results.sets for metric in main_metrics(s.kind)}
    return Result(
        stage="eval",
        run_dir=folder,
        outputs=outputs,
        metrics={
            f"eval/{row.model}/{row.set}/{row.metric}": round(row.value, 6)
            for row in results.results
            if (row.set, row.metric) in main
        },
        table=text_table(results),
    )


def _write(evaluation: Evaluation, outputs: dict[str, Path]) -> dict[str, Path]:
    results, folder = evaluation.results, evaluation.run_dir
    write_results(outputs["results"], results)
    results = read_results(outputs["results"])
    more = {"csv": folder / "results.csv", "markdown": folder / "results.md", "predictions": folder / "predictions"}
    write_csv(more["csv"], results)
    write_markdown(more["markdown"], results)
    last = results.models[-1].name
    galleries = [g for (model, _), g in evaluation.galleries.items() if model == last]
    if galleries:
        more["gallery"] = folder / "gallery.json"
        write_gallery(more["gallery"], galleries[0])
    panels, missed = _looked_into(evaluation, last)
    write_eval_report(outputs["report"], results, galleries=galleries, classes=panels, missed=missed)
    return more


def _looked_into(evaluation: Evaluation, model: str) -> tuple[list[ClassPanel], dict[str, list[MissedImage]]]:
    """Classes, confusions and pictures of the last model, for sets where there is something to see."""
    panels, missed = [], {}
    for entry in evaluation.chosen:
        answers = evaluation.answers.get((model, entry.name))
        if not isinstance(answers, ClassificationResult):
            continue
        opened = open_set(evaluation, entry, evaluation.results.models[-1].image_size)
        panel = class_panel(entry.name, entry.title, answers, opened.classnames)
        if panel is not None:
            panels.append(panel)
        chosen = missed_samples(answers, _MISSES_SHOWN)
        if chosen:
            missed[entry.name] = [
                missed_image(
                    opened.image(i),
                    opened.samples.keys[i],
                    opened.classnames[answers.labels[i]],
                    opened.classnames[answers.top[i, 0]],
                )
                for i in chosen
            ]
    return panels, missed


def _raise_failures(results: EvalResults, outputs: dict[str, Path]) -> None:
    """Exit code 1 with every failed set named, and where the results of the others are."""
    lines = [f"{f.model}{f' on {f.set}' if f.set else ''}: " + f.message.replace("\n", "; ") for f in results.failures]
    names = list(dict.fromkeys(f.set or f"model {f.model}" for f in results.failures))
    raise EvatoolError(
        f"{len(results.failures)} evaluations failed ({', '.join(names)})\n" + "\n".join(f"  {line}" for line in lines),
        where=f"results of the others: {outputs['report']}" if results.results else None,
        fix="mend what is named above and run again with --resume; or leave sets out with eval.sets in a new --run-dir",
    )
