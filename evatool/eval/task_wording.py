"""The words that reports use for one kind of evaluation. No torch."""

from __future__ import annotations

import re
from collections.abc import Mapping
from dataclasses import dataclass, field


@dataclass(frozen=True)
class TaskWording:
    """How reports speak of a kind of evaluation; plain values, so that they need no model and no torch.

    Attributes:
        main_metrics: metrics that charts and sentences use, the most telling first.
        labels: metric name in files -> words in reports; `#` stands for a whole number in both.
        headline: what a model does on a set of the kind, with `{hits}` and `{n}`: "names {hits} of {n} pictures right".
        unnamed: metrics that go without saying beside a set's title.
    """

    main_metrics: tuple[str, ...] = ()
    labels: Mapping[str, str] = field(default_factory=dict)
    headline: str = "is right on {hits} of {n}"
    unnamed: tuple[str, ...] = ()

    def label(self, metric: str) -> str | None:
        """A metric in words; None where it is not one of this kind's."""
        if metric in self.labels:
            return self.labels[metric]
        numbers = re.findall(r"\d+", metric)
        words = self.labels.get(re.sub(r"\d+", "#", metric))
        for number in numbers if words else ():
            assert words is not None
            words = words.replace("#", number, 1)
        return words
