"""The rungs of a ladder: what each trains for its budget, and the losses that came."""

from __future__ import annotations

import itertools
import json
import math
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, replace
from pathlib import Path
from statistics import mean
from typing import Any

import numpy as np

from apps.base.quiet import quiet
from apps.compare.experiment import BY_LOSS, Experiment, arguments, length_of, validation_batch
from apps.compare.ladder.curves import Measured
from apps.compare.ladder.growth import Growth, flags
from apps.compare.ladder.options import Ladder
from apps.compare.summary import Results
from apps.compare.systems import SPARSE, System
from apps.compare.training import Unit
from apps.compare.work import Plan, Work
from apps.report.intervals import Interval, paired_difference
from apps.train.cost.flops import measure_cost, num_examples

LEAST_STEPS = 20
"""Fewer steps than this are no training."""

BACKWARD = 3
"""FLOPs of a training step over those of its forward."""

SEARCHED = 2
"""Lowest rungs on which the learning rate is searched."""

STEP, FURTHER = 2.0, 3
"""A best rate at the edge is followed by one so many times as large or small, and so often at most."""

TURN = 0.02
"""Rise of the validation loss over its lowest value, relative, from which a run counts as limited by its data; both are
means over a tenth of the run's validations, as single ones scatter."""

_COUNTED = 8
"""Training batches whose examples are counted."""


@dataclass(frozen=True)
class Rung:
    """What a rung trains.

    Attributes:
        number: multiple of the configuration's budget.
        place: its number in the ladder, from 0.
        values: values of the options that grow.
        steps: optimizer steps of a run.
        examples: examples of a run.
        flops: training FLOPs of the sparse model's run.
        arguments: arguments of its ``Experiment``.
    """

    number: float
    place: int
    values: Mapping[str, Any]
    steps: int
    examples: float
    flops: float
    arguments: tuple[str, ...]

    @property
    def title(self) -> str:
        return f"rung {self.number:g}"

    def folder(self, output: Path) -> Path:
        return output / f"rung_{self.number:g}"

    def to_dict(self) -> dict[str, Any]:
        return {"rung": self.number, "options": dict(self.values), "steps": self.steps, "flops": self.flops}


def find_rungs(asked: Ladder, base: Experiment, growth: Growth) -> list[Rung]:
    """Return the rungs of a configuration, each with as many steps as its budget has.

    Raises:
        ValueError: a rung has fewer than ``LEAST_STEPS``, or the data have no length.
    """
    config, overlays = str(asked.config), [*map(str, asked.overlays)]
    plain, (forward, in_step, batches) = base.plain(), _sizes(base)
    if math.isinf(batches) and base.trainer_options.get("max_steps") in (None, -1):
        raise ValueError("the training data have no length: give trainer.max_steps, from which a budget follows")
    budget = BACKWARD * forward * in_step * base.num_steps(batches)
    rungs = []
    for place, number in enumerate(asked.rungs):
        values = growth.options(plain, number, place)
        words = (*asked.rest, *flags(values))
        grown = Experiment((*arguments(config, overlays, words, asked.options.routers), BY_LOSS))
        forward, in_step, _ = _sizes(grown)
        of_step = BACKWARD * forward * in_step
        steps = round(number * budget / of_step)
        if steps < LEAST_STEPS:
            raise ValueError(
                f"--ladder: rung {number:g} has a budget of {number * budget:.2g} FLOPs, which is {steps} steps of "
                f"{of_step:.2g}, and fewer than {LEAST_STEPS} are no training: give higher rungs"
            )
        words = (*words, "--trainer.max_steps", str(steps), "--trainer.max_epochs", "-1")
        known = (*arguments(config, overlays, words, asked.options.routers), BY_LOSS)
        rungs.append(Rung(number, place, values, steps, steps * in_step, steps * of_step, known))
    return rungs


def _sizes(experiment: Experiment) -> tuple[float, float, float]:
    """Return forward FLOPs of an example, examples of an optimizer step, and batches of an epoch."""
    with quiet(own_notes=False):
        model, data = experiment.build(SPARSE)
        batch = validation_batch(data, "a ladder is measured by")
        loader = data.train_dataloader()
        counts = [num_examples(model.cost_inputs(batch)) for batch in itertools.islice(loader, _COUNTED)]
        forward = measure_cost(model, batch).flops_per_example
    if not counts:
        raise ValueError("the training split has no batch")
    accumulated = int(experiment.trainer_options.get("accumulate_grad_batches") or 1)
    return forward, mean(counts) * accumulated, length_of(loader)


