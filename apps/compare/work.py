"""The work of a plan, in order: the searches, the final runs, then speed and memory. Finished units stay so."""

from __future__ import annotations

import functools
from collections.abc import Callable, Mapping, Sequence
from pathlib import Path
from typing import Any

import torch

from apps.base.files import read_json, write_json
from apps.base.machine import moment
from apps.base.progress import Bar
from apps.compare.experiment import Experiment
from apps.compare.measure import Job, measure
from apps.compare.plan import Plan, at_edge
from apps.compare.stats import choose
from apps.compare.summary import Results, short_name, tuned
from apps.compare.systems import System
from apps.compare.training import Unit, train
from apps.runner.runner import Runner
from apps.runner.unit import RESULT
from apps.runner.workers import Progress


class Work(Runner[Unit, dict[str, Any]]):
    """Does a plan for the systems that are not refused, ``jobs`` runs at a time."""

    def __init__(
        self, experiment: Experiment, plan: Plan, systems: Sequence[System], output: Path, whole: Bar, jobs: int
    ) -> None:
        super().__init__(whole, output)
        self.experiment, self.plan, self.jobs = experiment, plan, jobs
        self.systems = [s for s in systems if not s.refused]

    def do(self) -> Results:
        search_units = {s.name: self._search_units(s) for s in self.systems}
        searched = sum(unit.share for units in search_units.values() for unit in units)
        measured = 1.0 if self.plan.options.rounds else 0.0
        self.whole.begin(searched + len(self.systems) * len(self.plan.seeds) + measured)
        results = self._train([unit for units in search_units.values() for unit in units])
        searches = {name: [results[u] for u in units] for name, units in search_units.items()}
        rates = {s.name: self._choose(s, searches[s.name]) for s in self.systems}
        units = {s.name: self.plan.final_units(s.name, rates[s.name][0], s.tunes) for s in self.systems}
        # The order is seed by seed, so that a stopped comparison has whole pairs.
        results = self._train([units[s.name][i] for i in range(len(self.plan.seeds)) for s in self.systems])
        checkpoints = {s.name: units[s.name][0].checkpoint(self.output) for s in self.systems if s.cost}
        return Results(
            finals={name: [results[u] for u in own] for name, own in units.items()},
            rates=rates,
            searches=searches,
            speeds=self._speeds(checkpoints),
            examples={name: [u.examples(self.output) for u in own] for name, own in units.items()},
            checkpoints=checkpoints,
        )

    def _search_units(self, system: System) -> list[Unit]:
        if system.cost:
            return self.plan.search_units(system.name)
        return self.plan.tuning_units(system.name) if system.tunes else []

    def _train(self, units: Sequence[Unit]) -> dict[Unit, dict[str, Any]]:
        make = functools.partial(_in_a_process, self.experiment.arguments, self.output)
        return self.finish(units, self.jobs, make, (__name__, *self.experiment.modules))

    def work(self, unit: Unit, progress: Progress) -> dict[str, Any]:
        return train(self.experiment, unit, self.output, progress)

    def line(self, unit: Unit, result: Mapping[str, Any]) -> str:
        if "settings" in result:
            return tuned(result)
        if result["quality"] is None:
            return f"diverged ({result['diverged']})"
        metric = short_name(self.experiment.test_monitor)
        text = f"validation {metric} {result['quality']:.4g}"
        if "test_quality" in result:
            text += f", test {result['test_quality']:.4g}"
        return f"{text}, {result['train_seconds']:.1f} s"

    def _choose(self, system: System, searched: Sequence[Mapping[str, Any]]) -> tuple[float | None, bool]:
        """Return the learning rate that the search has chosen, and whether it is at the edge of those tried."""
        rates = self.plan.rates
        if system.cost is None:
            return None, False
        if not searched:
            return (rates[0] if rates else None), False
        assert self.plan.configured_rate is not None
        higher_is_better = self.experiment.monitor_mode == "max"
        try:
            index = choose(rates, [r["quality"] for r in searched], self.plan.configured_rate, higher_is_better)
        except ValueError as error:
            raise ValueError(f"{system.title}: {error}; give lower --learning_rates") from None
        return rates[index], at_edge(rates[index], rates)

    def _speeds(self, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        """Return speed and memory of each system, all measured in one session, so that their ratios are fair."""
        path, rounds = self.output / "speed.json", self.plan.options.rounds
        saved = read_json(path) or {}
        speeds = {name: saved[name] for name in checkpoints if name in saved}
        if len({speed.get("measured") for speed in speeds.values()}) > 1:
            speeds = {}
        whole = speeds.keys() == checkpoints.keys()
        if rounds and not (whole and all(len(speed["train_rounds"]) == rounds for speed in speeds.values())):
            speeds = self._measure(checkpoints)
            write_json(path, {**saved, **speeds})  # systems that are left out keep theirs
        if rounds:
            self.end("speed and memory")
        return speeds

    def _measure(self, checkpoints: Mapping[str, Path]) -> dict[str, Any]:
        threads = max(1, torch.get_num_threads() // self.jobs)  # as many as in training
        jobs = {name: Job(self.experiment.arguments, name, str(file), threads) for name, file in checkpoints.items()}
        show = functools.partial(self.show, "speed and memory")
        speeds = measure(jobs, self.plan.options.rounds, show, self.experiment.modules)
        when = moment()
        return {name: {**speed, "measured": when} for name, speed in speeds.items()}


def _in_a_process(arguments: Sequence[str], output: Path) -> Callable[[Unit, Progress], dict[str, Any]]:
    """Return what does a unit in a process of its own, which reads the configuration once."""
    experiment = Experiment(arguments)
    return lambda unit, progress: train(experiment, unit, output, progress)


def result_files(output: Path) -> list[Path]:
    """Return the files of all finished units and measurements in ``output``."""
    return [*(output / Unit.ROOM).glob(f"*/*/{RESULT}"), *output.glob("speed.json")]
