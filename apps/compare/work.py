"""The plan of a comparison, saved so that only the same comparison resumes, and its work in order: the searches, the
final runs, speed and memory, then the use of the experts. Finished units stay so."""

from __future__ import annotations

import contextlib
import dataclasses
import functools
import hashlib
import io
import math
import sys
from collections.abc import Callable, Iterable, Mapping, Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

import torch

from apps.base.files import read_json, write_json
from apps.base.machine import moment
from apps.base.progress import Bar, say
from apps.base.quiet import quiet
from apps.cli.classes import with_short_names
from apps.compare.experiment import Experiment
from apps.compare.measure import Job, measure
from apps.compare.options import CompareOptions
from apps.compare.summary import Results, short_name, tuned
from apps.compare.systems import SPARSE, System
from apps.compare.training import Unit, interruptible, train
from apps.equal_cost import routers
from apps.registry import of_today
from apps.report.base import FOLDER, ReportConfig
from apps.report.intervals import choose
from apps.report.page import SECTIONS, Section, load_sections, save_sections
from apps.runner.runner import Runner, check_same
from apps.runner.unit import RESULT
from apps.runner.workers import Progress
from apps.train.step.module import SparseModule
from apps.train.watch.progress import PassBar


@dataclass(frozen=True)
class Plan:
    """The work of a comparison.

    Attributes:
        config: resolved configuration, in plain values.
        options: options of the command.
        overlays: contents of each overlay of ``options.routers``, by the system's name.
        rates: learning rates of the search; empty if the model's has no name.
        configured_rate: learning rate of the configuration; None: the model's has no name, and none is searched.
        seeds: seeds of the final runs.
        search_seed: seed of the search; it differs from ``seeds``, so that no rate is chosen for their data order.
    """

    config: dict[str, Any]
    options: CompareOptions
    overlays: dict[str, Any]
    rates: tuple[float, ...]
    configured_rate: float | None
    seeds: tuple[int, ...]
    search_seed: int

    @classmethod
    def make(cls, config: dict[str, Any], options: CompareOptions, configured_rate: float | None, seed: int) -> Plan:
        """Return the plan of a configuration, or raise the ValueError of a wrong overlay."""
        seeds = tuple(range(seed, seed + options.num_seeds))
        overlays = {system: routers.read(name) for system, name in routers.by_system(options.routers).items()}
        rates = options.rates(configured_rate)
        return cls(config, options, overlays, rates, configured_rate, seeds, seed + SEARCH_SEED)

    def search_units(self, system: str) -> list[Unit]:
        """Return the runs of the learning-rate search; empty if there is nothing to choose."""
        if len(self.rates) < 2:
            return []
        return [Unit(system, rate, self.search_seed, self.options.search_share) for rate in self.rates]

    def tuning_units(self, system: str) -> list[Unit]:
        """Return the search of an estimator's settings, one for all seeds."""
        return [Unit(system, None, self.search_seed, minutes=self.options.baseline_minutes)]

    def final_units(self, system: str, rate: float | None, tunes: bool = False) -> list[Unit]:
        minutes, by = (self.options.baseline_minutes, self.search_seed) if tunes else (None, None)
        return [Unit(system, rate, seed, final=True, minutes=minutes, tuned_by=by) for seed in self.seeds]

    def to_dict(self) -> dict[str, Any]:
        of_work = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(CompareOptions)}
        options = {name: list(value) if isinstance(value, tuple) else value for name, value in of_work.items()}
        return {
            "options": {**options, "routers": self.overlays},
            "rates": list(self.rates),
            "seeds": list(self.seeds),
            "search_seed": self.search_seed,
            "config": self.config,
        }

    def claim(self, output: Path) -> None:
        """Save the plan in ``output``.

        The saved plan may have other baselines, routers, rounds and minutes, and fewer seeds, on which no finished unit
        depends. Overlays of routers that are left out stay saved, so that a router comes back as it was trained.

        Raises:
            ValueError: the saved plan belongs to another comparison; the message names the differences.
        """
        path, wanted = output / "plan.json", self.to_dict()
        saved = read_json(path)
        if saved is not None:
            saved["config"] = with_short_names(of_today(saved["config"]))
            check_same(output, "comparison", _adapted(saved, wanted), wanted)
            overlays = {**(saved["options"]["routers"] or {}), **self.overlays}
            wanted = {**wanted, "options": {**wanted["options"], "routers": overlays}}
        write_json(path, wanted)


def tell_changed(modules: Iterable[str], output: Path) -> None:
    """Name the user's own ``modules`` that are not as they were when the comparison in ``output`` began."""
    path = output / "sources.json"
    own = (m for m in modules if m.partition(".")[0] not in ("apps", "core"))
    files = {m: file for m in own if (file := getattr(sys.modules[m], "__file__", None))}
    now = {m: hashlib.sha256(Path(file).read_bytes()).hexdigest() for m, file in files.items()}
    before = {**now, **(read_json(path) or {})}
    for module in (m for m in now if now[m] != before[m]):
        say(f"check: {module} has changed since this comparison began; its finished runs are of the code before")
    write_json(path, before)


