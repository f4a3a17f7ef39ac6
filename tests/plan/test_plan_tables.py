"""docs/plan.md says what the formulas say today."""

from __future__ import annotations

import pytest
from plan_tables import INSTANT, MEASURED, PAGE, replaced


@pytest.mark.parametrize("name", INSTANT)
def test_the_page_has_the_tables_of_today(name: str) -> None:
    page = PAGE.read_text(encoding="utf-8")
    assert replaced(page, name, INSTANT[name]()) == page, "run: python tests/benchmarks/plan_tables.py --write"


@pytest.mark.parametrize("name", MEASURED)
def test_measured_tables_are_filled_and_within_their_bounds(name: str) -> None:
    table = PAGE.read_text(encoding="utf-8").split(f"<!-- table: {name} -->")[1].split("<!-- end -->")[0]
    deviations = [float(cell.strip(" %")) for cell in table.split("|") if cell.strip().endswith("%")]
    assert len(deviations) >= 20
    assert max(map(abs, deviations)) <= (1 if name == "operations" else 3)
