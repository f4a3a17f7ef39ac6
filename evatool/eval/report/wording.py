"""Numbers in words: what is said of an interval, and when a difference is called a gain. No torch."""

from __future__ import annotations

from collections.abc import Sequence

from evatool.eval.intervals import Interval
from evatool.eval.results import AVERAGE, DifferenceRow, EvalResults, ResultRow, SetRecord
from evatool.eval.task_wording import TaskWording
from evatool.eval.tasks.build import all_tasks, find_task

MINUS = "\N{MINUS SIGN}"
NO_BREAK = "\N{NO-BREAK SPACE}"

AVERAGES = TaskWording(main_metrics=(AVERAGE,), labels={AVERAGE: "average"}, unnamed=(AVERAGE,))
"""Figures over several sets, which no task makes."""


def wording_of(results: EvalResults, kind: str) -> TaskWording:
    """The words for sets and rows of a kind; for one that no task is known of, its first metric by its own name."""
    if kind == AVERAGE:
        return AVERAGES
    if kind in results.own_wording:
        return results.own_wording[kind]
    task = find_task(kind)
    if task is not None:
        return task.wording
    return TaskWording(main_metrics=tuple(row.metric for row in results.results if row.kind == kind)[:1])


def main_metrics(results: EvalResults, kind: str) -> tuple[str, ...]:
    """The metrics that charts and sentences use for a kind of set, the most telling first."""
    return wording_of(results, kind).main_metrics


def main_rows(results: EvalResults) -> list[ResultRow]:
    """The rows of every set's main metrics, in the order they were measured."""
    return [row for row in results.results if row.metric in main_metrics(results, row.kind)]


def label(metric: str, results: EvalResults) -> str:
    """A metric in words; its own name where no kind of evaluation words it."""
    every = (AVERAGES, *results.own_wording.values(), *(task.wording for task in all_tasks()))
    return next((words for wording in every if (words := wording.label(metric)) is not None), metric)


def signed_points(difference: float) -> str:
    """A difference without bounds, in percentage points: "+1.8"."""
    return _signed(difference)


def percent(share: float, digits: int | None = None) -> str:
    """0.0741 -> "7.4 %"; below half a percent with two digits."""
    return f"{_number(share, digits)}{NO_BREAK}%"


def bounds(interval: Interval) -> str:
    """The bounds in percent, with as many digits as the value: "[5.6, 9.3]"."""
    digits = _digits(interval.value)
    return f"[{_number(interval.low, digits)},{NO_BREAK}{_number(interval.high, digits)}]"


def points(difference: Interval) -> str:
    """A difference with its bounds, in percentage points: "+1.8 [0.3, 3.4]"."""
    low, high = _signed(difference.low, False), _signed(difference.high, False)
    return f"{_signed(difference.value)}{NO_BREAK}[{low},{NO_BREAK}{high}]"


def verdict(difference: Interval) -> str:
    """`gain` or `loss` only if the interval leaves out 0, else `no clear difference`."""
    if not difference.excludes_zero:
        return "no clear difference"
    return "gain" if difference.value > 0 else "loss"


def duration(seconds: float) -> str:
    """A wall time: "48 s", "7 min 05 s", "3 h 12 min"."""
    whole = round(seconds)
    if whole < 60:
        return f"{seconds:.1f} s" if seconds < 9.95 else f"{whole} s"
    if whole < 3600:
        return f"{whole // 60} min {whole % 60:02d} s"
    return f"{whole // 3600} h {whole % 3600 // 60:02d} min"


def times_chance(value: float, chance: float) -> str:
    """ "54 times chance"; one digit below ten."""
    ratio = value / chance
    return f"{ratio:.0f} times chance" if ratio >= 10 else f"{ratio:.1f} times chance"


def set_facts(record: SetRecord, chance: float | None) -> str:
    """ "729 pictures · 729 classes · chance 0.14 %", and the share of the largest class where that is much more."""
    if record.is_average:
        return f"chance {percent(chance)}" if chance else ""
    facts = [_counted(record.n, "picture", "pictures")]
    if record.partial:
        facts.insert(0, f"only a part: {record.partial}")
    if record.num_classes:
        facts.append(_counted(record.num_classes, "class", "classes"))
    if chance is not None:
        facts.append(f"chance {percent(chance)}")
    if record.largest_class_share and chance and record.largest_class_share > 1.5 * chance and record.n > 0:
        largest = record.largest_class_share
        # with one picture a class the largest class is chance itself
        if largest * record.n > 2:
            facts.append(f"always naming the largest class {percent(largest)}")
    return " · ".join(facts)


