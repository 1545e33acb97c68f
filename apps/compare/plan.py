"""The plan of a comparison: its options, what is saved of them, and the order of the work."""

from __future__ import annotations

import dataclasses
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps import routers
from apps.compare.files import differences, read_json, write_json
from apps.compare.training import Unit

SEARCH_FACTORS = (1 / 3, 1.0, 3.0)
"""The learning rates tried, over the configured one."""


@dataclass(frozen=True)
class Options:
    """What ``moesaic compare`` was asked.

    Attributes:
        num_seeds: training runs a system at its chosen rate; seeds are the config's, one after another.
        learning_rates: tried for each system; empty: the config's, a third and three times it; one: no search.
        search_share: part of the configured training that a run of the search has, in (0, 1].
        baselines: names of those wanted; None: all.
        routers: overlays whose routers are compared too, by name or path.
        rounds: timed rounds of training and of inference; 0: speed and memory are not measured.

    Raises:
        ValueError: a value out of its range.
    """

    num_seeds: int = 3
    learning_rates: tuple[float, ...] = ()
    search_share: float = 1.0
    baselines: tuple[str, ...] | None = None
    rounds: int = 5
    routers: tuple[str, ...] = ()

    def __post_init__(self) -> None:
        if self.num_seeds < 1:
            raise ValueError(f"seeds={self.num_seeds} must be at least 1")
        for rate in self.learning_rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"learning_rates: {rate:g} must be a positive number")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise ValueError(f"learning_rates names a rate twice: {', '.join(f'{r:g}' for r in self.learning_rates)}")
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share={self.search_share:g} must be above 0 and at most 1")
        if self.rounds < 0:
            raise ValueError(f"rounds={self.rounds} must not be negative")

    def rates(self, configured: float) -> tuple[float, ...]:
        """The learning rates to try, ascending, to three digits."""
        tried = self.learning_rates or tuple(float(f"{factor * configured:.3g}") for factor in SEARCH_FACTORS)
        return tuple(sorted(tried))


@dataclass(frozen=True)
class Plan:
    """What is done, once the config is read.

    Attributes:
        config: the resolved configuration, plain values.
        options: of the command.
        overlays: by the system's name, what each overlay of ``options.routers`` says.
        rates: learning rates of the search.
        configured_rate: the config's.
        seeds: of the final runs.
        search_seed: of the search: none of ``seeds``, whose data order it must not have chosen a rate for.
    """

    config: dict[str, Any]
    options: Options
    overlays: dict[str, Any]
    rates: tuple[float, ...]
    configured_rate: float
    seeds: tuple[int, ...]
    search_seed: int

    @classmethod
    def make(cls, config: dict[str, Any], options: Options, configured_rate: float, seed: int) -> Plan:
        """The plan of a configuration.

        Raises:
            ValueError: as ``routers.read`` and ``routers.by_system``.
        """
        seeds = tuple(range(seed, seed + options.num_seeds))
        overlays = {system: routers.read(name) for system, name in routers.by_system(options.routers).items()}
        rates = options.rates(configured_rate)
        return cls(config, options, overlays, rates, configured_rate, seeds, seed + SEARCH_SEED)

    def search_units(self, system: str) -> list[Unit]:
        """The runs of the learning-rate search; none where there is nothing to choose."""
        if len(self.rates) < 2:
            return []
        return [Unit(system, rate, self.search_seed, self.options.search_share) for rate in self.rates]

    def final_units(self, system: str, rate: float | None) -> list[Unit]:
        return [Unit(system, rate, seed, final=True) for seed in self.seeds]

    def to_dict(self) -> dict[str, Any]:
        options = {k: list(v) if isinstance(v, tuple) else v for k, v in dataclasses.asdict(self.options).items()}
        return {
            "options": {**options, "routers": self.overlays},
            "rates": list(self.rates),
            "seeds": list(self.seeds),
            "search_seed": self.search_seed,
            "config": self.config,
        }

    def claim(self, output: Path) -> None:
        """Save the plan in ``output``. One that is saved there may lack seeds, baselines and routers, no more.

        Raises:
            ValueError: it is another; the message names the differences.
        """
        path, wanted = output / "plan.json", self.to_dict()
        saved = read_json(path)
        found = [] if saved is None else differences(_grown(saved, wanted), wanted)
        if found:
            more = f" and {len(found) - 3} more" if len(found) > 3 else ""
            raise ValueError(
                f"{output} holds another comparison ({'; '.join(found[:3])}{more}): give another --output, or delete it"
            )
        write_json(path, wanted)


def _grown(saved: dict[str, Any], wanted: dict[str, Any]) -> dict[str, Any]:
    """``saved`` with the seeds, baselines and routers of ``wanted``, each where they hold all of its own.

    A unit of work depends on none of these but its own, so what is finished stays.
    """
    had, has = saved["options"], wanted["options"]
    options, seeds = dict(had), saved["seeds"]
    if set(seeds) <= set(wanted["seeds"]):
        options["num_seeds"], seeds = has["num_seeds"], wanted["seeds"]
    fewer, more = had["baselines"], has["baselines"]
    if fewer is not None and (more is None or set(fewer) <= set(more)):
        options["baselines"] = more
    kept = {name: has["routers"].get(name) for name in had["routers"]}
    if not differences(had["routers"] or {}, kept):
        options["routers"] = has["routers"]
    return {**saved, "options": options, "seeds": seeds}


SEARCH_SEED = 1000
"""Added to the config's seed for the search."""


def at_edge(rate: float, rates: Sequence[float]) -> bool:
    """Whether a better rate may lie outside the tried ones."""
    return len(rates) > 1 and rate in (min(rates), max(rates))
