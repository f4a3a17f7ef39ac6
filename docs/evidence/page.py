"""docs/evidence.md and its pictures, from the runs' values alone."""

from __future__ import annotations

from collections.abc import Iterable, Mapping
from pathlib import Path
from typing import Any

from charts import draw_effects, draw_lines
from design import (
    BASELINE,
    BUDGET_SAMPLES,
    FACTORIAL,
    FACTORS,
    FINE,
    LOSS_BATCHES,
    PATCH_METRICS,
    QUESTIONS,
    RUNS,
    SEARCH,
    SHOWN,
    TEACHER,
    Question,
    Run,
    loss_name,
)
from effects import Estimate, Values, difference, factorial_effects, mean

DOCS = Path(__file__).resolve().parents[1]
PICTURES = "evidence"

Results = Mapping[str, Mapping[str, Any]]
"""Run name -> seed as text -> what run.py recorded."""


def write_page(results: Results, docs: Path = DOCS) -> list[Path]:
    """Write the page and its pictures; returns what was written."""
    folder = docs / PICTURES
    folder.mkdir(parents=True, exist_ok=True)
    page = docs / "evidence.md"
    page.write_text(render(results), encoding="utf-8")
    by_batch = {
        loss: {batch: mean(values(results, loss_name(loss, batch))) for batch in LOSS_BATCHES}
        for loss in ("infonce", "sigmoid")
    }
    return [
        page,
        draw_effects(main_effects(results), folder / "effects.png"),
        draw_lines(by_batch, folder / "batches.png", x="batch", y="score, per cent"),
        draw_effects(_named_differences(results), folder / "differences.png", title="Difference of the score, points"),
    ]


# ------------------------------------------------------------------------------------------------------------ figures


def figure(record: Mapping[str, Any], set_name: str, metric: str) -> float:
    """One value of a run, in per cent; `score` is the mean over `FINE`."""
    if set_name == "score":
        return sum(figure(record, *fine) for fine in FINE.items()) / len(FINE)
    return 100 * float(record["values"][set_name][metric][0])


def values(results: Results, run: str, set_name: str = "score", metric: str = "") -> Values:
    """The figure of each of the run's seeds."""
    return {int(seed): figure(record, set_name, metric) for seed, record in results[run].items()}


def chance(results: Results, set_name: str, metric: str) -> float:
    """What a guess scores, in per cent."""
    record = next(iter(results[BASELINE].values()))
    return 100 * float(record["values"][set_name][metric][1])


def main_effects(results: Results, set_name: str = "score", metric: str = "") -> dict[str, Estimate]:
    """The factorial's effects on a figure."""
    arms = {levels: values(results, run.name, set_name, metric) for levels, run in FACTORIAL.items()}
    return factorial_effects(arms, FACTORS)


def all_differences(results: Results) -> dict[str, list[tuple[str, str, Estimate]]]:
    """Question title -> (before, after, score's difference), of the pairs whose runs are there."""
    return {
        question.title: [
            (before, after, difference(values(results, before), values(results, after)))
            for before, after in question.pairs
            if before in results and after in results
        ]
        for question in QUESTIONS
    }


def _named_differences(results: Results) -> dict[str, Estimate]:
    found = (pair for pairs in all_differences(results).values() for pair in pairs)
    return {f"{after}\nless {before}": estimate for before, after, estimate in found}


# --------------------------------------------------------------------------------------------------------------- words


def render(results: Results) -> str:
    """The page's text."""
    parts = [_head(results), _in_short(results)]
    parts += [_section(number, question, results) for number, question in enumerate(QUESTIONS, start=1)]
    parts += [_every_set(results), _costs(results), _search(results)]
    return "\n\n".join(part.strip("\n") for part in parts) + "\n"


