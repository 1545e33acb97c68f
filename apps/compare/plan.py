"""The plan of a comparison lists its units of work, and is saved so that only the same comparison goes on."""

from __future__ import annotations

import dataclasses
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path
from typing import Any

from apps.base.files import read_json, write_json
from apps.cli.classes import with_short_names
from apps.compare.options import Options
from apps.compare.training import Unit
from apps.equal_cost import routers
from apps.registry import renamed, today
from apps.runner.folder import check_same


@dataclass(frozen=True)
class Plan:
    """The work of a comparison.

    Attributes:
        config: resolved configuration, in plain values.
        options: options of the command.
        overlays: contents of each overlay of ``options.routers``, by the system's name.
        rates: learning rates of the search; empty where the model's has no name.
        configured_rate: learning rate of the configuration; None: the model's has no name, and none is searched.
        seeds: seeds of the final runs.
        search_seed: seed of the search; it differs from ``seeds``, so that no rate is chosen for their data order.
    """

    config: dict[str, Any]
    options: Options
    overlays: dict[str, Any]
    rates: tuple[float, ...]
    configured_rate: float | None
    seeds: tuple[int, ...]
    search_seed: int

    @classmethod
    def make(cls, config: dict[str, Any], options: Options, configured_rate: float | None, seed: int) -> Plan:
        """Return the plan of a configuration, or raise the ValueError of a wrong overlay."""
        seeds = tuple(range(seed, seed + options.num_seeds))
        overlays = {system: routers.read(name) for system, name in routers.by_system(options.routers).items()}
        rates = options.rates(configured_rate)
        return cls(config, options, overlays, rates, configured_rate, seeds, seed + SEARCH_SEED)

    def search_units(self, system: str) -> list[Unit]:
        """Return the runs of the learning-rate search; empty where there is nothing to choose."""
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
        of_work = {field.name: getattr(self.options, field.name) for field in dataclasses.fields(Options)}
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
            ValueError: the saved plan is that of another comparison; the message names the differences.
        """
        path, wanted = output / "plan.json", self.to_dict()
        saved = read_json(path)
        if saved is not None:
            saved["config"] = with_short_names(renamed(saved["config"], today))
            check_same(output, "comparison", _adapted(saved, wanted), wanted)
            overlays = {**(saved["options"]["routers"] or {}), **self.overlays}
            wanted = {**wanted, "options": {**wanted["options"], "routers": overlays}}
        write_json(path, wanted)


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
