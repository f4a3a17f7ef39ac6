"""Names from outside on a terminal, in a log, in CSV, Markdown and JSON."""

from __future__ import annotations

import json
import logging
from pathlib import Path

import pytest

from evatool.core import logging as logs
from evatool.core.errors import DataError
from evatool.core.shown_text import (
    csv_cell,
    json_text,
    markdown_block,
    markdown_code,
    markdown_text,
    shown,
    shown_lines,
)

HOSTILE = "a\x1b[31m\nerror: forged\r\x07\x9b2J\u202egpj\u2066.\udcff\x00\u2028"


@pytest.mark.parametrize(
    ("name", "expected"),
    [
        ("a\nb", r"a\nb"),
        ("\x1b[31m", r"\x1b[31m"),
        ("\x9b2J", r"\x9b2J"),
        ("\u202egpj", r"\u202egpj"),
        ("caf\udce9", r"caf\xe9"),
        ("a\u2028b\u0085c", r"a\u2028b\x85c"),
        ("straße 猫 👨\u200d👩\u200d👧 [red]x[/red]", "straße 猫 👨\u200d👩\u200d👧 [red]x[/red]"),
    ],
    ids=ascii,
)
def test_what_is_not_to_be_seen_is_an_escape(name: str, expected: str) -> None:
    assert shown(name) == expected
    assert shown(name).isprintable() or "\u200d" in name


def test_only_indented_lines_of_a_message_stay_lines() -> None:
    assert (
        shown_lines("bad shards:\n  a.tar\nerror: forged\n  b.tar") == "bad shards:\n  a.tar\\nerror: forged\n  b.tar"
    )


@pytest.mark.parametrize("start", ["=", "+", "-", "@", "\t", "\r", "\uff1d"], ids=ascii)
def test_a_formula_in_a_csv_cell_is_text(start: str) -> None:
    assert csv_cell(f"{start}1+1") == f"'{shown(start)}1+1"


def test_numbers_and_other_text_in_csv_cells_stay() -> None:
    assert [csv_cell(value) for value in (-0.5, -3, None, "a=1", "")] == [-0.5, -3, None, "a=1", ""]


@pytest.mark.parametrize(
    "name", ["a|b", "`rm`", "[x](javascript:alert)", "![i](http://h/i.png)", "<b>", "*x*", "a\n# b", "\\|", "&lt;b&gt;"]
)
def test_markdown_shows_the_name_itself(name: str) -> None:
    """Read by a Markdown library, a row with the name has two cells, and the name's characters and nothing else."""
    from markdown_it import MarkdownIt

    html = MarkdownIt("gfm-like", {"linkify": False}).render(f"| {markdown_text(name)} | end |\n|---|---|\n")
    assert html.count("<th>") == 2
    for tag in ("<code", "<a ", "<img", "<b>", "<em>", "<h1"):
        assert tag not in html
    assert markdown_text("[5.6, 9.3] EVA02_CLIP_L-14 = +1") == "[5.6, 9.3] EVA02_CLIP_L-14 = +1"


def test_code_in_markdown_ends_where_it_should() -> None:
    assert markdown_code("a`b``") == "``` a`b`` ```"
    assert markdown_block("x = 1\n```\n# forged", "toml") == "````toml\nx = 1\n```\n# forged\n````"


def test_json_is_exact_and_does_nothing_to_a_terminal() -> None:
    text = json_text({HOSTILE: [HOSTILE, 1.5]})
    assert text.isprintable()
    assert json.loads(text) == {HOSTILE: [HOSTILE, 1.5]}


def test_no_name_forges_a_record_of_the_log(tmp_path: Path, capfd: pytest.CaptureFixture[str]) -> None:
    """As a value, in an error, in a trace; on the terminal and in the run's file. Markup in names means nothing."""
    logs.stderr_console.cache_clear()
    logs.configure()
    handler = logs.add_file(tmp_path)
    log = logging.getLogger("evatool.test")
    try:
        log.warning("bad sample: %s, %d", HOSTILE, 3)
        log.warning("bad shard: %s", DataError(f"cannot read {HOSTILE}", where=HOSTILE))
        log.warning(f"not as a value: {HOSTILE} [red]x[/red]")
        try:
            raise ValueError(HOSTILE)
        except ValueError:
            log.exception("the stage failed at %s", "https://user:pw@host/x.tar?sig=abc")
    finally:
        logging.getLogger("evatool").removeHandler(handler)
        handler.close()
        logs.stderr_console.cache_clear()
    kept, seen = (tmp_path / "rank_00000.log").read_text(encoding="utf-8"), capfd.readouterr().err
    for text in (kept, seen):
        assert text.replace("\n", "").isprintable()
        assert "[red]x[/red]" in text
        assert "Traceback" in text
        assert "pw@" not in text
        assert "sig=abc" not in text
        records = [line for line in text.split("\n")[:-1] if not line.startswith("  ")]
        assert len(records) == 4
