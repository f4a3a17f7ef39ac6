"""Evaluate models on the sets of a suite: predictions, intervals, paired differences, results.json and report.html."""

from __future__ import annotations

from evatool.distributed.world import joined_world
from evatool.recipe.schema import EvalRecipe
from evatool.runs.result import Result
from evatool.runs.run_dir import RunOptions
from evatool.stages.evaluating.measure import measure_models
from evatool.stages.evaluating.output import write_outputs
from evatool.stages.evaluating.start import check_request, start_evaluation


def run(recipe: EvalRecipe, options: RunOptions) -> Result:
    """Evaluate every model on every set; what fails is named at the end and does not lose the others.

    Every rank of a job calls it: images, prompts and similarities are divided over the ranks, rank 0 writes. Under
    `--resume` a set whose predictions are kept is not evaluated again.

    Raises:
        RecipeError: no such suite or set, or two models share a file name.
        DataError: the folder of the sets is missing or holds none of them.
        EvatoolError: a set or model failed, after the results of the others were written.
    """
    request = check_request(recipe.eval)
    with joined_world() as world:
        evaluation = start_evaluation(recipe, options, request, world)
        measure_models(evaluation)
        return write_outputs(evaluation)
