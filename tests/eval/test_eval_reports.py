"""The two HTML reports: self-contained, escaped, and holding what they promise."""

from __future__ import annotations

import csv
import re
from dataclasses import replace
from html.parser import HTMLParser
from pathlib import Path

import numpy as np
import pytest
from toys import made_up_results

from evatool.core.errors import DataError
from evatool.core.shown_text import shown
from evatool.eval.predictions import ClassificationResult
from evatool.eval.report.class_accuracy import class_panel
from evatool.eval.report.demo import ChainLosses, ChainStep, DemoReport, ShownSample, write_demo_report
from evatool.eval.report.gallery import Gallery, encode_image_file
from evatool.eval.report.page import text_table, write_eval_report
from evatool.eval.report.tables import markdown, write_csv
from evatool.eval.results import EvalFailure, EvalResults, read_results, write_results


class Page(HTMLParser):
    """Text, ids, addresses and tags that were never closed."""

    VOID = frozenset({"meta", "link", "img", "br", "path", "input", "hr"})

    def __init__(self, html: str) -> None:
        super().__init__()
        self.text, self.ids, self.addresses, self.open = "", [], [], []
        self.feed(html)

    def handle_starttag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        for name, value in attrs:
            if name == "id":
                self.ids.append(value)
            if name in ("src", "href", "srcset", "data", "poster", "action"):
                self.addresses.append(value or "")
        if tag not in self.VOID:
            self.open.append(tag)

    def handle_endtag(self, tag: str) -> None:
        if tag not in self.VOID:
            assert self.open.pop() == tag

    def handle_startendtag(self, tag: str, attrs: list[tuple[str, str | None]]) -> None:
        self.handle_starttag(tag, attrs)
        if tag not in self.VOID:
            self.open.pop()

    def handle_data(self, data: str) -> None:
        if not self.open or self.open[-1] not in ("style", "script"):
            self.text += data


def read(path: Path) -> tuple[str, Page]:
    html = path.read_text(encoding="utf-8")
    page = Page(html)
    assert page.open == []
    return html, page


def assert_self_contained(html: str, page: Page) -> None:
    assert all(address.startswith(("data:", "#")) for address in page.addresses)
    assert "<script" not in html
    assert not re.search(r"url\((?!['\"]?data:)|@import", html)


def demo_of(results: EvalResults, image: bytes, gallery: Gallery | None = None) -> DemoReport:
    return DemoReport(
        title="A demo",
        lead="What ran.",
        results=results,
        steps=[
            ChainStep("Prepare", "It prepares.", 12.0, {"pictures": "40"}, "evatool data-prepare demo/data-prepare")
        ],
        model_titles={"first": "From scratch", "second": "Distilled"},
        samples=[ShownSample(image, "a squid")],
        data_text="Real drawings.",
        losses=[ChainLosses("Teacher", [0, 100, 200], [4.8, 4.0, 3.5], 4.85, "a guess", "first")],
        mim_images=[image],
        mim_text="Grey was hidden.",
        gallery=gallery,
        machine="2 CPU cores",
        versions={"torch": "2.15"},
    )


def test_the_eval_report_is_one_file_with_every_number(
    tmp_path: Path, failed_results: EvalResults, gallery: Gallery
) -> None:
    write_eval_report(tmp_path / "report.html", failed_results, galleries=[gallery])
    html, page = read(tmp_path / "report.html")
    assert_self_contained(html, page)
    assert page.ids == ["failed", "accuracy", "verdict", "differences", "retrieval", "numbers", "method"]
    text = page.text.replace("\xa0", " ")
    for expected in (
        "5.0 % [3.5, 6.6]",
        "+3.0 [1.0, 5.0]",
        "gain",
        "class id 5 is out of range",
        "2 CPU cores",
        "ab" * 6,
    ):
        assert expected in text


def test_one_model_needs_no_comparison(tmp_path: Path) -> None:
    write_eval_report(tmp_path / "report.html", made_up_results({"only": (0.05, 0.03, 0.07)}))
    _, page = read(tmp_path / "report.html")
    assert page.ids == ["accuracy", "numbers", "method"]


HOSTILE = "=1+1|`x`[l](http://h)<b>\x1b[31m\n# forged \u202e\x9b"


def hostile_results() -> EvalResults:
    """Results whose names are formulas, markup and control characters."""
    results = made_up_results({HOSTILE: (0.05, 0.03, 0.07), "@b": (0.06, 0.03, 0.07)})
    results.sets[0] = replace(results.sets[0], title=HOSTILE, phrase=HOSTILE, about=HOSTILE)
    results.title = HOSTILE
    results.failures.append(EvalFailure(HOSTILE, "s", f"no class {HOSTILE}"))
    return results


def test_names_in_a_spreadsheet_are_text(tmp_path: Path) -> None:
    results = hostile_results()
    results.results[0] = replace(results.results[0], value=-0.25)
    write_csv(tmp_path / "results.csv", results)
    text = (tmp_path / "results.csv").read_text(encoding="utf-8")
    rows = list(csv.DictReader(text.splitlines()))
    assert [row["model"] for row in rows] == ["'" + shown(HOSTILE), "'@b"]
    assert rows[0]["value"] == "-0.25"
    assert text.replace("\n", "").isprintable()
    write_results(tmp_path / "results.json", results)
    assert read_results(tmp_path / "results.json").models[0].name == HOSTILE


