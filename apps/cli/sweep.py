"""``moesaic test --sweep``: quality lost and cost saved by cheaper forms of a trained model.

Each form is tested as the model is. Its speed is measured in rounds that it and the trained model take in turn, so that
a machine that slows down slows both; a form's latency is the median of the ratios times the trained model's latency.
Every finished form is written into ``sweep.json``, and a sweep that was stopped continues after the last of them.
"""

from __future__ import annotations

import copy
import hashlib
import json
import statistics
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import asdict, dataclass
from functools import partial
from itertools import islice
from typing import Any

import torch

import core
from apps.base.files import read_json, write_json
from apps.base.machine import machine_line
from apps.base.messages import first_line
from apps.base.progress import Bar, bar, say
from apps.cli.errors import UsageError
from apps.cli.setup import RunSetup
from apps.report.page import Point, ScatterChart, Section, Table, Text, save_charts, shown
from apps.report.pareto import front
from apps.report.tables import is_share
from apps.runner.runner import Runner
from apps.runner.workers import Progress
from apps.train.checkpoint.contents import fingerprint, read_checkpoint
from apps.train.checkpoint.run_folder import check_own
from apps.train.cost.cheaper import TRAINED, Cheaper, cheaper_forms
from apps.train.cost.flops import num_examples
from apps.train.cost.footprint import Seconds, in_rounds, peak_bytes, resident_bytes

RECORD, PICTURE = "sweep.json", "sweep.png"
SINGLE_EXAMPLES = 8
"""Examples that are passed one by one in a round, whose mean is the latency of batch 1."""


@dataclass(frozen=True)
class Measured:
    """A form that was measured.

    Attributes:
        kind, name, short: as in ``Cheaper``.
        metrics: metrics of its test, by name.
        seconds: seconds of a pass relative to the trained model's, by the number of examples of a pass.
        resident: bytes of its parameters and buffers.
        peak: bytes that a pass of the largest batch takes besides, at most.
    """

    kind: str
    name: str
    short: str
    metrics: Mapping[str, float]
    seconds: Mapping[int, Seconds]
    resident: int
    peak: int

    @classmethod
    def read(cls, values: Mapping[str, Any]) -> Measured:
        """Return the form of ``asdict`` of one, as JSON has it."""
        seconds = {
            int(size): Seconds(tuple(own["own"]), tuple(own["trained"])) for size, own in values["seconds"].items()
        }
        return cls(**{**values, "seconds": seconds})