def _head(results: Results) -> str:
    seeds = len(values(results, BASELINE))
    trained = [(run, r) for run in (*RUNS, *SEARCH) for r in results.get(run.name, {}).values()]
    total = sum(r["cpu_sec"] + r["eval_cpu_sec"] for _, r in trained)
    return f"""
# Evidence

What the parts of the pipeline bring, at equal training cost, in {len(trained)} training runs of tiny models on the
bundled drawings. This page is made from the runs' own files; nothing on it is written by hand but the explanations.

    make evidence      # the runs (a finished one is not repeated), then this page

The design, [docs/evidence/design.py](evidence/design.py), was committed before the arms were run, its
learning rates after a search on a seed that no arm uses; five seeds were planned, and the time allowed four.
All values are in [docs/evidence/results.json](evidence/results.json). The runs took
{total / 60:.0f} minutes of one CPU core, training and evaluation.

**Models this small say little about large ones.** They see {BUDGET_SAMPLES:,} pictures where EVA-CLIP-18B sees
6 billion; a gain or a loss here is a hint, and "no difference" means that {seeds} seeds did not show one.

- **Cost**: every arm may spend the floating-point operations of {BUDGET_SAMPLES:,} samples of the baseline: three
  forward passes of what learns and one of a frozen teacher, by the formulas of `evatool plan`, a caption at its whole
  context. A MIM stage is paid for by the CLIP stage after it. An arm that is cheaper a sample sees more samples. Not
  counted: the loss itself, optimiser, data, evaluation, and the given teacher's training.
- **Score**: the mean of top-5 over {_listed(set(FINE) - {"retrieval"})}
  and of the mean recall of `retrieval`, in per cent. The coarse sets are shown but not counted: training captions name
  no groups.
- **Intervals**: 95 %, Student's t over {seeds} seeds; differences are paired by seed. They do not cover another choice
  of pictures. A *gain* or *loss* is one whose interval leaves out 0; of {_num_pairs()} comparisons about
  {max(1, round(_num_pairs() / 20))} would do so by luck. On single sets a handful of pictures decides, and seeds that
  agree by chance make an interval too short: the score is what counts.
"""


def _in_short(results: Results) -> str:
    scores = {run.name: mean(values(results, run.name)).value for run in RUNS if run.name in results and is_arm(run)}
    best = max(scores, key=lambda name: scores[name])
    lines = [
        "## In short",
        "",
        f"The baseline scores {scores[BASELINE]:.1f}, the best arm, `{best}`, {scores[best]:.1f}. For scale: the given "
        f"teacher, which is the baseline trained {TEACHER.share:g} times as long, scores "
        f"{mean(values(results, TEACHER.name)).value:.1f}, so that no arm replaces longer training here."
        if scores[best] < mean(values(results, TEACHER.name)).value
        else f"The baseline scores {scores[BASELINE]:.1f}, the best arm, `{best}`, {scores[best]:.1f}.",
        "",
    ]
    for effect, estimate in main_effects(results).items():
        if effect in FACTORS:
            lines.append(f"- {effect}, over both levels of the other two factors: {_judged(estimate)}.")
        elif estimate.verdict != "no difference":
            lines.append(f"- {effect}: they do not add up; the interaction is {_signed(estimate).strip('*')} points.")
    told: set[tuple[str, str]] = set()
    for question in QUESTIONS[1:]:
        for before, after, estimate in all_differences(results)[question.title]:
            if (before, after) in told:  # of an earlier section
                continue
            told.add((before, after))
            lines.append(f"- {_about(after)}, against {_about(before)}: {_judged(estimate)}.")
    for question in QUESTIONS:
        for metric in PATCH_METRICS if question.patches else ():
            lines.append(f"- Single patches, `{metric}`: {_patch_differences(question, metric, results)}")
    lines += ["", f"![All differences of the score, with their intervals]({PICTURES}/differences.png)"]
    return "\n".join(lines)


def _patch_differences(question: Question, metric: str, results: Results) -> str:
    parts = []
    for before, after in question.pairs:
        found = [values(results, name, "scenes", metric) for name in (before, after)]
        parts.append(f"{_about(after)}, against {_about(before)}, {_judged(difference(*found))}")
    guess = chance(results, "scenes", metric)
    above = [name for name in question.arms if (mean(values(results, name, "scenes", metric)).low or 0) > guess]
    who = " and ".join(f"`{name}`" for name in above)
    return (
        "; ".join(parts)
        + f". Chance is {guess:.2f}: "
        + (
            f"above it {'is' if len(above) == 1 else 'are'} {who}."
            if above
            else "none of these arms is surely above it."
        )
    )


