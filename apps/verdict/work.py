"""The runs of a verdict in order: the search of the learning rates, then the final runs seed by seed."""

from __future__ import annotations

import itertools
import math
import statistics
from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import numpy as np

from apps.base.files import read_json, write_json
from apps.base.progress import Bar, say
from apps.compare.experiment import Experiment
from apps.compare.systems import SPARSE
from apps.compare.work import SEARCH_SEED
from apps.report.intervals import by_group, crossed_interval, nearest_first
from apps.runner.runner import Budget, BudgetOver, Runner
from apps.runner.unit import RESULT
from apps.runner.workers import Progress
from apps.verdict.schedule import (
    LEAST_SEEDS,
    LEAST_STEPS,
    MOST_SEEDS,
    Answer,
    Schedule,
    Speed,
    decide,
    equal_time_steps,
    search_seconds,
    seed_seconds,
)
from apps.verdict.training import VerdictRun, do

_ROUNDING = 1e-12
"""Gains that differ by less than this part of the values are equal, and show no spread."""


@dataclass(frozen=True)
class Plan:
    """The decisions before the first run, saved so that a killed verdict continues with it.

    Attributes:
        schedule: seeds, steps and rates.
        dense: name of the dense system.
        num_experts: experts of a layer of the sparse system.
        most_batches: maximum number of batches per evaluation; None: all.
        seconds_per_step: seconds of a step by system, as measured beforehand.
        start_seconds: seconds of a run in addition to its steps and evaluations.
        train_batches: batches of an epoch; None if it has no length.
        configured_steps: steps of the configured training.
    """

    schedule: Schedule
    dense: str
    num_experts: int
    most_batches: int | None
    seconds_per_step: Mapping[str, float]
    start_seconds: float
    train_batches: int | None
    configured_steps: int

    @property
    def systems(self) -> tuple[str, str]:
        return (SPARSE, self.dense)

    @property
    def speeds(self) -> dict[str, Speed]:
        """Return the seconds of both systems, without the evaluations, as measured beforehand."""
        return {name: Speed(self.seconds_per_step[name], self.start_seconds) for name in self.systems}

    @property
    def seed_seconds(self) -> float:
        """Return the seconds of one seed's final runs, without their evaluations."""
        return seed_seconds(self.schedule.steps, self.speeds)


@dataclass(frozen=True)
class Finished:
    """The finished runs of one seed.

    Attributes:
        seed: the seed.
        results: results of sparse and of dense at equal steps, and of sparse at equal time.
        values: test values of the same runs, each (N,).
        tasks: metric and test values of each task of the same runs; empty for other models than of tables.
        group_N: the user of each value, if they have one.
    """

    seed: int
    results: Sequence[Mapping[str, Any]]
    values: Sequence[np.ndarray]
    tasks: Sequence[Mapping[str, tuple[str, np.ndarray]]] = ()
    group_N: np.ndarray | None = None