class RungWork(Work):
    """The comparison of one rung; its search goes on beyond a best rate at the edge.

    Args:
        fixed: learning rates by system, in place of a search.
        arguments: as of ``Work``.
    """

    def __init__(self, fixed: Mapping[str, float | None], *arguments: Any) -> None:
        super().__init__(*arguments)
        self.fixed = fixed

    def _search_units(self, system: System) -> list[Unit]:
        return [] if system.name in self.fixed else super()._search_units(system)

    def _choose(self, system: System, searched: dict[Unit, dict[str, Any]]) -> tuple[float | None, bool]:
        if system.name in self.fixed:
            return self.fixed[system.name], False
        rate, edge = super()._choose(system, searched)
        for _ in range(FURTHER):
            if not edge or not rate:
                break
            up = rate == max(unit.rate or 0.0 for unit in searched)
            beyond = replace(next(iter(searched)), rate=float(f"{rate * (STEP if up else 1 / STEP):.3g}"))
            self.whole.grow(beyond.share)
            searched.update(self._train([beyond]))
            rate, edge = super()._choose(system, searched)
        return rate, edge


@dataclass(frozen=True)
class Outcome:
    """What came of a rung.

    Attributes:
        rung: the rung.
        kinds: losses of each system.
        rates: learning rate of each system, and whether it lies at the edge of those tried.
        turned: rise of each system's validation loss over its lowest value at the end, relative, least of the seeds.
        seconds: wall-clock seconds of all final runs.
    """

    rung: Rung
    kinds: Mapping[str, Measured]
    rates: Mapping[str, tuple[float | None, bool]]
    turned: Mapping[str, float]
    seconds: float

    def difference(self, other: str) -> Interval:
        """Return the sparse model's loss minus that of ``other``, paired by seed."""
        return paired_difference([*self.kinds[SPARSE].loss_S], [*self.kinds[other].loss_S])

    def to_dict(self) -> dict[str, Any]:
        kinds = {
            name: {
                "flops": own.flops,
                "seconds": own.seconds,
                "learning_rate": self.rates[name][0],
                "loss": [float(f"{loss:.6g}") for loss in own.loss_S],
                "blocks": [[float(f"{loss:.5g}") for loss in row] for row in own.loss_SB],
                "shares": [float(f"{share:.4g}") for share in own.weight_B],
                "turned": self.turned[name],
            }
            for name, own in self.kinds.items()
        }
        return {**self.rung.to_dict(), "kinds": kinds}


def outcome_of(rung: Rung, systems: Sequence[System], results: Results) -> Outcome:
    """Return what came of a rung's finished runs."""
    kinds, turned = {}, {}
    for system in systems:
        if system.cost is None or system.name not in results.finals:
            continue
        finals = results.finals[system.name]
        step = results.speeds.get(system.name, {}).get("seconds_per_step")
        seconds = step * rung.steps if step else mean(float(f["train_seconds"]) for f in finals)
        blocks = [f.get("blocks") or [[1.0, f["test_quality"]]] for f in finals]
        weights = np.array([weight for weight, _ in blocks[0]])
        losses = np.array([[loss for _, loss in own] for own in blocks])
        flops = BACKWARD * system.cost.flops_per_example * rung.examples
        kinds[system.name] = Measured(flops, seconds, losses, weights / weights.sum())
        turned[system.name] = min(_turned([quality for *_, quality in f["curve"]]) for f in finals)
    wall = sum(float(f.get("wall_seconds", f["train_seconds"])) for own in results.finals.values() for f in own)
    return Outcome(rung, kinds, results.rates, turned, wall)


def _turned(losses: Sequence[float]) -> float:
    """Return how far the last tenth of a curve lies above its lowest tenth, relative."""
    tenths = [float(part.mean()) for part in np.array_split(np.asarray(losses), min(10, len(losses)))]
    return tenths[-1] / min(tenths) - 1


def plan_of(
    rung: Rung, experiment: Experiment, asked: Ladder, base: Experiment, growth: Growth, searches: bool
) -> Plan:
    """Return the plan of a rung's comparison, with the learning rates that the rule gives."""
    rate = growth.rate(base.rate, rung.number, rung.place)
    tried = tuple(growth.rate(r, rung.number, rung.place) or r for r in asked.options.rates(base.rate))
    options = replace(asked.options, learning_rates=tried if searches else tuple(filter(None, [rate])))
    return Plan.make(experiment.plain(), options, rate, experiment.seed)


def limits(outcomes: Sequence[Outcome]) -> list[bool]:
    """Return whether each rung is limited by its data: a validation loss has turned, or a test loss is as far above the
    one of the rung below."""
    found = []
    for before, own in zip([None, *outcomes], outcomes, strict=False):
        means = (
            [] if before is None else [(own.kinds[k].loss_S.mean(), before.kinds[k].loss_S.mean()) for k in own.kinds]
        )
        found.append(max(own.turned.values()) > TURN or any(now > (1 + TURN) * then for now, then in means))
    return found


def described(rung: Rung) -> str:
    """Return what a rung trains, in words."""
    grown = ", ".join(f"{name.rpartition('.')[2]} {json.dumps(value)}" for name, value in rung.values.items())
    return f"{rung.title}: {rung.flops:.2g} FLOPs, {rung.steps:,} steps{', ' if grown else ''}{grown}"