def headline(results: EvalResults, model: str, title: str) -> str | None:
    """A sentence on what the model reaches on the set that is named first; None where that was not measured."""
    record = results.headline_set()
    row = record and results.row(model, record.name, main_metrics(results, record.kind)[0])
    if not record or not row:
        return None
    what = wording_of(results, record.kind).headline.format(hits=round(row.value * row.n), n=f"{row.n:,}")
    sentence = f"On {record.phrase}, the model “{title}” {what}: {percent(row.value)} {bounds(row.interval)}"
    if row.low > row.chance:
        return f"{sentence}, {times_chance(row.value, row.chance)} ({percent(row.chance)})."
    return f"{sentence}; that cannot be told from chance ({percent(row.chance)})."


def step_sentences(results: EvalResults, before: str, after: str) -> list[str]:
    """Sentences on what `after` gained and lost against `before`, one a verdict; an interval with 0 is never a gain."""
    grouped: dict[str, list[str]] = {"gain": [], "loss": [], "no clear difference": []}
    for record, row in compared_rows(results, before, after):
        grouped[verdict(row.interval)].append(f"{_subject(results, record, row.metric)} {points(row.interval)}")
    openings = {
        "gain": "Gained, in points: ",
        "loss": "Lost, in points: ",
        "no clear difference": "No clear difference: ",
    }
    return [f"{openings[kind]}{_joined(parts)}." for kind, parts in grouped.items() if parts]


def comparison_sentences(results: EvalResults) -> list[str]:
    """One sentence a pair of models on the headline figure: "A is better than B by 1.2 [0.8, 1.6] points on ..."."""
    averages = [s for s in results.sets if s.is_average]
    record = averages[0] if averages else results.headline_set()
    if record is None:
        return []
    metric = main_metrics(results, record.kind)[0]
    sentences = []
    for row in (d for d in results.differences if (d.set, d.metric) == (record.name, metric)):
        where = f"on the {record.phrase}" if record.is_average else f"in {label(metric, results)} on {record.phrase}"
        low, high = sorted((row.low, row.high), key=abs)
        amount = f"{_number(abs(row.value))} [{_number(abs(low))}, {_number(abs(high))}] points {where}"
        if row.interval.excludes_zero:
            sentences.append(f"{row.after} is {'better' if row.value > 0 else 'worse'} than {row.before} by {amount}.")
        else:
            sentences.append(
                f"{row.after} and {row.before} cannot be told apart {where}: {points(row.interval)} points."
            )
    return sentences


def compared_rows(results: EvalResults, before: str, after: str) -> list[tuple[SetRecord, DifferenceRow]]:
    """The differences in each set's main metrics, in the suite's order."""
    rows = [
        (s, results.difference(before, after, s.name, m)) for s in results.sets for m in main_metrics(results, s.kind)
    ]
    return [(record, row) for record, row in rows if row is not None]


def set_title(results: EvalResults, record: SetRecord, metric: str) -> str:
    """The set's title, with the metric where it does not go without saying."""
    unnamed = wording_of(results, record.kind).unnamed
    return record.title if metric in unnamed else f"{record.title}, {label(metric, results)}"


def caveats(results: EvalResults, comparisons: int) -> list[str]:
    """Notes on what the intervals cover and what they do not."""
    notes = [
        f"Brackets are {results.level:.0%} intervals from {results.num_bootstrap:,} seeded resamples of the pictures; "
        "differences are paired on the same pictures. They do not cover another training seed."
    ]
    if comparisons:
        by_luck = comparisons * (1 - results.level)
        notes.append(
            f"A difference is called a gain or a loss only if its interval leaves out 0. Of {comparisons} comparisons "
            f"about {by_luck:.1f} would do so by luck alone."
        )
    return notes


def _counted(number: int, one: str, many: str) -> str:
    return f"{number:,} {one if number == 1 else many}"


def _joined(parts: Sequence[str]) -> str:
    return parts[0] if len(parts) == 1 else f"{', '.join(parts[:-1])} and {parts[-1]}"


def _subject(results: EvalResults, record: SetRecord, metric: str) -> str:
    return record.phrase if metric in wording_of(results, record.kind).unnamed else label(metric, results)


def _digits(share: float) -> int:
    return 2 if 0 < abs(share) < 0.005 else 1


def _number(share: float, digits: int | None = None) -> str:
    return f"{100 * share:.{_digits(share) if digits is None else digits}f}"


def _signed(share: float, plus: bool = True) -> str:
    text = f"{abs(100 * share):.1f}"
    if float(text) == 0:
        # a bound that rounds to 0 keeps the side it lies on, so that the text never contradicts the verdict
        return text if share == 0 else f"{MINUS if share < 0 else '+' if plus else ''}{abs(100 * share):.2f}"
    return f"{MINUS if share < 0 else '+' if plus else ''}{text}"