def test_names_in_a_markdown_table_are_text() -> None:
    text = markdown(hostile_results())
    assert text.replace("\n", "").replace("\xa0", "").isprintable()
    assert "# forged" not in text.split("\n")
    widths = {len(re.findall(r"(?<!\\)\|", line)) for line in text.split("\n") if line.startswith("|")}
    assert widths == {7}  # the bars of both tables, in every row
    assert "](" not in text
    assert "<b>" not in text
    assert not re.search(r"(?<!\\)`", text)


def test_names_in_a_report_do_nothing(tmp_path: Path) -> None:
    write_eval_report(tmp_path / "report.html", hostile_results())
    html, _ = read(tmp_path / "report.html")
    assert r"\x1b[31m" in html
    assert "&lt;b&gt;" in html
    assert "<b>\\x1b" not in html
    assert html.replace("\n", "").replace("\xa0", "").isprintable()


def test_names_from_outside_are_escaped(tmp_path: Path, image: bytes) -> None:
    results = made_up_results({"<script>alert(1)</script>": (0.05, 0.03, 0.07), "b\"'&": (0.05, 0.03, 0.07)})
    write_eval_report(tmp_path / "eval.html", results)
    demo = demo_of(results, image)
    demo.samples = [ShownSample(image, "<img src=x onerror=alert(1)>")]
    write_demo_report(tmp_path / "demo.html", demo)
    for name in ("eval.html", "demo.html"):
        html, page = read(tmp_path / name)
        assert_self_contained(html, page)
        assert "<script>alert(1)</script>" in page.text


def test_the_demo_report_has_all_its_parts(
    tmp_path: Path, results: EvalResults, image: bytes, gallery: Gallery
) -> None:
    write_demo_report(tmp_path / "report.html", demo_of(results, image, gallery))
    html, page = read(tmp_path / "report.html")
    assert_self_contained(html, page)
    parts = ["words", "accuracy", "differences", "chain", "data", "losses", "mim", "retrieval", "numbers", "machine"]
    assert page.ids == parts
    text = page.text.replace("\xa0", " ")
    assert "Gained, in points: the new artist +3.0 [1.0, 5.0]." in text
    for expected in ("From scratch", "Distilled", "a squid", "loss 4.8 → 3.5", "12 s", "torch", "a <fine> cat"):
        assert expected in text


def test_the_demo_report_claims_no_gain_that_is_none(tmp_path: Path, image: bytes) -> None:
    results = made_up_results(differences=[(0.03, -0.001, 0.06)])
    write_demo_report(tmp_path / "report.html", demo_of(results, image))
    html, page = read(tmp_path / "report.html")
    assert "Gained" not in page.text
    assert 'class="mark gain"' not in html
    assert "No clear difference: the new artist +3.0" in page.text.replace("\xa0", " ")


def test_parts_without_data_are_left_out(tmp_path: Path, results: EvalResults) -> None:
    write_demo_report(tmp_path / "report.html", DemoReport("A demo", "", results))
    _, page = read(tmp_path / "report.html")
    assert page.ids == ["words", "accuracy", "differences", "numbers", "machine"]


def test_the_contact_sheet_stands_in_for_single_pictures(tmp_path: Path, results: EvalResults, image: bytes) -> None:
    sheet = encode_image_file(np.zeros((4, 4, 3), np.uint8))
    write_demo_report(tmp_path / "report.html", DemoReport("A demo", "", results, contact_sheet=sheet))
    html, page = read(tmp_path / "report.html")
    assert "data" in page.ids
    assert "Contact sheet" in html


def test_a_missing_picture_leaves_no_report(tmp_path: Path, results: EvalResults) -> None:
    demo = DemoReport("A demo", "", results, mim_images=[tmp_path / "gone.png"])
    with pytest.raises(DataError, match="cannot read a picture"):
        write_demo_report(tmp_path / "report.html", demo)
    assert list(tmp_path.iterdir()) == []


def test_the_terminal_table_has_a_column_a_model(results: EvalResults) -> None:
    header, row = text_table(results)
    assert header == ["set", "metric", "first", "second", "chance", "n"]
    assert [cell.replace("\xa0", " ") for cell in row] == [
        *("New artist", "top-1", "5.0 [3.5, 6.6]", "8.0 [6.1, 9.9]", "0.14", "729"),
    ]


def test_a_class_is_among_the_best_or_the_worst_and_never_right_is_not_best() -> None:
    labels = np.repeat(np.arange(5, dtype=np.int32), 2)
    rank = np.array(
        [0, 0, 0, 1, 1, 1, 1, 1, 1, 1], dtype=np.int32
    )  # class 0 right twice, class 1 once, the others never
    top = np.where(rank == 0, labels, (labels + 1) % 5).astype(np.int32)[:, None]
    predictions = ClassificationResult(labels, top, rank, 5, np.ones(10, dtype=np.float32))
    panel = class_panel("set", "Set", predictions, list("abcde"))
    assert panel is not None
    assert [row.name for row in panel.worst] == ["c", "d"]
    assert [(row.name, row.right) for row in panel.best] == [("a", 2), ("b", 1)]
