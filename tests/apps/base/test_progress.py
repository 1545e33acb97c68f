"""Bars on a terminal: what they count, when they end, and where there are none."""

from __future__ import annotations

import io
import re
import time

import pytest
from rich.console import Console

from apps.base import progress
from apps.base.progress import bar, each, end_time, hidden, say, set_aside


def terminal(width: int = 120) -> Console:
    return Console(file=io.StringIO(), force_terminal=True, width=width, no_color=True)


def rows(console: Console, shown: progress.Bar) -> list[str]:
    """Return the rows that are on the terminal now."""
    console.file.seek(0)
    console.file.truncate()
    shown._rows.refresh()
    return re.sub(r"\x1b\[[0-9;?]*[A-Za-z]|\r", "\n", console.file.getvalue()).split("\n")


def test_the_end_is_at_the_mean_speed_until_now(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    noon = 12 * 3600.0
    # 10 of 30 steps took 600 s: 20 more take 1,200 s.
    assert end_time((noon - 600, 5), (noon, 15), 35.0) == "12:20"
    assert end_time((noon - 600, 0), (noon, 1), 241.0) == "04:00 on 03 January"  # 240 steps of 10 minutes
    for now, last in (((noon, 5), 35.0), ((noon, 15), 15.0), ((noon, 15), float("inf"))):
        assert end_time((noon - 600, 5), now, last) == ""


def test_a_bar_moves_with_its_parts(monkeypatch):
    with bar("demo", 100, terminal()) as whole:
        with whole.weighing(40), bar("comparison", 10) as part:
            unit = part.part("sparse", 8, weight=5)
            unit.show(4)
            assert (part.done, whole.done) == (2.5, 10)  # half of 5 of 10, which is a quarter of 40
            unit.finish()
            assert (part.done, whole.done) == (5, 20)
            with bar("a step of unknown length"):
                pass
            assert whole.done == 20
        assert whole.done == 40
        assert list(each("abc", "letters")) == ["a", "b", "c"]
        assert whole.done == 40


def test_a_row_has_figures_and_the_end_and_stays_on_one_line(monkeypatch):
    monkeypatch.setenv("TZ", "UTC")
    time.tzset()
    now = [12 * 3600.0]
    monkeypatch.setattr(progress.time, "time", lambda: now[0])
    for width in (80, 160):
        console = terminal(width)
        with bar("comparison", console=console) as whole:
            now[0] = 12 * 3600.0
            whole.begin(40)
            whole.skip(10)  # by an earlier run
            now[0] += 600
            unit = whole.part("[dense, equal parameters] search at learning rate 0.00133", 4, weight=10)
            unit.show(4, figures={"imbalance": 1.2345, "dropped": 0.05})
            # 10 of 30 took 600 s, so 20 more take 1,200.
            assert whole.ends == "12:30"
            drawn = [line for line in rows(console, whole) if line.strip()]
            assert len(drawn) == 2
            assert all(len(line) <= width for line in drawn)
            assert re.search(r"^comparison .* 50% .*ends 12:30\s*$", drawn[0])
            assert re.search(r"^\[dense, equal .* 100% imbalance 1.23  dropped 0.05", drawn[1])
            unit.finish()


def test_nothing_is_drawn_without_a_terminal_by_other_ranks_and_in_workers(monkeypatch, capsys):
    silent = Console(file=io.StringIO())
    with bar("a", 1, silent) as shown:
        shown.advance()
        say("a line")
    console = terminal()
    with hidden(), bar("b", 1, console) as shown, set_aside():
        shown.advance()
        say("another")
    monkeypatch.setenv("RANK", "1")
    with bar("c", 1, console):
        pass
    assert silent.file.getvalue() == console.file.getvalue() == ""
    assert capsys.readouterr().out == "a line\nanother\n"


def test_lines_stand_above_the_bar_and_an_error_takes_it_away():
    console = terminal()

    def fails() -> None:
        with bar("work", 2, console):
            say("[a] line [of] text")
            raise ValueError("no")

    with pytest.raises(ValueError, match="no"):
        fails()
    assert "[a] line [of] text\n" in console.file.getvalue()
    assert "\x1b[2K" in console.file.getvalue()[-24:]  # the row is erased
    with bar("more", 1, terminal()) as later:
        assert later._outer is None