def _section(number: int, question: Question, results: Results) -> str:
    parts = [f"## {number}. {question.title}", question.asks]
    parts.append(_arms_table(question.arms, results, question.patches))
    if number == 1:
        parts.append(_effects_table(results))
        parts.append(f"![Effects of the three factors on the score]({PICTURES}/effects.png)")
    if number == 3:
        parts.append(f"![Score by loss and batch]({PICTURES}/batches.png)")
    parts.append(_differences_table(question, results))
    return "\n\n".join(parts)


def _arms_table(arms: Iterable[str], results: Results, patches: bool) -> str:
    columns = [("score", "")] + ([("scenes", metric) for metric in PATCH_METRICS] if patches else [])
    heads = ["score", *(f"`{metric}`" for _, metric in columns[1:])]
    rows = [
        [f"`{name}`", _about(name), *(_shown(mean(values(results, name, *column))) for column in columns)]
        for name in arms
        if name in results
    ]
    if patches:
        rows.append(["*chance*", "", "", *(f"{chance(results, *column):.2f}" for column in columns[1:])])
    return _table(["arm", "what it is", *heads], rows)


def _effects_table(results: Results) -> str:
    sets = {"score": "", **SHOWN}
    found = {name: main_effects(results, name, metric) for name, metric in sets.items()}
    effects = list(found["score"])
    rows = [[effect, *(_signed(found[name][effect]) for name in sets)] for effect in effects]
    words = (
        "Main effects and interactions, in points: the mean of the four arms with the factor less the mean of the four "
        "without it; an interaction is half of how much one factor's effect differs between the levels of the other. "
        "The intervals are of all eight arms together, seeds as blocks."
    )
    return words + "\n\n" + _table(["effect on", *sets], rows)


def _differences_table(question: Question, results: Results) -> str:
    sets = {"score": "", **SHOWN}
    if question.patches:
        sets = {"score": ""}
    rows = []
    for before, after in question.pairs:
        if before not in results or after not in results:
            continue
        cells = [
            _signed(difference(values(results, before, name, metric), values(results, after, name, metric)))
            for name, metric in sets.items()
        ]
        if question.patches:
            cells += [
                _signed(difference(values(results, before, "scenes", m), values(results, after, "scenes", m)))
                for m in PATCH_METRICS
            ]
        rows.append([f"`{after}` less `{before}`", *cells])
    heads = [*sets, *([f"`{m}`" for m in PATCH_METRICS] if question.patches else [])]
    return "Differences in points, paired by seed.\n\n" + _table(["difference", *heads], rows)


def _every_set(results: Results) -> str:
    heads = [f"{name} ({metric.replace('_', ' ')})" for name, metric in SHOWN.items()]
    rows = [["*chance*", "", *(f"{chance(results, name, metric):.2f}" for name, metric in SHOWN.items())]]
    for run in RUNS:
        if run.name in results and _is_evaluated(run):
            cells = [_shown(mean(values(results, run.name, name, metric))) for name, metric in SHOWN.items()]
            rows.append([f"`{run.name}`", _shown(mean(values(results, run.name))), *cells])
    return "## Every arm on every set\n\n" + _table(["arm", "score", *heads], rows)