class Work(Runner[VerdictRun, Mapping[str, Any]]):
    """Runs a plan within the budget; finished runs are not repeated."""

    def __init__(self, experiment: Experiment, plan: Plan, seed: int, output: Path, budget: Budget, whole: Bar) -> None:
        super().__init__(whole, output, budget)
        self.experiment, self.plan, self.seed = experiment, plan, seed
        budget.hold_back(3 * plan.start_seconds)  # writing the result takes about as long as beginning a run
        self.steps = plan.schedule.steps
        configured = experiment.rate or 1.0  # without one there are no rates to choose from
        default = min(plan.schedule.rates, key=lambda rate: abs(math.log(rate / configured)), default=None)
        self.rates: dict[str, float | None] = dict.fromkeys(plan.systems, default)
        self.finished: list[Finished] = []
        self.is_over = False

    def do(self) -> None:
        """Do all runs that the budget allows.

        ``rates``, ``steps`` and ``finished`` hold the result.

        The search's choice is kept in ``chosen.json``: all seeds use it, also in a resumed verdict.

        Raises:
            ValueError: training diverged at every rate.
            NonFiniteError: a final run diverged.
        """
        schedule = self.plan.schedule
        self.whole.begin(search_seconds(schedule, self.plan.speeds) + schedule.seeds * self.plan.seed_seconds)
        try:
            chosen = read_json(self.output / "chosen.json")
            if chosen is None:
                self._search()
                chosen = {"rates": self.rates, "steps": self._affordable_steps()}
                write_json(self.output / "chosen.json", chosen)
            self.rates, self.steps = chosen["rates"], chosen["steps"]
            self._finals()
        except BudgetOver:
            self.is_over = True
            say("the time is up; what is finished is judged")

    def _search(self) -> None:
        """Halve the rates of both systems rung by rung; the systems take turns, so that a slow moment hits both.

        Half of the time is kept for the final runs: a search that comes to it ends with the rates of its last rung.
        """
        reserve = self.budget.reserve
        self.budget.reserve += max(self.budget.left, 0) / 2
        try:
            self._rungs()
        except BudgetOver:
            say("the search of learning rates takes longer than planned, and ends here")
        finally:
            self.budget.reserve = reserve

    def _rungs(self) -> None:
        schedule, systems = self.plan.schedule, self.plan.systems
        left: dict[str, list[float]] = {name: list(schedule.rates) for name in systems}
        for rung, (_, steps) in enumerate(schedule.rungs):
            seed = self.seed + SEARCH_SEED + rung
            runs = {name: [VerdictRun(name, rate, seed, steps, "search") for rate in left[name]] for name in systems}
            self.finish(filter(None, itertools.chain(*itertools.zip_longest(*runs.values()))))
            assert self.experiment.rate is not None
            for name in systems:
                values = [self._gains(run) for run in runs[name]]
                left[name] = better_half(left[name], values, self.experiment.rate)
            self.rates = {name: rates[0] for name, rates in left.items()}

    def _affordable_steps(self) -> int:
        """Return the steps of a final run: as planned, or fewer, of which the fewest seeds fit at the search's pace."""
        runs = self._searched("*")
        if any((self.output / VerdictRun.ROOM).glob("*/final-*")):  # of a version that did not save the choice
            return self.steps
        planned = sum(self._seconds(run["run"]["system"], run["run"]["steps"]) for run in runs)
        slower = sum(run["wall_seconds"] for run in runs) / planned if runs else 1.0
        share = self.budget.left / (LEAST_SEEDS * slower * self.plan.seed_seconds)
        return max(min(self.steps, LEAST_STEPS), math.floor(min(share, 1.0) * self.steps))

    def _gains(self, run: VerdictRun) -> np.ndarray:
        """Return the values of a run of the search, a larger one being better; none where it diverged."""
        result = run.read(self.output)
        assert result is not None, run.name
        values_N = run.values(self.output)
        return values_N if result.get("higher_is_better", True) else -values_N

    def _finals(self) -> None:
        steps = self.steps
        timed_steps = equal_time_steps(steps, *map(self._step_seconds, self.plan.systems))
        seconds: list[float] = []
        for number in range(MOST_SEEDS):
            is_planned = number < self.plan.schedule.seeds
            seed = self.seed + number
            runs = [VerdictRun(name, self.rates[name], seed, steps, "final") for name in self.plan.systems]
            timed = VerdictRun(SPARSE, self.rates[SPARSE], seed, timed_steps, "timed")
            runs.append(runs[0] if timed_steps == steps else timed)
            is_new = any(self.read(run) is None for run in runs)
            # Whether a seed is begun depends on the time that is left, and on nothing that the others gave.
            if is_new and seconds and self.budget.left < (0.9 * min(seconds) if is_planned else 1.1 * max(seconds)):
                if is_planned:
                    raise BudgetOver
                return
            if not is_planned:
                self.whole.grow(self.plan.seed_seconds)
            done = self.finish(runs)
            values = [run.values(self.output) for run in runs]
            sizes = [len(values_N) for values_N in values]
            if len(set(sizes)) > 1:
                counts = "{}, {} and {}".format(*sizes)
                raise ValueError(f"the runs of seed {seed} have {counts} test values: the data have changed")
            tasks = [run.task_values(self.output) for run in runs]
            users = runs[0].group_N(self.output)
            self.finished.append(Finished(seed, [done[run] for run in runs], values, tasks, users))
            seconds.append(sum(own["wall_seconds"] for own in done.values()))

    def work(self, unit: VerdictRun, progress: Progress) -> Mapping[str, Any]:
        return do(self.experiment, unit, self.output, self.budget, self.plan.most_batches, progress)

    def weight(self, unit: VerdictRun) -> float:
        return self._seconds(unit.system, unit.steps)

    def line(self, unit: VerdictRun, result: Mapping[str, Any]) -> str:
        left = self.budget.seconds - self.budget.spent
        quality = "diverged" if result["quality"] is None else f"{result['quality']:.4g}"
        return f"{quality}, {result['wall_seconds']:.1f} s; {left:.0f} s left"

    def _seconds(self, system: str, steps: int) -> float:
        """Return the seconds that a run takes, without its evaluations, as measured beforehand."""
        return self.plan.speeds[system].final(steps)

    def _searched(self, system: str) -> list[Any]:
        """Return the results of the search that are there."""
        return [read_json(path) for path in sorted((self.output / VerdictRun.ROOM).glob(f"{system}/search-*/{RESULT}"))]

    def _step_seconds(self, system: str) -> float:
        """Return the median seconds of a step in the search, or as measured before where nothing was searched."""
        seconds = [result["seconds_per_step"] for result in self._searched(system) if "seconds_per_step" in result]
        return statistics.median(seconds) if seconds else self.plan.seconds_per_step[system]


