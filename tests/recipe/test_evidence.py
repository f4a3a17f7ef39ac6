"""The script behind docs/evidence.md: its design resolves, its figures are right, its page is what its values give."""

from __future__ import annotations

import json
from pathlib import Path

import budget
import design
import effects
import numpy as np
import page
import pytest
from scipy import stats

from evatool.recipe.load import load_recipe

ROOT = Path(__file__).parents[2]
RESULTS = json.loads((ROOT / "docs" / "evidence" / "results.json").read_text(encoding="utf-8"))
EVERY = [*design.RUNS, *design.SEARCH]


# -------------------------------------------------------------------------------------------------------- the figures


def test_a_mean_has_student_s_interval() -> None:
    found = effects.mean({0: 1.0, 1: 2.0, 2: 6.0})
    low, high = stats.t.interval(0.95, 2, loc=3.0, scale=stats.sem([1.0, 2.0, 6.0]))
    assert (found.value, found.low, found.high) == pytest.approx((3.0, low, high))
    assert effects.mean({7: 4.0}) == effects.Estimate(4.0, None, None, 1)


def test_differences_are_paired_by_seed() -> None:
    before, after = {0: 1.0, 1: 5.0, 2: 9.0}, {2: 10.5, 0: 2.0, 1: 6.0, 9: 100.0}
    found = effects.difference(before, after)
    low, high = stats.t.interval(0.95, 2, loc=3.5 / 3, scale=stats.sem([1.0, 1.0, 1.5]))
    assert (found.value, found.low, found.high) == pytest.approx((3.5 / 3, low, high))
    assert found.verdict == "gain"
    assert effects.difference(after, before).verdict == "loss"


def test_effects_of_a_factorial_are_those_that_were_put_in() -> None:
    """Values made of known effects; errors against ordinary least squares."""
    rng = np.random.default_rng(0)
    arms, design_rows, observed = {}, [], []
    for levels in design.FACTORIAL:
        mim, drop, lamb = levels
        arms[levels] = {}
        for seed in range(4):
            value = 10 + 3 * mim - 2 * drop + 4 * (drop and lamb) + seed + rng.normal()
            arms[levels][seed] = value
            signs = [1.0 if on else -1.0 for on in levels]
            products = [signs[0] * signs[1], signs[0] * signs[2], signs[1] * signs[2], signs[0] * signs[1] * signs[2]]
            design_rows.append([*np.eye(4)[seed], *(s / 2 for s in signs), *(p / 2 for p in products)])
            observed.append(value)
    x, y = np.array(design_rows), np.array(observed)
    fitted, *_ = np.linalg.lstsq(x, y, rcond=None)
    freedom = len(y) - x.shape[1]
    variance = ((y - x @ fitted) ** 2).sum() / freedom
    errors = np.sqrt(variance * np.diag(np.linalg.inv(x.T @ x)))
    found = effects.factorial_effects(arms, design.FACTORS)
    m, d, n = design.FACTORS
    names = [m, d, n, f"{m} x {d}", f"{m} x {n}", f"{d} x {n}", f"{m} x {d} x {n}"]
    assert set(found) == set(names)
    for place, name in enumerate(names, start=4):
        reach = stats.t.ppf(0.975, freedom) * errors[place]
        wanted = (fitted[place], fitted[place] - reach, fitted[place] + reach)
        assert (found[name].value, found[name].low, found[name].high) == pytest.approx(wanted), name
    assert found[m].value == pytest.approx(3, abs=1)
    assert found[f"{d} x {n}"].value == pytest.approx(2, abs=1)  # half of 4: the mean of two differences


def test_a_factorial_with_a_hole_is_refused() -> None:
    whole = {levels: {0: 1.0, 1: 2.0} for levels in design.FACTORIAL}
    with pytest.raises(ValueError, match="missing"):
        effects.factorial_effects({k: v for k, v in whole.items() if any(k)}, design.FACTORS)
    with pytest.raises(ValueError, match="same seeds"):
        effects.factorial_effects({**whole, (True, True, True): {0: 1.0}}, design.FACTORS)


# --------------------------------------------------------------------------------------------------------- the design


@pytest.mark.parametrize("run", EVERY, ids=[run.name for run in EVERY])
def test_every_run_resolves_and_keeps_to_the_budget(run: design.Run) -> None:
    samples = budget.samples_of(run)
    recipe = load_recipe(run.recipe, overrides=budget.settings_of(run, samples, seed=3)).recipe
    assert recipe.train.seed == 3
    assert recipe.train.samples_seen == samples
    assert samples % recipe.train.global_batch_size == 0
    spent = budget.paid_before(run) + budget.flops(run)
    a_batch = recipe.train.global_batch_size * budget.cost(run, samples).a_sample
    assert run.share * budget.budget() - a_batch < spent <= run.share * budget.budget()


def test_comparisons_are_of_runs_that_exist() -> None:
    names = {run.name for run in design.RUNS}
    assert len(names) == len(design.RUNS)
    for question in design.QUESTIONS:
        assert {*question.arms, *(name for pair in question.pairs for name in pair)} <= names
    for run in design.RUNS:
        assert {run.after, run.teacher} - {None, design.EFFICIENTNET} <= names


# ----------------------------------------------------------------------------------------------------------- the page


def test_the_page_is_what_the_stored_values_give() -> None:
    stored = (ROOT / "docs" / "evidence.md").read_text(encoding="utf-8")
    assert stored == page.render(RESULTS), "run `python docs/evidence/run.py --page`"


def test_every_planned_run_is_stored_and_kept_to_its_minute() -> None:
    for run in EVERY:
        assert {int(seed) for seed in RESULTS[run.name]} == set(run.seeds), run.name
    seconds = [record["cpu_sec"] for records in RESULTS.values() for record in records.values()]
    evaluated = [record["eval_cpu_sec"] for records in RESULTS.values() for record in records.values()]
    assert max(seconds) <= 2 * 60
    assert sum(seconds) + sum(evaluated) <= 2 * 3600


def test_a_figure_of_the_page_by_hand() -> None:
    """The baseline's score in the page's table, computed here from the stored values."""
    runs = RESULTS[design.BASELINE]
    scores = []
    for seed in sorted(runs):
        stored = runs[seed]["values"]
        four = [stored[name]["top5"][0] for name in ("new-artist", "new-shading", "black-and-white", "never-seen")]
        scores.append(100 * (sum(four) + stored["retrieval"]["mean_recall"][0]) / 5)
    low, high = stats.t.interval(0.95, len(scores) - 1, loc=np.mean(scores), scale=stats.sem(scores))
    assert f"| `{design.BASELINE}` | {np.mean(scores):.2f} [{low:.2f}, {high:.2f}] |" in page.render(RESULTS)


def test_only_recipes_go_into_the_wheel_with_the_recipes() -> None:
    """The folder is packed whole as `evatool/_recipes`; the code of the evidence is in docs/evidence."""
    assert {
        path.suffix for path in (ROOT / "recipes").rglob("*") if path.is_file() and "__pycache__" not in str(path)
    } == {".toml"}