def _costs(results: Results) -> str:
    every = [(run.name, record) for run in (*RUNS, *SEARCH) for record in results.get(run.name, {}).values()]
    most_cpu = max(every, key=lambda pair: pair[1]["cpu_sec"])
    most_wall = max(every, key=lambda pair: pair[1]["wall_sec"])
    cpu = sum(record["cpu_sec"] for _, record in every), sum(record["eval_cpu_sec"] for _, record in every)
    wall = sum(record["wall_sec"] + record["eval_wall_sec"] for _, record in every)
    rows = [_cost_row(run, list(results[run.name].values())) for run in RUNS if results.get(run.name)]
    heads = ["run", "recipe", "settings over it", "seeds", "samples", "TFLOP, MIM stage included", "most CPU s", "code"]
    return f"""## The runs

One thread, on a machine whose two cores other work shared, so wall times are upper bounds. A run may take a minute of
two cores, 120 CPU seconds; most CPU seconds of a training run: {most_cpu[1]["cpu_sec"]:.0f} (`{most_cpu[0]}`); most
wall seconds: {most_wall[1]["wall_sec"]:.0f} (`{most_wall[0]}`). Sums over all runs, the search included: {cpu[0]:,.0f}
CPU seconds of training and {cpu[1]:,.0f} of evaluation, which is {sum(cpu) / 120:.0f} minutes of two cores;
{wall / 60:.0f} minutes of wall time.

{_table(heads, rows)}"""


def _cost_row(run: Run, records: list[Mapping[str, Any]]) -> list[str]:
    return [
        f"`{run.name}`",
        f"`{run.recipe}`",
        ", ".join([*(f"`{setting}`" for setting in run.sets), *_store(run)]) or "none",
        str(len(records)),
        f"{records[0]['samples']:,}",
        f"{max(record['flops_with_mim'] for record in records) / 1e12:.2f}",
        f"{max(record['cpu_sec'] for record in records):.0f}",
        ", ".join(f"`{commit}`" for commit in sorted({record["commit"] for record in records})),
    ]


def _store(run: Run) -> list[str]:
    return [f"{run.views} {'view' if run.views == 1 else 'views'} of each picture stored"] if run.views else []


def _search(results: Results) -> str:
    rows = [
        [run.about, f"{figure(record, 'score', ''):.2f}"]
        for run in SEARCH
        for record in results.get(run.name, {}).values()
    ]
    return (
        f"## How the learning rates were chosen\n\nOn seed {SEARCH[0].seeds[0]}, which no arm uses, from scratch, by "
        "the score. Other batches take the root of the batches' ratio; the MIM stage takes EVA-02's.\n\n"
        + _table(["run", "score"], rows)
    )


# -------------------------------------------------------------------------------------------------------------- pieces


def _is_evaluated(run: Run) -> bool:
    return not run.recipe.startswith("evidence/mim")


def is_arm(run: Run) -> bool:
    """Whether the run costs the budget and is compared."""
    return _is_evaluated(run) and run is not TEACHER


def _about(name: str) -> str:
    return "the baseline" if name == BASELINE else next(run.about for run in RUNS if run.name == name)


def _num_pairs() -> int:
    return sum(len(question.pairs) for question in QUESTIONS)


def _listed(names: Iterable[str]) -> str:
    *first, last = (f"`{name}`" for name in sorted(names))
    return f"{', '.join(first)} and {last}"


def _shown(estimate: Estimate) -> str:
    if estimate.low is None:
        return f"{estimate.value:.2f}"
    return f"{estimate.value:.2f} [{estimate.low:.2f}, {estimate.high:.2f}]"


def _signed(estimate: Estimate) -> str:
    """A difference, in bold where its interval leaves out 0."""
    if estimate.low is None:
        return f"{estimate.value:+.2f}"
    text = f"{estimate.value:+.2f} [{estimate.low:+.2f}, {estimate.high:+.2f}]"
    return text if estimate.verdict == "no difference" else f"**{text}**"


def _judged(estimate: Estimate) -> str:
    if estimate.verdict == "no difference":
        return f"no difference that {estimate.num_seeds} seeds show, {_signed(estimate)} points"
    return f"a {estimate.verdict} of {_signed(estimate).strip('*')} points"


def _table(heads: Iterable[str], rows: Iterable[Iterable[str]]) -> str:
    lines = ["| " + " | ".join(heads) + " |"]
    lines.append("|" + " --- |" * (lines[0].count("|") - 1))
    return "\n".join([*lines, *("| " + " | ".join(row) + " |" for row in rows)])
