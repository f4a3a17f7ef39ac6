"""The files of an evaluation: results.json, tables, the report; then the failures, if there were any."""

from __future__ import annotations

import logging
from pathlib import Path

from evatool.core.errors import EvatoolError
from evatool.eval.model_differences import add_averages, add_differences, add_seed_rows
from evatool.eval.report.gallery import write_gallery
from evatool.eval.report.page import how_measured, text_table, write_eval_report
from evatool.eval.report.tables import write_csv, write_markdown
from evatool.eval.report.wording import main_rows
from evatool.eval.results import EvalResults, compared_pairs, read_results, write_results
from evatool.eval.tasks.base import Examples
from evatool.eval.tasks.build import task_of
from evatool.runs.result import Result
from evatool.stages.evaluating.suite_evaluation import SuiteEvaluation

log = logging.getLogger(__name__)


def write_outputs(evaluation: SuiteEvaluation) -> Result:
    """Everything that follows from the predictions. Every rank may call it; rank 0 writes.

    Raises: EvatoolError naming the sets and models that failed, after everything else was written;
        RunFolderTakenError where another run has the folder.
    """
    results, folder = evaluation.results, evaluation.run_dir
    order = {entry.name: i for i, entry in enumerate(evaluation.chosen)}
    results.sets.sort(key=lambda s: order[s.name])
    add_averages(results, evaluation.predictions, evaluation.suite)
    add_differences(results, evaluation.predictions, evaluation.suite, compared_pairs([m.name for m in results.models]))
    add_seed_rows(results, evaluation.predictions)
    outputs = {"results": folder / "results.json", "report": folder / "report.html"}
    if results.results and evaluation.world.is_main:
        outputs |= _write(evaluation, outputs)
    for failure in results.failures:
        log.debug("failed: %s", failure)
    if results.failures:
        _raise_failures(results, outputs)
    log.info("measured with %s", how_measured(results))
    return Result(
        stage="eval",
        run_dir=folder,
        outputs=outputs,
        metrics={f"eval/{row.model}/{row.set}/{row.metric}": round(row.value, 6) for row in main_rows(results)},
        table=text_table(results),
    )


def _write(evaluation: SuiteEvaluation, outputs: dict[str, Path]) -> dict[str, Path]:
    results, folder = evaluation.results, evaluation.run_dir
    evaluation.check_owner()
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
    write_eval_report(outputs["report"], results, galleries=galleries, examples=_examples(evaluation, last))
    return more


def _examples(evaluation: SuiteEvaluation, model: str) -> dict[str, Examples]:
    """By set, what the report shows of the last model's predictions besides numbers."""
    found = {}
    for entry in evaluation.chosen:
        predictions = evaluation.predictions.get((model, entry.name))
        if predictions is not None:
            opened = evaluation.open(entry, evaluation.transforms[model])
            found[entry.name] = task_of(entry.kind).examples(predictions, opened, entry.title)
    return found


def _raise_failures(results: EvalResults, outputs: dict[str, Path]) -> None:
    """Exit code 1 with every failed set named, and where the results of the others are."""
    lines = [f"{f.model}{f' on {f.set}' if f.set else ''}: " + f.message.replace("\n", "; ") for f in results.failures]
    names = list(dict.fromkeys(f.set or f"model {f.model}" for f in results.failures))
    raise EvatoolError(
        f"{len(results.failures)} evaluations failed ({', '.join(names)})\n" + "\n".join(f"  {line}" for line in lines),
        where=f"results of the others: {outputs['report']}" if results.results else None,
        fix="mend what is named above and run again with --resume; or leave sets out with eval.sets in a new --run-dir",
    )
