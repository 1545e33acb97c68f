"""What an interval shows, in one word."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Literal

from apps.report.intervals import CrossedInterval

Outcome = Literal["pays", "does not pay", "undecided"]

LEAST_SEEDS = 3
"""Seeds that decide: two cannot tell how far others would spread."""


@dataclass(frozen=True)
class Answer:
    """The answer to one question.

    Attributes:
        where: "equal FLOPs" or "equal time".
        outcome: "pays", "does not pay" or "undecided".
        gain: how much better sparse is than dense, with its interval; positive is better whatever the quality. None:
            no seed has both.
    """

    where: str
    outcome: Outcome
    gain: CrossedInterval | None


def decide(gain: CrossedInterval | None) -> Outcome:
    """Return what the interval of sparse's gain shows; one that reaches 0, or of few seeds, decides nothing."""
    if gain is None or not gain.half_width or gain.count < LEAST_SEEDS:
        return "undecided"
    if gain.low > 0:
        return "pays"
    return "does not pay" if gain.high < 0 else "undecided"


def last_line(answers: tuple[Answer, Answer]) -> str:
    """Return the last line of a verdict.

    Example::

        verdict: pays (equal FLOPs); undecided (equal time)
    """
    return "verdict: " + "; ".join(f"{answer.outcome} ({answer.where})" for answer in answers)
