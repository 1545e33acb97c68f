"""The cost of a model, and its quality against that, as tables, charts and indices of runs show them."""

from __future__ import annotations

from collections.abc import Mapping, Sequence
from dataclasses import dataclass
from typing import Any

from apps.report.intervals import Interval
from apps.report.page import Entry, Point, ScatterChart, shown
from apps.train.cost.flops import megaflops

NONE = "–"
"""What a table shows if there is no value."""

SIZES = ("parameters", "active parameters")
SPEEDS = ("training, examples/s", "inference, examples/s")
MEMORY, SECONDS, FLOPS, LATENCY = "peak memory, MiB", "training time, s", "MFLOPs", "ms an example"


@dataclass(frozen=True)
class Costs:
    """The cost of a model on a machine.

    Attributes:
        counted: fields of its ``Cost``, by name; None: it has none.
        speed: figures of its speed and memory, by name; empty if they were not measured.
        train_seconds: mean seconds of a training; None: it was not trained.
    """

    counted: Mapping[str, Any] | None
    speed: Mapping[str, Any]
    train_seconds: float | None

    @property
    def unit(self) -> str:
        """Return the unit that the FLOPs are counted for, such as "an image"; "" without any."""
        return self.counted["unit"] if self.counted else ""

    @property
    def figures(self) -> dict[str, float]:
        """Return the figures that are known, by the names that tables have for them."""
        counted, speed = self.counted or {}, self.speed
        flops, rate = counted.get("flops_per_example"), speed.get("inference_examples_per_second")
        memory = speed.get("peak_memory_bytes")
        values = {
            FLOPS: None if flops is None else flops / 1e6,
            SIZES[0]: counted.get("num_params"),
            SIZES[1]: counted.get("active_params"),
            SPEEDS[0]: speed.get("train_examples_per_second"),
            SPEEDS[1]: rate,
            MEMORY: None if memory is None else (memory - speed.get("base_memory_bytes", 0)) / 2**20,
            SECONDS: self.train_seconds,
            LATENCY: 1000 / rate if rate else None,
        }
        return {name: float(value) for name, value in values.items() if value is not None}

    def cell(self, name: str) -> str:
        """Return a figure as a table shows it."""
        value = self.figures.get(name)
        if value is None:
            return NONE
        return megaflops(1e6 * value) if name == FLOPS else format(value, ",.1f" if name == SECONDS else ",.0f")


@dataclass(frozen=True)
class Quality:
    """The test quality of some models, and their cost.

    Attributes:
        name: what axes call it, such as "test top1, %".
        percent: it is a share, which is shown in percent.
        higher_is_better: a larger one is better.
        models: title, quality and costs of each.
    """

    name: str
    percent: bool
    higher_is_better: bool
    models: Sequence[tuple[str, Interval, Costs]]

    def entries(self, start: str = "") -> tuple[Entry, ...]:
        """Return the figures of each model for an index of runs, whose names start with ``start``."""
        return tuple(
            Entry(f"{start}{title}", {self.name: self._factor * test.mean, **self._indexed(costs.figures)})
            for title, test, costs in self.models
        )

    def charts(self, names: Mapping[str, str], heading: str = "Quality") -> tuple[ScatterChart, ...]:
        """Return the quality against the costs that are known.

        Args:
            names: what headings call a cost, by its name.
            heading: beginning of each heading.
        """
        unit = next((costs.unit for *_, costs in self.models if costs.unit), "an example")
        axes = {SECONDS: "training time of a run, s", FLOPS: f"{FLOPS} {unit}, forward"}
        axes[LATENCY] = f"ms {unit}, in batches"
        charts = []
        for name, words in names.items():
            points = tuple(
                Point(title, costs.figures[name], self._factor * test.mean, *self._ends(test))
                for title, test, costs in self.models
                if costs.figures.get(name)
            )
            if not points:
                continue
            spread = max(p.x for p in points) > 20 * min(p.x for p in points)
            best = max(points, key=lambda p: p.y if self.higher_is_better else -p.y)
            seen = f"The best mean is that of {best.label}, {best.y:.4g} at {shown(best.x)}; bars are 95 % intervals."
            title, axis = f"{heading} against {words}", axes.get(name, name)
            charts.append(ScatterChart(title, seen, axis, self.name, points, log_x=spread))
        return tuple(charts)

    @property
    def _factor(self) -> float:
        return 100.0 if self.percent else 1.0

    def _ends(self, test: Interval) -> tuple[float | None, float | None]:
        return (None, None) if test.half_width is None else (self._factor * test.low, self._factor * test.high)

    @staticmethod
    def _indexed(figures: Mapping[str, float]) -> dict[str, float]:
        names = (FLOPS, *SIZES, SECONDS, LATENCY)
        return {"training, s" if name == SECONDS else name: figures[name] for name in names if name in figures}