_FREE = ("baselines", "rounds", "baseline_minutes")
"""Options on which no finished unit depends."""


def _adapted(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """Return ``saved`` with the values of ``wanted`` where these are free to differ."""
    had, has = saved["options"], wanted["options"]
    options, seeds = {**had, **{name: has[name] for name in _FREE}}, saved["seeds"]
    if set(seeds) <= set(wanted["seeds"]):
        options["num_seeds"], seeds = has["num_seeds"], wanted["seeds"]
    known = had["routers"] or {}
    options["routers"] = {name: known.get(name, overlay) for name, overlay in has["routers"].items()}
    return {**saved, "options": options, "seeds": seeds}


SEARCH_SEED = 1000
"""Added to the config's seed for the search."""


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Return whether a better rate may lie outside the tried ones."""
    return len(rates) > 1 and rate in (min(rates), max(rates))


EXAMPLES = 2000
"""Test examples that are enough to tell which expert takes what, to the end of a batch."""


def sections_of_use(experiment: Experiment, checkpoint: Path, output: Path) -> Sequence[Section]:
    """Return the sections of the app's test report on the sparse model; its files are in ``output/report``.

    They are made of the first test examples, without the slower parts of the report, if there are none that are as new
    as ``checkpoint``. A module without a report has none.
    """
    folder = output / FOLDER
    if not _is_new(folder / SECTIONS, checkpoint):
        with quiet(own_notes=False), contextlib.redirect_stdout(io.StringIO()):  # the page has its warnings
            _test(experiment, checkpoint, output)
        if not _is_new(folder / SECTIONS, checkpoint):
            save_sections([], folder)
    return load_sections(folder)


def _is_new(path: Path, checkpoint: Path) -> bool:
    return path.exists() and path.stat().st_mtime_ns >= checkpoint.stat().st_mtime_ns


def _test(experiment: Experiment, checkpoint: Path, output: Path) -> None:
    """Test the sparse model with its report, if it has one."""
    module, data = experiment.build(SPARSE, seed=experiment.seed)
    if not isinstance(module, SparseModule) or not module.report_callbacks():
        return
    config = getattr(module, "report", None)
    if isinstance(config, ReportConfig):
        module.report = config.brief()  # type: ignore[assignment]
    limit = _limit(experiment, getattr(data, "eval_batch_size", None))
    trainer = experiment.trainer(PassBar(), limit_test_batches=limit, default_root_dir=str(output))
    with interruptible(trainer):
        trainer.test(module, datamodule=data, ckpt_path=str(checkpoint), verbose=False, weights_only=True)


def _limit(experiment: Experiment, batch_size: int | None) -> float | int:
    """Return the limit of the test's batches: the configuration's, else those that have ``EXAMPLES``, else all."""
    limit: float | int | None = experiment.trainer_options.get("limit_test_batches")
    if limit is None:
        return 1.0 if batch_size is None else math.ceil(EXAMPLES / batch_size)
    return limit


class Work(Runner[Unit, dict[str, Any]]):
    """Does a plan for the systems that are not rejected, ``jobs`` runs at a time."""

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
        searches = {name: {u: results[u] for u in units} for name, units in search_units.items()}
        rates = {s.name: self._choose(s, searches[s.name]) for s in self.systems}
        units = {s.name: self.plan.final_units(s.name, rates[s.name][0], s.tunes) for s in self.systems}
        # The order is seed by seed, so that a stopped comparison has whole pairs.
        results = self._train([units[s.name][i] for i in range(len(self.plan.seeds)) for s in self.systems])
        checkpoints = {s.name: units[s.name][0].checkpoint(self.output) for s in self.systems if s.cost}
        return Results(
            finals={name: [results[u] for u in own] for name, own in units.items()},
            rates=rates,
            searches={name: list(searched.values()) for name, searched in searches.items()},
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

    def _choose(self, system: System, searched: dict[Unit, dict[str, Any]]) -> tuple[float | None, bool]:
        """Return the learning rate that the search has chosen, and whether it is at the edge of those tried."""
        if system.cost is None:
            return None, False
        if not searched:
            return next(iter(self.plan.rates), None), False
        assert self.plan.configured_rate is not None
        rates = [unit.rate for unit in searched if unit.rate is not None]
        higher_is_better = self.experiment.monitor_mode == "max"
        try:
            index = choose(
                rates, [r["quality"] for r in searched.values()], self.plan.configured_rate, higher_is_better
            )
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
