"""Images and caption rows that cannot be used: counted by cause, named, and refused beyond the recipe's limit."""

from __future__ import annotations

import logging
from dataclasses import dataclass, field

from evatool.core.errors import BadDataLimitError
from evatool.data.bad_limit import count_by_cause, num_allowed

log = logging.getLogger(__name__)

_NAMED = 5  # names a cause in a message; the manifest has all
_ENOUGH = 1000  # bad ones found after which a set beyond its limit is not searched any further


@dataclass
class SkippedFiles:
    """The bad pictures and rows of one source, by cause.

    Args:
        total: pictures and rows there are.
        max_fraction: the recipe's `shards.max_bad_fraction`.
        where: the source, for messages.
    """

    total: int
    max_fraction: float
    where: str
    by_cause: dict[str, list[str]] = field(default_factory=dict)
    """Names by cause, as they go into the manifest."""
    details: dict[str, str] = field(default_factory=dict)

    @property
    def count(self) -> int:
        """Number of bad pictures and rows."""
        return sum(len(names) for names in self.by_cause.values())

    @property
    def is_beyond_limit(self) -> bool:
        """True once there are more than the recipe allows."""
        return self.count > self.allowed

    @property
    def allowed(self) -> int:
        """The largest number that the recipe allows."""
        return num_allowed(self.max_fraction, self.total)

    def add(self, cause: str, name: str, detail: str = "") -> None:
        """Count one. Raises: BadDataLimitError once the limit is passed and enough are known to say why."""
        self.by_cause.setdefault(cause, []).append(name)
        if detail and len(self.by_cause[cause]) <= _NAMED:
            self.details[name] = detail
        if self.count >= _ENOUGH:
            self.check()

    def check(self) -> None:
        """Raises: BadDataLimitError naming causes and samples if there are more than the recipe allows."""
        if not self.is_beyond_limit:
            return
        counted = count_by_cause((cause, len(names)) for cause, names in self.by_cause.items())
        raise BadDataLimitError(
            f"{self.count} of {self.total} pictures and caption rows cannot be used: {counted}",
            where="\n  ".join([self.where, *self.lines()]),
            expected=f"at most {self.allowed} (shards.max_bad_fraction = {self.max_fraction})",
            fix="mend or remove what is named, or raise shards.max_bad_fraction to skip it",
        )

    def report(self) -> None:
        """Log what was skipped, a line a cause."""
        for line in self.lines():
            log.warning("skipped: %s", line)

    def lines(self) -> list[str]:
        """A line a cause: count and first names."""
        return [f"{len(names)} {cause} ({self._named(names)})" for cause, names in self.by_cause.items()]

    def _named(self, names: list[str]) -> str:
        shown = [f"{name}: {self.details[name]}" if name in self.details else name for name in names[:_NAMED]]
        more = len(names) - len(shown)
        return ", ".join(shown) + (f" and {more} more" if more else "")
