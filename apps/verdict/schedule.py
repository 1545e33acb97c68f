"""Verdicts from an interval, the seeds and steps that fit into the given seconds, and the budget of the rate search.

All systems have the same rates, rungs, steps and seeds. The formulas are sums of measured seconds.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Literal

from apps.compare.systems import SPARSE
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
        gain: gain of sparse over dense, with its interval; positive is better whatever the quality. None: no seed has
            both.
    """

    where: str
    outcome: Outcome
    gain: CrossedInterval | None


def decide(gain: CrossedInterval | None) -> Outcome:
    """Return the verdict of the interval of sparse's gain; one that reaches 0, or of few seeds, decides nothing."""
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


FIRST_RUNG = 0.25
"""Part of a final run's steps that a run of the search's first rung has; each later one has twice as many."""

LEAST_STEPS = 20
"""Fewer steps than this say nothing about a training."""

SEEDS, MOST_SEEDS = (5, 4, LEAST_SEEDS), 10
"""Seeds of a final run, the most that leave half of the configured steps; most, where time is left."""

CHECKS = 8
"""Validations of a final run, evenly over its steps: the weights that validate best are tested, as after a fit."""

SAME_TIME = 0.03
"""Relative difference of two systems' seconds per step up to which equal steps are taken for equal time."""


@dataclass(frozen=True)
class Speed:
    """Measured seconds of one system.

    Attributes:
        step: of an optimizer step.
        start: of a run in addition to its steps and evaluations: making model and data, and the trainer's set-up.
        validation: of an evaluation on the validation split: a run of the search has one, a final one ``CHECKS``.
        test: of the evaluations of a final run: test split and a sample of the training split.
    """

    step: float
    start: float
    validation: float = 0.0
    test: float = 0.0

    def search(self, steps: int) -> float:
        """Return the seconds of a run of the search."""
        return self.start + steps * self.step + self.validation

    def final(self, steps: int) -> float:
        """Return the seconds of a final run."""
        return self.start + steps * self.step + CHECKS * self.validation + self.test


@dataclass(frozen=True)
class Schedule:
    """The work of a verdict.

    Attributes:
        seeds: number of seeds of the final runs.
        steps: steps of a final run.
        rates: learning rates of the search; of one none is searched, and () is for a model without a named rate.
    """

    seeds: int
    steps: int
    rates: tuple[float, ...]

    @property
    def rungs(self) -> list[tuple[int, int]]:
        """Return the rungs of the search: how many rates run in each, and for how many steps."""
        return rungs(len(self.rates), self.steps)


def rungs(num_rates: int, steps: int) -> list[tuple[int, int]]:
    """Return the rungs of successive halving: the better half of the rates, rounded up, continues with twice the steps.

    Example::

        rungs(3, 400)     # [(3, 100), (2, 200)]: then one is left, for the final runs
    """
    made, share = [], FIRST_RUNG
    while num_rates > 1:
        made.append((num_rates, max(1, math.ceil(min(share, 1.0) * steps))))
        num_rates, share = math.ceil(num_rates / 2), 2 * share
    return made


def search_seconds(schedule: Schedule, speeds: Mapping[str, Speed]) -> float:
    """Return the seconds of the search of all systems."""
    return sum(count * speed.search(steps) for count, steps in schedule.rungs for speed in speeds.values())


def seed_seconds(steps: int, speeds: Mapping[str, Speed]) -> float:
    """Return the seconds of one seed's final runs: each system at equal steps, and sparse at equal time."""
    seconds = sum(speed.final(steps) for speed in speeds.values())
    sparse = speeds[SPARSE]
    for speed in speeds.values():
        timed = equal_time_steps(steps, sparse.step, speed.step)
        seconds += 0.0 if timed == steps else sparse.final(timed)
    return seconds


def equal_time_steps(steps: int, sparse_step: float, dense_step: float) -> int:
    """Return the steps that sparse makes while dense makes ``steps``; as many where a step takes equally long."""
    ratio = dense_step / sparse_step
    return steps if abs(ratio - 1) <= SAME_TIME else max(1, round(steps * ratio))


def make_schedule(
    seconds: float, most_steps: int, rates: Sequence[float], speeds: Mapping[str, Speed], minutes: float
) -> Schedule:
    """Return the schedule that uses the seconds best.

    ``SEEDS`` are tried in turn: the first that leaves at least half of ``most_steps`` is taken, with as many steps as
    fit, up to ``most_steps``; where these fit, there may be more seeds. A budget too small for that has the last of
    ``SEEDS``, with at least ``LEAST_STEPS``.

    Args:
        seconds: seconds for search and final runs.
        most_steps: steps of the configured training.
        rates: learning rates of the search.
        speeds: measured seconds of the sparse system and the dense one.
        minutes: the whole budget, for the message.

    Raises:
        ValueError: the fewest seeds of the least steps do not fit.
    """

    def needed(seeds: int, steps: int) -> float:
        schedule = Schedule(seeds, steps, tuple(rates))
        return search_seconds(schedule, speeds) + seeds * seed_seconds(steps, speeds)

    least = min(LEAST_STEPS, most_steps)
    enough = max(least, math.ceil(most_steps / 2))
    for seeds, fewest in (*((seeds, enough) for seeds in SEEDS), (SEEDS[-1], least)):
        if needed(seeds, fewest) > seconds:
            continue
        low, high = fewest, most_steps
        while low < high:  # the largest number of steps that fits
            middle = (low + high + 1) // 2
            low, high = (middle, high) if needed(seeds, middle) <= seconds else (low, middle - 1)
        while low == most_steps and seeds < MOST_SEEDS and needed(seeds + 1, low) <= seconds:
            seeds += 1
        return Schedule(seeds, low, tuple(rates))
    lacking = needed(SEEDS[-1], least) - seconds
    with_reserve = math.ceil(11 * (minutes + lacking / 60)) / 10  # a tenth more, rounded up
    raise ValueError(
        f"minutes={minutes:g} fits no comparison: {SEEDS[-1]} seeds of {least} steps, with the search of "
        f"{len(rates)} learning rates, need about {with_reserve:g} minutes on this machine"
    )