def better_half(rates: Sequence[float], gains: Sequence[np.ndarray], default: float) -> list[float]:
    """Return the better half of the rates, rounded up, the best first.

    The rate nearest to ``default``, by ratio, is left for another one only where that one is better by more than the
    standard error of their difference over the validation examples: else the choice would be one of chance, which no
    seed of the final runs repeats (the one-standard-error rule of Breiman et al., 1984).

    Args:
        rates: learning rates.
        gains: values of each by example (N,), a larger one being better; empty or not finite where the run diverged.
        default: the configured rate.

    Raises:
        ValueError: every run diverged.
    """
    is_usable = [len(gain_N) > 0 and bool(np.isfinite(gain_N).all()) for gain_N in gains]
    usable = nearest_first(rates, is_usable, default)
    home = usable[0]

    def lead(i: int) -> float:
        ahead_N = gains[i] - gains[home]
        error = float(ahead_N.std(ddof=1)) / math.sqrt(len(ahead_N)) if len(ahead_N) > 1 else 0.0
        return float(ahead_N.mean()) - (0.0 if i == home else error)

    ranked = sorted(usable, key=lead, reverse=True)  # equal ones stay in their order
    return [rates[i] for i in ranked[: math.ceil(len(rates) / 2)]]


def answers(finished: Sequence[Finished]) -> tuple[Answer, Answer]:
    """Return the answers at equal FLOPs and at equal time."""

    def answer(where: str, own: int) -> Answer:
        if not finished:
            return Answer(where, "undecided", None)
        sign = 1.0 if finished[0].results[0]["higher_is_better"] else -1.0
        gains_SN = np.stack([sign * (f.values[own] - f.values[1]) for f in finished])
        largest = max(float(np.abs(values).max()) for f in finished for values in f.values)
        if np.ptp(gains_SN) <= _ROUNDING * largest:
            gains_SN = np.full_like(gains_SN, gains_SN.mean())
        gain = crossed_interval(by_group(gains_SN, finished[0].group_N))
        return Answer(where, decide(gain), gain)

    return answer("equal FLOPs", 0), answer("equal time", 2)
