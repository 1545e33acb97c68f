"""The command line of ``moesaic compare``, read and checked before anything heavy is imported."""

from __future__ import annotations

import math
from dataclasses import dataclass, fields
from pathlib import Path
from typing import Annotated, ClassVar

from apps.base.checks import check_at_least
from apps.cli.errors import UsageError
from apps.cli.flags import SECTIONS
from apps.cli.parser import CommandLine, Folder, Shown, config_file
from apps.equal_cost import routers

SEARCH_FACTORS = (1 / 3, 1.0, 3.0)
"""Default learning rates of the search, as multiples of the configured one."""


@dataclass(frozen=True, kw_only=True)
class CompareOptions:
    """The options of a comparison.

    Attributes:
        num_seeds: runs of each model at its chosen rate; seeds count up from the config's
        learning_rates: tried for each model; one: no search (default: the config's, a third and 3 times it)
        search_share: fraction of the configured training for each run of the search, in (0, 1] (default: 1)
        baselines: those to train, such as dense_equal_flops (default: all)
        rounds: timed rounds of speed and memory; 0 measures nothing and shows earlier measurements
        routers: also with the routers of these overlays, at equal active FLOPs: names of configs/routing, files, or
            all; no baselines then but those named
        baseline_minutes: minutes that boosted trees and similar baselines search their settings, once for all seeds

    Raises:
        ValueError: a value out of its range.
    """

    num_seeds: Annotated[int, Shown("N", words=("--seeds",))] = 3
    learning_rates: Annotated[tuple[float, ...], Shown("LR")] = ()
    search_share: float = 1.0
    baselines: tuple[str, ...] | None = None
    rounds: int = 5
    routers: tuple[str, ...] = ()
    baseline_minutes: float = 1.0

    def __post_init__(self) -> None:
        check_at_least(1, seeds=self.num_seeds)
        check_at_least(0, rounds=self.rounds)
        for rate in self.learning_rates:
            if not (rate > 0 and math.isfinite(rate)):
                raise ValueError(f"learning_rates: {rate:g} must be a positive number")
        if len(set(self.learning_rates)) != len(self.learning_rates):
            raise ValueError(f"learning_rates names a rate twice: {', '.join(f'{r:g}' for r in self.learning_rates)}")
        if not 0 < self.search_share <= 1:
            raise ValueError(f"search_share={self.search_share:g} must be above 0 and at most 1")
        if not (self.baseline_minutes > 0 and math.isfinite(self.baseline_minutes)):
            raise ValueError(f"baseline_minutes={self.baseline_minutes:g} must be a positive number")

    def rates(self, configured: float | None) -> tuple[float, ...]:
        """Return the learning rates to try, ascending, to three digits; none where the configured one is None.

        Raises:
            ValueError: rates are given, and the model's has no name.
        """
        if configured is None:
            if self.learning_rates:
                raise ValueError(
                    f"learning_rates={self.learning_rates[0]:g}: no argument of the model is called lr or "
                    "learning_rate; name it by sparsify.learning_rate"
                )
            return ()
        tried = self.learning_rates or tuple(float(f"{factor * configured:.3g}") for factor in SEARCH_FACTORS)
        return tuple(sorted(tried))


@dataclass(frozen=True, kw_only=True)
class Command(CompareOptions, CommandLine):
    """Train the sparse model of a configuration and dense ones of equal cost on the same data and steps, each with the
    same learning-rate search on validation data, and compare them on test data.

    Any value of the configuration may be given as well, as for moesaic fit: --trainer.max_epochs 5,
    --model.moe.num_experts 16, --seed_everything 7. Stopped at any moment, the same command resumes. A comparison,
    finished or not, takes more --seeds, and other --baselines and --routers: new runs are done, and runs that are not
    named are kept but left out of the table. With --rounds 0 a finished one is printed again, and nothing is trained or
    measured.

    moesaic compare --suite FILE does a queue of comparisons and writes a leaderboard: compare --suite FILE --help.

    Attributes:
        config: configuration of the sparse model
        overlays: another configuration over it, such as configs/debug.yaml; may be given again
        output: folder of the comparison (default: runs/compare/<config name>)
        jobs: runs at a time; each gets a share of the cores, which suits small models
        open: show the report in the browser

    Raises:
        UsageError: a configuration that is missing.
        ValueError: a value out of its range, or an unknown router.
    """

    prog: ClassVar[str] = "moesaic compare"
    sections: ClassVar[tuple[str, ...]] = SECTIONS

    config: Annotated[Path, Shown("CONFIG", words=("config",), read=config_file)]
    overlays: Annotated[tuple[Path, ...], Shown("FILE", words=("--overlay",), read=config_file, one_each=True)] = ()
    output: Folder | None = None
    jobs: int = 1
    open: bool = False

    def __post_init__(self) -> None:
        if self.jobs < 1:
            raise UsageError(f"--jobs {self.jobs} must be at least 1")
        super().__post_init__()
        assert self.options  # an unknown router is an error before anything heavy is imported

    @property
    def options(self) -> CompareOptions:
        """The options of the comparison, with the routers' names; with routers, only named baselines."""
        own = {field.name: getattr(self, field.name) for field in fields(CompareOptions)}
        own["routers"] = routers.resolve(self.routers)
        own["baselines"] = () if self.baselines is None and own["routers"] else self.baselines
        return CompareOptions(**own)

    @property
    def named(self) -> frozenset[str]:
        """Systems that are asked for by name, which must not be left out."""
        own = routers.by_system(router for router in self.options.routers if router in self.routers)
        return frozenset((*(self.baselines or ()), *own))

    @property
    def name(self) -> str:
        """Name of the comparison, made of the names of the configurations."""
        return "-".join(path.stem for path in (self.config, *self.overlays))

    @property
    def folder(self) -> Path:
        """Folder of the comparison."""
        return self.output or Path("runs") / "compare" / self.name