class Sweep:
    """The sweep of a run: made before its test, run after it.

    Args:
        cli: the command, whose model has not been tested yet.
        rounds: rounds in which a form of the model and the trained model take turns.
        batches: validation batches from which the use of the experts is counted.

    Raises:
        ValueError: no trained model is given, it has no experts or no metric to judge it by, or several processes.
    """

    def __init__(self, cli: RunSetup, rounds: int, batches: int) -> None:
        self.cli, self.rounds, self.batches = cli, rounds, batches
        model, name = cli.model, type(cli.model).__name__
        if cli.ckpt_path is None:
            raise UsageError("sweep measures a trained model: give --ckpt_path")
        if not hasattr(model, "test_monitor"):
            raise UsageError(f"sweep asks for a model of the apps, and {name} names no metric to judge it by")
        if cli.trainer.world_size > 1:
            raise UsageError(f"sweep runs in one process, not in {cli.trainer.world_size}: give --trainer.devices 1")
        for file in (RECORD, PICTURE):
            check_own(cli.run_dir / file)
        model.load_state_dict(read_checkpoint(cli.ckpt_path)["state_dict"])
        cheaper_forms(model, "")  # rejects a model without experts before its test
        # The tested model is tied to its trainer; this one is copied for each form.
        self.trained: Any = copy.deepcopy(model).eval()
        self.trained.reports = False
        self._callbacks = list(cli.trainer.callbacks)

    def run(self, metrics: Mapping[str, float]) -> Section:
        """Measure the forms that are not measured yet, write record and picture, and return the report's section.

        Args:
            metrics: test metrics of the trained model, by name.

        Raises:
            ValueError: the test has no such metric as the training monitors, or the data have no test batch.
        """
        metric = self.trained.test_monitor
        if metric not in metrics:
            raise ValueError(f"sweep judges by {metric}, and the test has {', '.join(metrics)}")
        self.trained = self.cli.trainer.precision_plugin.convert_module(self.trained)
        self.trained.to(self.cli.trainer.strategy.root_device)
        self._batches = self._timed_batches()
        trained = Cheaper(TRAINED, TRAINED, "", lambda model: None)
        forms = [trained, *cheaper_forms(self.trained, self._statistics())]
        with bar("sweep", len(forms)) as whole:
            found = _Forms(self, forms, metrics, whole).finish(forms)
        measured = [own for own in found.values() if isinstance(own, Measured)]
        return self._section(measured, {form.name: own for form, own in found.items() if isinstance(own, str)})

    # ---- measuring

    def identity(self) -> dict[str, Any]:
        """Return the values that must match for a sweep to continue with an earlier one's forms."""
        return {
            "weights": fingerprint(self.trained),
            "config": hashlib.sha256(json.dumps(self.cli.plain_config()).encode()).hexdigest()[:16],
            "rounds": self.rounds,
            "batches": self.batches,
            "machine": machine_line().rpartition(",")[0],  # without the date
        }

    def _timed_batches(self) -> dict[int, list[Any]]:
        """Return batches of the test by their number of examples: single ones if the data give them, and the first
        two of the configuration."""
        data = self.cli.datamodule
        single = copy.copy(data)
        sizes = [name for name in ("eval_batch_size", "eval_tokens_per_batch") if hasattr(single, name)]
        for name in sizes:
            setattr(single, name, 1)
        of_one = [*map(self._moved, islice(single.test_dataloader(), SINGLE_EXAMPLES))] if sizes else []
        whole = [*map(self._moved, islice(data.test_dataloader(), 2))]
        if not whole:
            raise ValueError("sweep: the data have no test batch")
        return {num_examples(self.trained.example_inputs(own[0])): own for own in (of_one, whole) if own}

    def _statistics(self) -> Mapping[str, core.ExpertStatistics] | str:
        """Return the use of the experts in validation batches, or why it is not known."""
        batches = list(islice(iter(self.cli.datamodule.val_dataloader()), self.batches))
        if not batches:
            return "there are no validation batches, in which the use of the experts is counted"
        moved = [*map(self._moved, batches)]

        def run(model: Any, batch: Any) -> None:
            model(*model.example_inputs(batch))

        try:
            with self._forward():
                return core.expert_statistics(self.trained, moved, run)
        except ValueError as error:
            return first_line(error)

    def _moved(self, batch: Any) -> Any:
        """Return a batch as the trainer gives it to a model."""
        trainer = self.cli.trainer
        return trainer.strategy.batch_to_device(trainer.precision_plugin.convert_input(batch))

    def _forward(self) -> Any:
        return self.cli.trainer.precision_plugin.forward_context()

    def measured(self, form: Cheaper, model: Any, metrics: Mapping[str, float] | None) -> Measured:
        """Time a model of a form, and test it unless its ``metrics`` are known."""
        device = self.cli.trainer.strategy.root_device

        def run(one: Any, batches: Sequence[Any]) -> None:
            for batch in batches:
                one.infer(batch)

        with torch.inference_mode(), self._forward():
            seconds = {}
            for size, batches in self._batches.items():
                own, trained = partial(run, model, batches), partial(run, self.trained, batches)
                taken = in_rounds(own, trained, self.rounds, device)
                seconds[size] = Seconds(*(tuple(s / len(batches) for s in of) for of in (taken.own, taken.trained)))
            largest = self._batches[max(self._batches)][0]
            peak = peak_bytes(lambda: model.infer(largest), device)
        tested = self._tested(model) if metrics is None else metrics
        tested = {name: value for name, value in tested.items() if not name.startswith("test/routing/")}
        return Measured(form.kind, form.name, form.short, tested, seconds, resident_bytes(model), peak)

    def _tested(self, model: Any) -> dict[str, float]:
        trainer = self.cli.trainer
        trainer.callbacks = list(self._callbacks)  # the test of the trained model has added its report's
        results = trainer.test(model, datamodule=self.cli.datamodule, verbose=False, ckpt_path=None)
        return {name: float(value) for result in results for name, value in result.items()}

    # ---- showing

    def _section(self, measured: Sequence[Measured], left_out: Mapping[str, str]) -> Section:
        """Write the picture, and return it with the table."""
        model = self.trained
        metric = model.test_monitor
        sizes = sorted(measured[0].seconds)
        quality = [m.metrics[metric] for m in measured]
        percent = is_share(metric, [quality])
        higher = model.monitor_mode == "max"
        factor = 100.0 if percent else 1.0
        title = metric.replace("/", " ")
        rounds = {size: [s for m in measured for s in m.seconds[size].trained] for size in sizes}
        base = {size: 1e3 * statistics.median(seconds) for size, seconds in rounds.items()}
        forms = [_points(m, base, factor * q) for m, q in zip(measured, quality, strict=True)]
        names = [*(f"latency of batch {size}, ms" for size in sizes), "memory, MB"]
        fronts, charts = [], []
        for name, points in zip(names, zip(*forms, strict=True), strict=True):
            on = front([p.y for p in points], [p.x for p in points], higher)
            seen = f"{len(points)} forms of the model and the Pareto front, measured on {machine_line()}."
            log_x = max(p.x for p in points) > 10 * min(p.x for p in points) > 0
            steps = tuple((points[i].x, points[i].y) for i in on)
            y_title = f"{title}, %" if percent else title
            heading = f"{title} against {name.rpartition(',')[0]}"
            charts.append(ScatterChart(heading, seen, name, y_title, points, log_x, not higher, steps))
            fronts.append(on)
        path = save_charts(charts, self.cli.run_dir / PICTURE, f"{self.cli.run_dir.name}: quality and cost")
        columns = [f"{what}, batch {size}" for size in sizes for what in ("ms", "x")]
        table = Table(
            "Cheaper forms of the model",
            ("", f"{title}, %" if percent else title, *columns, "weights, MB", "+ a pass, MB", "on the front"),
            tuple(
                (
                    m.name,
                    f"{forms[i][0].y:.2f}" if percent else shown(forms[i][0].y),
                    *_latencies(m, base),
                    f"{m.resident / 1e6:.2f}",
                    f"{m.peak / 1e6:.2f}",
                    ", ".join(_short(name) for name, on in zip(names, fronts, strict=True) if i in on) or "–",
                )
                for i, m in enumerate(measured)
            ),
            sortable=True,
            note=(
                f"A latency is the median over {self.rounds} rounds, in which the form and the trained model "
                "take turns; x is the ratio to the trained model, with a 95 % interval of the median."
            ),
        )
        missing = Text.if_any(f"{name} is left out: {reason}." for name, reason in left_out.items())
        say(f"sweep: {path}")
        return Section("Cheaper forms: quality against latency and memory", (*charts, table, *missing))


