"""What a ladder says, and its report."""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence
from dataclasses import asdict, dataclass
from typing import Any

import numpy as np

from apps.base.messages import counted
from apps.compare.ladder.curves import Fit, Span
from apps.compare.ladder.rungs import TURN, Outcome, limits
from apps.compare.page import shown_interval
from apps.compare.systems import SPARSE, label
from apps.report.intervals import verdict
from apps.report.page import Line, Page, Point, ScatterChart, Section, Table, Text, how_to_repeat

GATES = {
    "gain on a rung": "the 95 % interval of sparse minus dense test loss, over seeds, lies below 0",
    "cheaper": "on the highest fitted rung, dense needs more FLOPs (or seconds) than sparse for the same loss: the "
    "95 % interval of the ratio lies above 1",
    "gain grows": "the ratio is larger on the highest fitted rung than on the lowest: the 95 % interval of their "
    "quotient lies above 1; the gain shrinks if it lies below 1",
    "limited by data": f"with every seed the validation loss ends {TURN:.0%} above its lowest value, or the test "
    "loss is as far above that of the rung below; the rung is not fitted",
    "prediction": "the highest fitted rung lies within the 95 % interval that the fit to the others expects",
}
"""What will be called a gain, written down before anything is trained."""


@dataclass(frozen=True)
class Prediction:
    """The loss that a fit expects of a kind with a budget, and the loss that came; NaN before it has."""

    kind: str
    flops: float
    expected: Span
    came: float = math.nan


