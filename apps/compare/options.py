"""The command line of ``moesaic compare``, read and checked before anything heavy is imported."""

from __future__ import annotations

import argparse
import math
from collections.abc import Sequence
from dataclasses import dataclass
from pathlib import Path

from apps.base.checks import check_at_least
from apps.cli.configs import read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.parser import Parser
from apps.equal_cost import routers

SEARCH_FACTORS = (1 / 3, 1.0, 3.0)
"""Default learning rates of the search, as multiples of the configured one."""

_DESCRIPTION = """\
Train the sparse model of a configuration and dense ones of equal cost on the same data and steps, each with the same
learning-rate search on validation data, and compare them on test data."""

_EPILOG = """\
Any value of the configuration may be given as well, as for moesaic fit: --trainer.max_epochs 5,
--model.moe.num_experts 16, --seed_everything 7. Stopped at any moment, the same command goes on. A comparison, finished
or not, takes more --seeds, and other --baselines and --routers: what is new is done, and what is not named is left out
of the table and kept. With --rounds 0 a finished one is printed again, and nothing is trained or measured.

moesaic compare --suite FILE does a queue of comparisons and writes a leaderboard: compare --suite FILE --help."""


@dataclass(frozen=True)
class Options:
    """The options of a comparison.

    Attributes:
        num_seeds: number of training runs a system at its chosen rate; seeds count up from the config's.
        learning_rates: rates tried for each system; empty takes ``SEARCH_FACTORS``; a single one needs no search.
        search_share: part of the configured training that a run of the search has, in (0, 1].
        baselines: names of the wanted baselines; None for all.
        rounds: timed rounds of training and of inference; 0 measures nothing and shows earlier measurements.
        routers: overlays whose routers are compared too, by name or path.
        baseline_minutes: time in which a baseline without learning rate, such as boosted trees, searches its settings.

    Raises:
        ValueError: a value out of its range.
    """

    num_seeds: int = 3
    learning_rates: tuple[float, ...] = ()
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


@dataclass(frozen=True)
class Command:
    """A command line of ``moesaic compare``, checked without making the model.

    Attributes:
        files: configuration, and the overlays over it.
        rest: values of the configuration, ``--KEY.SUBKEY VALUE``.
        options: options of the comparison.
        output: folder of the comparison.
        name: name of the comparison, made of the names of the files.
        jobs: number of runs at a time.
        named: systems that are asked for by name, which must not be left out.
        opens: the report is shown in the browser.
    """

    files: tuple[Path, ...]
    rest: tuple[str, ...]
    options: Options
    output: Path
    name: str
    jobs: int
    named: frozenset[str] = frozenset()
    opens: bool = False

    @classmethod
    def read(cls, argv: Sequence[str]) -> Command:
        """Read ``argv``, the arguments after ``moesaic compare``.

        Raises:
            UsageError: an unknown option, or a file that is not there.
            ValueError: a value out of its range, or an unknown router.
        """
        args, rest = command_line().parse_known_args(list(argv))
        for number, word in enumerate(rest):
            is_value = bool(number) and not word.startswith("--") and "=" not in rest[number - 1]
            if not (is_value or (word.startswith("--") and ("." in word or word.startswith("--seed_everything")))):
                raise UsageError(f"{word} is no option of moesaic compare (--help lists them)")
        if args.jobs < 1:
            raise UsageError(f"--jobs {args.jobs} must be at least 1")
        files = tuple(Path(p) for p in (args.config, *args.overlays))
        for path in files:
            read_config(shipped(path))  # a missing or wrong one is refused here, before anything heavy
        names = routers.resolve(args.routers)
        baselines = args.baselines if args.baselines is not None or not names else []
        options = Options(
            num_seeds=args.seeds,
            learning_rates=tuple(args.learning_rates),
            search_share=args.search_share,
            baselines=None if baselines is None else tuple(baselines),
            rounds=args.rounds,
            routers=names,
            baseline_minutes=args.baseline_minutes,
        )
        name = "-".join(path.stem for path in files)
        output = Path(args.output) if args.output else Path("runs") / "compare" / name
        if output.exists() and not output.is_dir():
            raise UsageError(f"--output {output} is a file, not a folder")
        own = routers.by_system(router for router in names if router in args.routers)
        named = frozenset((*(args.baselines or ()), *own))
        return cls(files, tuple(rest), options, output, name, args.jobs, named, args.open)


def command_line() -> Parser:
    parser = Parser(
        prog="moesaic compare",
        allow_abbrev=False,
        formatter_class=argparse.RawDescriptionHelpFormatter,
        description=_DESCRIPTION,
        epilog=_EPILOG,
    )
    add = parser.add_argument
    add("config", help="configuration of the sparse model")
    overlay = "another configuration over it, such as configs/debug.yaml; may be given again"
    add("--config", "-c", dest="overlays", action="append", default=[], metavar="FILE", help=overlay)
    add("--output", metavar="DIR", help="folder of the comparison (default: runs/compare/<config name>)")
    add("--seeds", type=int, default=3, metavar="N", help="runs of each model (default: 3)")
    add("--baselines", nargs="+", metavar="NAME", help="those to train, such as dense_equal_flops (default: all)")
    each = "also with the routers of these overlays, at equal active FLOPs: names of configs/routing, files, or all"
    add("--routers", nargs="+", metavar="NAME", default=[], help=f"{each}; no baselines then but those named")
    rates = "tried for each model; one: no search (default: the config's, a third and 3 times it)"
    add("--learning_rates", nargs="+", type=float, default=[], metavar="LR", help=rates)
    share = "part of the training that a run of the search has (default: 1)"
    add("--search_share", type=float, default=1.0, metavar="SHARE", help=share)
    minutes = "for which boosted trees and the like search their settings, each once for all seeds (default: 1)"
    add("--baseline_minutes", type=float, default=1.0, metavar="M", help=minutes)
    rounds = "timed rounds of speed and memory; 0 measures nothing and shows what was measured (default: 5)"
    add("--rounds", type=int, default=5, metavar="N", help=rounds)
    jobs = "runs at a time; each has its part of the cores, which small models use better so (default: 1)"
    add("--jobs", type=int, default=1, metavar="N", help=jobs)
    add("--open", action="store_true", help="show the report in the browser")
    return parser
