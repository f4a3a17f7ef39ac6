"""Bars on a terminal, silence elsewhere, one live display."""

from __future__ import annotations

import io

import pytest
from rich.console import Console

from evatool.core import logging as log
from evatool.core import progress
from evatool.core.progress import progress as bar_of


@pytest.fixture
def terminal(monkeypatch: pytest.MonkeyPatch) -> io.StringIO:
    screen = io.StringIO()
    console = Console(file=screen, force_terminal=True, width=160)
    monkeypatch.setattr(log, "stderr_console", lambda: console)
    return screen


def test_a_bar_shows_count_rate_and_fields(terminal: io.StringIO) -> None:
    with bar_of("Train", 100, unit="samples") as bar:
        bar.advance(40, loss=1.23456)
        bar.advance(60, loss=0.5)
    last = terminal.getvalue()
    assert "Train" in last
    assert "100/100" in last
    assert "loss 0.5" in last


def test_an_inner_bar_joins_the_outer_display(terminal: io.StringIO) -> None:
    with bar_of("Demo", 7, unit="stages") as outer:
        display = progress._active
        with bar_of("Train", 10) as inner:
            assert progress._active is display
            assert [task.description for task in display.tasks] == ["Demo", "Train"]
            inner.advance(10)
        outer.advance(1)
        assert [task.description for task in display.tasks] == ["Demo"]
    assert progress._active is None


def test_what_was_done_before_a_resume_is_counted(terminal: io.StringIO) -> None:
    with bar_of("Train", 100, initial=30) as bar:
        bar.advance(5)
    assert "35/100" in terminal.getvalue()


def test_a_failure_closes_the_display(terminal: io.StringIO) -> None:
    def fail() -> None:
        with bar_of("Train", 100):
            raise ValueError("stop")

    with pytest.raises(ValueError, match="stop"):
        fail()
    assert progress._active is None


@pytest.mark.parametrize("rank", ["0", "1"])
def test_nothing_is_shown_without_a_terminal_or_on_other_ranks(
    rank: str, capsys: pytest.CaptureFixture[str], monkeypatch: pytest.MonkeyPatch
) -> None:
    monkeypatch.setenv("RANK", rank)
    if rank == "1":
        monkeypatch.setattr(log, "stderr_console", lambda: Console(force_terminal=True))
    with bar_of("Train", 100) as bar:
        bar.advance(40, loss=1.0)
    captured = capsys.readouterr()
    assert (captured.out, captured.err) == ("", "")


def test_log_lines_share_the_bars_console() -> None:
    assert log.stderr_console() is log.stderr_console()