class Story:
    """What the outcomes of a ladder show.

    Args:
        outcomes: outcomes of the finished rungs, by rising budget.
        loss: name of the loss, for axes.

    Attributes:
        fit: curves of the rungs that data do not limit; None for fewer than two.
        tested: what the fit without the highest rung expected of it, and what came; empty for fewer than three.
        ahead: what the fit expects of the next rung; empty without a fit.
    """

    def __init__(self, outcomes: Sequence[Outcome], loss: str) -> None:
        self.outcomes, self.loss = list(outcomes), loss
        self.limited = limits(outcomes)
        self.others = [kind for kind in outcomes[0].kinds if kind != SPARSE]
        self.fitted = [o for o, limited in zip(outcomes, self.limited, strict=True) if not limited]
        self.fit = Fit([o.kinds for o in self.fitted]) if len(self.fitted) > 1 else None
        self.tested: list[Prediction] = []
        self.ahead: list[Prediction] = []
        if self.fit is not None:
            low, top = self.fitted[-2], self.fitted[-1]
            self.next = top.rung.number * top.rung.number / low.rung.number
            for kind, own in top.kinds.items():
                flops = own.flops * self.next / top.rung.number
                self.ahead.append(Prediction(kind, flops, self.fit.predicted(kind, flops)))
            if len(self.fitted) > 2:
                without = Fit([o.kinds for o in self.fitted[:-1]])
                self.tested = [
                    Prediction(k, own.flops, without.predicted(k, own.flops), float(own.loss_S.mean()))
                    for k, own in top.kinds.items()
                ]

    def cheaper(self, other: str, outcome: Outcome) -> tuple[Span, Span]:
        """Return how many times fewer FLOPs, and seconds, the sparse model needs for the other's loss on a rung."""
        assert self.fit is not None
        own, dense = outcome.kinds[SPARSE], outcome.kinds[other]
        span = self.fit.cheaper(SPARSE, other, dense.flops)
        slower = (own.seconds / own.flops) / (dense.seconds / dense.flops)
        return span, Span(span.value / slower, span.low / slower, span.high / slower)

    # ---- in words

    def sentences(self) -> list[str]:
        return [line for other in self.others for line in self._against(other)] + self._of_the_fit()

    def _against(self, other: str) -> list[str]:
        name, lines = label(other), []
        shown = []
        for outcome in self.outcomes:
            found = verdict(outcome.difference(other), higher_is_better=False)
            shown.append(f"{found} at {outcome.rung.number:g}")
        lines.append(f"Sparse against {name}, rung by rung: {', '.join(shown)}.")
        if self.fit is None:
            return lines
        low, top = self.fitted[0], self.fitted[-1]
        flops, seconds = self.cheaper(other, top)
        for what, span in (("training FLOPs", flops), ("training time", seconds)):
            lines.append(
                f"Rung {top.rung.number:g}: sparse reaches the loss of {name} with {_times(span)} the {what}: "
                f"{_called(span, 'cheaper', 'dearer')}."
            )
        if len(self.fitted) < 3:
            return [*lines, "Two rungs cannot tell whether the gain grows."]
        growth = self.fit.growth(SPARSE, other, low.kinds[other].flops, top.kinds[other].flops)
        lines.append(
            f"From rung {low.rung.number:g} to {top.rung.number:g} that factor changes by {_factor(growth)}: the gain "
            f"{_called(growth, 'grows', 'shrinks', 'shows no change')}."
        )
        crossing = self.fit.crossing(SPARSE, other)
        first, last = low.kinds[other].flops, top.kinds[other].flops
        if first <= crossing.value <= last:
            lines.append(f"The curves cross at {crossing.value:.2g} FLOPs ({crossing.low:.1g} to {crossing.high:.1g}).")
        else:
            lines.append(f"The curves do not cross between {first:.2g} and {last:.2g} FLOPs.")
        return lines

    def _of_the_fit(self) -> list[str]:
        lines = []
        if any(self.limited):
            names = ", ".join(f"{o.rung.number:g}" for o, yes in zip(self.outcomes, self.limited, strict=True) if yes)
            lines.append(f"Limited by data, and not fitted: {counted(sum(self.limited), 'rung')} ({names}).")
        if self.fit is None:
            return [*lines, f"{counted(len(self.fitted), 'rung')} of use: curves need two."]
        rungs = counted(len(self.fitted), "rung")
        if self.fit.tells_floor:
            lines.append(f"The floor of the loss is {_span(self.fit.floor())}.")
        else:
            lines.append(
                f"{rungs} cannot tell the floor of the loss: curves are drawn without one"
                + ("; intervals allow for one." if len(self.fitted) > 2 else ", with one exponent for all.")
            )
        exponents = ", ".join(f"{label(kind)} {_span(self.fit.exponent(kind))}" for kind in self.fit.kinds)
        lines.append(f"Exponents of the loss above the floor: {exponents}.")
        for p in self.tested:
            inside = "inside" if p.expected.holds(p.came) else "outside"
            lines.append(
                f"Without rung {self.fitted[-1].rung.number:g} the fit expects of {label(p.kind)} {_span(p.expected)}; "
                f"{p.came:.4g} came, {inside} of the interval."
            )
        ahead = "; ".join(f"{label(p.kind)} {_span(p.expected)}" for p in self.ahead)
        return [*lines, f"Rung {self.next:.2g} is expected to have a test loss of: {ahead}."]

    # ---- as a page

    def table(self) -> Table:
        """Return a row for each rung: its budget, and losses with intervals."""
        columns = ["rung", "FLOPs", "steps", *(label(kind) for kind in self.outcomes[0].kinds)]
        for other in self.others:
            name = "" if len(self.others) == 1 else f" {label(other)}"
            columns += [f"difference{name}", f"FLOPs{name}", f"time{name}"]
        rows = []
        for outcome, limited in zip(self.outcomes, self.limited, strict=True):
            row = [f"{outcome.rung.number:g}", f"{outcome.rung.flops:.2g}", f"{outcome.rung.steps:,}"]
            row += [f"{own.loss_S.mean():.4g}" for own in outcome.kinds.values()]
            for other in self.others:
                saved = ("–", "–") if limited or self.fit is None else map(_factor, self.cheaper(other, outcome))
                row += [shown_interval(outcome.difference(other), False, signed=True), *saved]
            rows.append(tuple(row))
        note = (
            "Test loss, mean of the seeds; difference: sparse minus the other, with the 95 % interval over seeds. "
            "FLOPs and time: how many times fewer sparse needs for the other's loss, by the curves."
        )
        return Table("", tuple(columns), tuple(rows), note=note)

    def charts(self) -> tuple[ScatterChart, ...]:
        """Return the losses over training FLOPs, and over seconds."""
        points, in_time, curves = [], [], []
        for kind in self.outcomes[0].kinds:
            name = label(kind)
            for outcome in self.outcomes:
                own = outcome.kinds[kind]
                spread = (min(own.loss_S), max(own.loss_S))
                note = f"{outcome.rung.number:g}" if kind == SPARSE else ""
                points.append(Point(name, own.flops, own.loss_S.mean(), *spread, note=note))
                in_time.append(Point(name, own.seconds, own.loss_S.mean(), *spread, note=points[-1].note))
            if self.fit is not None:
                ends = [self.fitted[0].kinds[kind].flops, self.fitted[-1].kinds[kind].flops]
                beyond = next(p.flops for p in self.ahead if p.kind == kind)
                for (low, high), part in (((ends[0], ends[1]), "fit"), ((ends[1], beyond), "expected")):
                    x = np.geomspace(low, high, 25)
                    curves.append(Line(name, tuple(x), tuple(self.fit.loss(kind, v) for v in x), part))
        seen = " ".join(self.sentences()[:2]) + " Bars reach from the lowest to the highest seed."
        axes = ("training FLOPs of a run", f"test {self.loss}")
        return (
            ScatterChart("Loss by training FLOPs", seen, *axes, tuple(points), True, curves=tuple(curves), log_y=True),
            ScatterChart("Loss by training time", seen, "s of training", axes[1], tuple(in_time), True, log_y=True),
        )

    def numbers(self) -> dict[str, Any]:
        """Return everything as plain values."""
        fit = self.fit and {
            "rungs": [o.rung.number for o in self.fitted],
            "tells_floor": self.fit.tells_floor,
            "floor": asdict(self.fit.floor()),
            "exponents": {kind: asdict(self.fit.exponent(kind)) for kind in self.fit.kinds},
            "cheaper": {
                other: {f"{o.rung.number:g}": [asdict(span) for span in self.cheaper(other, o)] for o in self.fitted}
                for other in self.others
            },
        }
        rungs = zip(self.outcomes, self.limited, strict=True)
        return {
            "rungs": [{**outcome.to_dict(), "limited_by_data": yes} for outcome, yes in rungs],
            "fit": fit,
            "tested": [asdict(p) for p in self.tested],
            "next": {"rung": self.next, "expected": [asdict(p) for p in self.ahead]} if self.fit else None,
            "sentences": self.sentences(),
        }

    def page(self, title: str, numbers: Mapping[str, Any], config: str) -> Page:
        """Return the report."""
        gates = Table("", ("what", "when"), tuple(GATES.items()))
        rates = "; ".join(
            f"{label(kind)} "
            + ", ".join(f"{o.rates[kind][0]:g}{' (edge)' if o.rates[kind][1] else ''}" for o in self.outcomes)
            for kind in self.outcomes[0].kinds
            if self.outcomes[0].rates[kind][0]
        )
        notes = (
            "FLOPs of a run: three forwards for each training example, counted on the first validation batch.",
            f"Learning rates, searched on the two lowest rungs (further where the best is at the edge) and by rule on "
            f"the others: {rates}.",
        )
        grown = [(f"{o.rung.number:g}", *(f"{value}" for value in o.rung.values.values())) for o in self.outcomes]
        sizes = Table("", ("rung", *self.outcomes[0].rung.values), tuple(grown))
        return Page(
            title=title,
            verdict=tuple(self.sentences()),
            figures=self.table(),
            sections=(
                Section("Curves", self.charts()),
                Section("Gates, written before the first run", (gates,)),
                Section("How it was made", (Text(notes), *((sizes,) if self.outcomes[0].rung.values else ()))),
                how_to_repeat(numbers["command"], config, numbers["machine"]),
            ),
            kind="ladder",
            date=numbers["date"],
        )


def _span(span: Span) -> str:
    return f"{span.value:.4g} ({span.low:.4g} to {span.high:.4g})"


def _factor(span: Span) -> str:
    return f"x{span.value:.2f} ({_bound(span.low)} to {_bound(span.high)})"


def _bound(value: float) -> str:
    return f"{value:.2f}" if 0.01 <= value < 1000 else "0" if value < 1 else "any"


def _times(span: Span) -> str:
    """Return one over a factor, such as "x0.71 (0.60 to 0.85)"."""
    return _factor(Span(1 / span.value, 1 / span.high, 1 / span.low))


def _called(span: Span, above: str, below: str, neither: str = "no difference shown") -> str:
    return above if span.low > 1 else below if span.high < 1 else neither