def _points(own: Measured, base: Mapping[int, float], quality: float) -> list[Point]:
    """Return a form as a point of each chart: over the latencies, and over the memory.

    Args:
        own: the form.
        base: milliseconds of the trained model, by the number of examples of a pass.
        quality: its quality, as plotted.
    """
    points = []
    for size, trained in base.items():
        if own.kind == TRAINED:
            points.append(Point(own.kind, trained, quality, note=own.short))
        else:
            left, right = (trained * end for end in own.seconds[size].interval)
            cost = trained * own.seconds[size].ratio
            points.append(Point(own.kind, cost, quality, left=left, right=right, note=own.short))
    return [*points, Point(own.kind, (own.resident + own.peak) / 1e6, quality, note=own.short)]


def _latencies(own: Measured, base: Mapping[int, float]) -> Iterator[str]:
    for size, trained in base.items():
        seconds = own.seconds[size]
        low, high = seconds.interval
        is_trained = own.kind == TRAINED
        yield shown(trained if is_trained else trained * seconds.ratio)
        yield "1" if is_trained else f"{seconds.ratio:.2f} ({low:.2f} to {high:.2f})"


def _short(name: str) -> str:
    return name.partition(",")[0].removeprefix("latency of ")


class _Forms(Runner[Cheaper, Measured | str]):
    """Measures forms one by one into a file, from which a later sweep of the same model continues.

    The result of a form is its measurement, or the reason why it is left out.
    """

    def __init__(self, sweep: Sweep, forms: Sequence[Cheaper], metrics: Mapping[str, float], whole: Bar) -> None:
        super().__init__(whole, sweep.cli.run_dir)
        self.sweep, self.metrics, self.path = sweep, metrics, self.output / RECORD
        self._identity = sweep.identity()
        self._titles = {form: f"sweep {number} of {len(forms) - 1}" for number, form in enumerate(forms)}
        self._found: dict[str, Measured | str] = {}
        try:
            saved = read_json(self.path)
            if saved is not None and saved["of"] == self._identity:
                self._found = {own["name"]: Measured.read(own) for own in saved["forms"]}
        except (ValueError, KeyError, TypeError, AttributeError):
            say(f"{self.path} cannot be read: the sweep starts again")
        if self._found:
            say(f"sweep: {len(self._found)} forms are in {self.path} already")

    def read(self, unit: Cheaper) -> Measured | str | None:
        return self._found.get(unit.name)

    def work(self, unit: Cheaper, progress: Progress) -> Measured | str:
        model = copy.deepcopy(self.sweep.trained)
        try:
            unit.change(model)
        except ValueError as error:
            found: Measured | str = first_line(error)
        else:
            found = self.sweep.measured(unit, model.eval(), self.metrics if unit.kind == TRAINED else None)
        self._found[unit.name] = found
        forms = [asdict(own) for own in self._found.values() if isinstance(own, Measured)]
        left_out = {name: own for name, own in self._found.items() if isinstance(own, str)}
        write_json(self.path, {"of": self._identity, "forms": forms, "left_out": left_out})
        return found

    def title(self, unit: Cheaper) -> str:
        return self._titles[unit]

    def weight(self, unit: Cheaper) -> float:
        return 1.0

    def line(self, unit: Cheaper, result: Measured | str) -> str:
        if isinstance(result, str):
            return f"{unit.name} is left out: {result}"
        metric = self.sweep.trained.test_monitor
        return "" if unit.kind == TRAINED else f"{unit.name}: {metric} {result.metrics[metric]:.4g}"
