"""The command ``moesaic compare --suite FILE``: it does the runs and writes the leaderboard."""

from __future__ import annotations

import math
import time
from collections.abc import Callable, Sequence

from apps.base.files import write_text
from apps.base.machine import moment
from apps.base.progress import say
from apps.compare.command import command_line, until_stopped
from apps.compare.suite.file import Command, Suite
from apps.compare.suite.page import duration, leaderboard_page
from apps.compare.suite.queue import Queue
from apps.compare.suite.standings import Figures, standings
from apps.compare.training import interruptible
from apps.report.page import FILE, open_page, show_page, write_page
from apps.report.page.writing import markdown, write_index
from apps.runner.runner import Budget, at_work


def run(command: Command, argv: Sequence[str]) -> int:
    """Run ``moesaic compare ARGV``, and return 0, 130 where the user stopped it, or 143 where the system did.

    Raises:
        ValueError: a refused configuration or row, or a folder with another comparison.
    """
    # The same command goes on, but for --minutes 0, which trains nothing.
    again = command_line(["--suite", command.suite.path] if command.minutes == 0 else argv)
    return until_stopped(lambda: run_suite(command, again), again)


@interruptible()
def run_suite(command: Command, again: str, clock: Callable[[], float] = time.monotonic) -> Queue:
    """Do the runs of a suite that are left, as many as the time allows, and write and show the leaderboard.

    The leaderboard is written as well where a run fails or is stopped, with what is finished. ``again`` is the command
    to go on, as the user is told it.
    """
    suite = command.suite
    figures, runs = Figures(suite.figures_folder), suite.runs_folder
    budget = Budget(math.inf if command.minutes is None else 60 * command.minutes, clock=clock)
    with at_work(runs, "suite", suite.title) as whole:
        queue = Queue(suite, figures, command.rounds, whole, budget)
        try:
            queue.do()
        finally:
            _write(suite, figures)
        left = queue.left()
        if left:
            estimate = sum(run.entry.minutes or 0.0 for run in left)
            about = f", about {duration(estimate)} by the suite's estimates" if estimate else ""
            why = "the time is up" if queue.is_over else "the data of some boards cannot be had"
            say(f"{why}; runs left: {len(left)}{about}. To go on: {again}")
    if command.open:
        open_page(runs / FILE)
    return queue


def _write(suite: Suite, figures: Figures) -> None:
    """Write the leaderboard as Markdown and as a page, and show who leads."""
    boards = [standings(board, suite, figures) for board in suite.boards]
    page = leaderboard_page(suite, boards, moment())
    text = write_text(suite.leaderboard_file, markdown(page))
    show_page(page)
    say(f"leaderboard: {text}")
    write_page(page, suite.runs_folder / FILE)
    write_index(suite.runs_folder.parent)
