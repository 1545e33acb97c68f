"""The suite file: boards, each with models that are trained on the same data, read and checked before any training.

::

    title: Recommenders
    seeds: 3
    boards:
      - name: Census-Income
        config: configs/recsys/census_income.yaml
        metrics: [auc_income, auc_never_married]
        baselines: [shared_bottom_equal_flops, hist_gradient_boosting]
        models:
          - name: MMoE, dense gates
          - {name: MMoE, 4 experts, values: {model.shared.num_experts: 4}}
          - {name: PLE, config: configs/recsys/census_ple.yaml}
      - {name: Orders, data: shop.csv, target: [spend90], time: ts, models: [{name: sparse}], baselines: [lightgbm]}
"""

from __future__ import annotations

import dataclasses
import functools
import hashlib
import json
import math
import re
from collections.abc import Mapping, Sequence
from dataclasses import dataclass, field, replace
from functools import cached_property
from pathlib import Path
from types import UnionType
from typing import Annotated, Any, ClassVar, TypeVar, get_args, get_origin, get_type_hints

import yaml

from apps.base.checks import check_at_least
from apps.base.files import write_text
from apps.base.messages import excerpt, unknown_name
from apps.cli.classes import with_long_names
from apps.cli.configs import at, merge, read_config, shipped
from apps.cli.errors import UsageError
from apps.cli.parser import CommandLine, Folder, Shown
from apps.data.given import GivenData
from apps.registry import differences

T = TypeVar("T")

_PLACES = ("root", "cache_dir", "num_workers")
"""Options of data that say where they lie and how they are read, and change no figure."""

_LOADING = (*_PLACES, "batch_size", "eval_batch_size", "drop_last", "seed", "exclude")
"""Options of data on which the test examples do not depend."""


@dataclass(frozen=True)
class Entry:
    """One row of a board: a configuration, or a baseline of one.

    Attributes:
        board: name of the board.
        name: name of the row, which no other of the board has.
        files: configuration, and the overlays over it.
        values: values over both, by dotted name.
        baseline: name of the baseline of that configuration; None: the configuration's own model.
        baseline_minutes: time in which a baseline without learning rate, such as boosted trees, searches its settings.
        minutes: estimated minutes of one run; None: no estimate.
    """

    board: str
    name: str
    files: tuple[str, ...]
    values: Mapping[str, Any] = field(default_factory=dict)
    baseline: str | None = None
    baseline_minutes: float = 1.0
    minutes: float | None = None

    @property
    def title(self) -> str:
        return f"{self.board}: {self.name}"

    @cached_property
    def written(self) -> dict[str, Any]:
        """Return the combined settings of the files and the values, without the defaults that they leave."""
        config: dict[str, Any] = {}
        for name in self.files:
            config = merge(config, with_long_names(read_config(shipped(Path(name)))))
        for dotted, value in self.values.items():
            for key in reversed(dotted.split(".")):
                value = {key: value}
            config = merge(config, value)
        return config

    @property
    def data(self) -> dict[str, Any]:
        """Return their settings of the data: the class and its options."""
        data = self.written.get("data")
        data = dict(data) if isinstance(data, Mapping) else {"class_path": data}
        return {**data, "init_args": data.get("init_args") or {}}

    @property
    def identity(self) -> dict[str, Any]:
        """Return everything that the figures of the row depend on, as plain values."""
        options = {name: value for name, value in self.data["init_args"].items() if name not in _PLACES}
        config = {**self.written, "data": {**self.data, "init_args": options}}
        config.pop("ladder", None)  # no single training reads it
        return {"config": json.loads(json.dumps(config, default=str)), "baseline": self.baseline}

    @property
    def rest(self) -> tuple[str, ...]:
        """Return the values as words of a command line."""
        words = (
            (f"--{key}", value if isinstance(value, str) else json.dumps(value)) for key, value in self.values.items()
        )
        return tuple(word for pair in words for word in pair)

    @property
    def seed(self) -> int:
        """Return the first seed, by the rule of ``Experiment``."""
        seed = self.written.get("seed_everything")
        return seed if isinstance(seed, int) and not isinstance(seed, bool) else 0

    def folder(self, runs: Path) -> Path:
        """Return the folder of its runs: another configuration under the same name has another one."""
        digest = hashlib.sha256(json.dumps(self.identity, sort_keys=True).encode()).hexdigest()[:8]
        return runs / slug(self.board) / f"{slug(self.name)}-{digest}"


@dataclass(frozen=True)
class Model:
    """A model of a board, as the suite file has it.

    Attributes:
        name: its name in the tables.
        config: its configuration; None: the board's.
        overlays: configurations over it.
        values: values over all of these, by dotted name, such as ``{model.optimizer.lr: 0.01}``.
        baselines: names of baselines of this model that are rows too.
        minutes: estimated minutes of one run, and of one of each of its baselines.
    """

    name: str
    config: str | None = None
    overlays: tuple[str, ...] = ()
    values: Mapping[str, Any] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    minutes: float | None = None

    def __post_init__(self) -> None:
        if self.minutes is not None and not self.minutes > 0:
            raise ValueError(f"minutes={self.minutes} must be above 0")


@dataclass(frozen=True)
class Board:
    """Models on the same data, with the same test examples.

    Attributes:
        name: its heading.
        models: the models.
        config: the configuration that its models start with; empty: that of ``data``, which is written into the folder
            of the runs, once. Each seed then has a split of its own.
        data: a table, or other data that `moesaic verdict` takes.
        target: columns of the table to predict; empty: the likeliest one.
        time: column of the table by which it is split; None: not by time.
        user: column of the table whose rows of a value are in one split; None: not by it.
        about: sentences on data and protocol, shown above the table.
        values: values over the configurations of all models, by dotted name.
        baselines: names of baselines of ``config`` that are rows too.
        metrics: test metrics, without the split; the first one ranks. Empty: the one that the models monitor.
        lower_is_better: True where a lower value of the first metric is better.
        must_agree: further options in which the models must agree, by dotted name, such as ``model.exclude_seen``.
        may_differ: options of the data in which they may differ, since the test examples do not depend on them.
        baseline_minutes: time in which a baseline without learning rate searches its settings, once for all seeds.
        minutes: estimated minutes of one run of a row that has no estimate of its own.
    """

    name: str
    models: tuple[Model, ...]
    config: str = ""
    data: str | None = None
    target: tuple[str, ...] = ()
    time: str | None = None
    user: str | None = None
    about: str = ""
    values: Mapping[str, Any] = field(default_factory=dict)
    baselines: tuple[str, ...] = ()
    metrics: tuple[str, ...] = ()
    lower_is_better: bool = False
    must_agree: tuple[str, ...] = ()
    may_differ: tuple[str, ...] = ()
    baseline_minutes: float = 1.0
    minutes: float | None = None

    def __post_init__(self) -> None:
        if not self.models:
            raise ValueError(f"the board {self.name!r} has no models")
        if not self.config and self.data is None:
            raise ValueError(f"the board {self.name!r} has neither config nor data")
        if self.config and self.data is not None:
            raise ValueError(f"the board {self.name!r} has a config and data: leave out one")
        if not self.baseline_minutes > 0:
            raise ValueError(f"baseline_minutes={self.baseline_minutes} must be above 0")
        _check_once([entry.name for entry in self.entries], f"rows of the board {self.name!r}")

    @cached_property
    def entries(self) -> tuple[Entry, ...]:
        """Return the rows: each model with its own baselines, then the baselines of the board's configuration."""
        rows = []
        for model in self.models:
            files = (model.config or self.config, *model.overlays)
            values = {**self.values, **model.values}
            minutes = model.minutes or self.minutes
            own = Entry(self.name, model.name, files, values, None, self.baseline_minutes, minutes)
            rows += [own, *(self._baseline(own, name, f"{model.name}: {name}") for name in model.baselines)]
        whole = Entry(self.name, "", (self.config,), self.values, None, self.baseline_minutes, self.minutes)
        return (*rows, *(self._baseline(whole, name, name) for name in self.baselines))

    def of_data(self, folder: Path, seeds: int) -> Board:
        """Return the board with the configuration of its ``data``, which is written to ``folder`` if it is not there.

        Raises:
            UsageError: the data are missing.
            ValueError: no app knows the data.
        """
        if self.data is None:
            return self
        path = folder / "configs" / f"{slug(self.name)}.yaml"
        if not path.exists():
            from apps.task.task import config_of

            if not Path(self.data).exists():
                raise UsageError(f"the board {self.name!r}: no file or folder {self.data}")
            first, *more = self.target or (None,)
            links = path.with_suffix("")
            given = GivenData(
                (Path(self.data),), first, links, time=self.time, user=self.user, more_targets=tuple(more)
            )
            config = {"seed_everything": 0, **config_of(given).config}
            if table := config["data"]["init_args"].get("table"):
                table["split"]["origins"] = seeds
            write_text(path, yaml.safe_dump(config, sort_keys=False))
        return replace(self, config=path.as_posix(), data=None)

    @staticmethod
    def _baseline(entry: Entry, baseline: str, name: str) -> Entry:
        return dataclasses.replace(entry, name=name, baseline=baseline)

    def check_protocol(self) -> None:
        """Read the configurations of all rows, and reject rows that are not tested alike.

        Raises:
            UsageError: a configuration is missing, or is none.
            ValueError: two rows have other data, another split, or differ in what ``must_agree`` names.
        """
        first, *others = self.entries
        free = (*(f"data.{name}" for name in _LOADING), *self.may_differ)
        for other in others:
            for where, a, b in differences(first.data, other.data, "data"):
                if not any(f"{where}.".startswith(f"{name}.") for name in free):
                    self._refuse(where, first, a, other, b)
            for where in self.must_agree:
                a, b = (at(entry.written, where.split(".")) for entry in (first, other))
                if a != b:
                    self._refuse(where, first, a, other, b)

    def _refuse(self, where: str, first: Entry, a: Any, other: Entry, b: Any) -> None:
        raise ValueError(
            f"board {self.name!r}: {other.name!r} has {where}={excerpt(b)}, and {first.name!r} has {excerpt(a)}: the "
            "rows of a board share data, split and test examples"
        )


@dataclass(frozen=True)
class Suite:
    """A suite file.

    Attributes:
        title: heading of the leaderboard.
        boards: its boards.
        about: sentences shown below the heading.
        seeds: number of runs of each row; seeds count up from the configuration's.
        runs: folder of the runs; empty: ``runs/suites/<name of the file>``.
        figures: folder of the figures of finished runs, one JSON file per board; empty: one in the folder of the runs.
        leaderboard: Markdown file of the leaderboard; empty: ``leaderboard.md`` in the folder of the runs.
        path: the suite file, as the command line names it.
        chosen: names of the boards that are trained; None: all.
    """

    title: str
    boards: tuple[Board, ...]
    about: str = ""
    seeds: int = 3
    runs: str = ""
    figures: str = ""
    leaderboard: str = ""
    path: str = ""
    chosen: tuple[str, ...] | None = None

    def __post_init__(self) -> None:
        if not self.boards:
            raise ValueError("a suite needs at least one board")
        check_at_least(1, seeds=self.seeds)
        _check_once([slug(board.name) for board in self.boards], "boards")

    @classmethod
    def read(cls, path: Path) -> Suite:
        """Read a suite file and the configurations that it names.

        Raises:
            UsageError: a file that is missing or is not a configuration, or an unknown key.
            ValueError: a value that breaks a rule, two rows of one name, or rows that are not tested alike.
        """
        try:
            suite = dataclasses.replace(_made(cls, read_config(shipped(path)), ""), path=path.as_posix())
            boards = tuple(board.of_data(suite.runs_folder, suite.seeds) for board in suite.boards)
            suite = dataclasses.replace(suite, boards=boards)
            for board in suite.boards:
                board.check_protocol()
        except ValueError as error:  # a UsageError is one
            raise type(error)(f"{path}: {error}") from None
        return suite

    @property
    def runs_folder(self) -> Path:
        return Path(self.runs) if self.runs else Path("runs") / "suites" / Path(self.path).stem

    @property
    def figures_folder(self) -> Path:
        return Path(self.figures) if self.figures else self.runs_folder / "figures"

    @property
    def leaderboard_file(self) -> Path:
        return Path(self.leaderboard) if self.leaderboard else self.runs_folder / "leaderboard.md"

    def with_boards(self, names: Sequence[str]) -> Suite:
        """Return the suite, of which the boards ``names`` alone are trained.

        Raises:
            UsageError: the board does not exist.
        """
        known = [board.name for board in self.boards]
        for name in names:
            if name not in known:
                raise UsageError(unknown_name("boards", name, known))
        return dataclasses.replace(self, chosen=tuple(names))

    def command(self, *more: str) -> list[str]:
        """Return the words of the command that continues with the suite."""
        return ["moesaic", "compare", "--suite", self.path, *more]

    def seeds_of(self, entry: Entry) -> tuple[int, ...]:
        return tuple(range(entry.seed, entry.seed + self.seeds))


def slug(name: str) -> str:
    """Return a name as a part of a path: "MMoE, dense gates" is "mmoe_dense_gates"."""
    return re.sub(r"[^a-z0-9]+", "_", name.lower()).strip("_") or "unnamed"


def _check_once(names: Sequence[str], what: str) -> None:
    for name in names:
        if names.count(name) > 1:
            raise ValueError(f"two {what} are called {name!r}: give each a name of its own")


_OF_THE_COMMAND = ("path", "chosen")
"""Fields of a suite that its file does not have."""

_KINDS = {str: "a text", int: "an integer", float: "a number", bool: "true or false", Mapping: "a mapping"}
"""What messages call a value."""


def _made(kind: type[T], given: Any, where: str) -> T:
    """Return a suite, a board or a model from plain values.

    Args:
        kind: the class.
        given: its fields, as they are in the file.
        where: dotted name of its place, for messages.

    Raises:
        UsageError: an unknown key, a missing one, or a value of another kind.
        ValueError: a value that breaks a rule of the class.
    """
    what = f"a {kind.__name__.lower()}"
    place = f"{where}: " if where else ""
    if not isinstance(given, Mapping):
        raise UsageError(f"{where}={excerpt(given)} is not {what}: a mapping of its keys")
    fields = {f.name: f for f in dataclasses.fields(kind) if f.name not in _OF_THE_COMMAND}  # type: ignore[arg-type]
    for key in given:
        if key not in fields:
            raise UsageError(place + unknown_name(f"key of {what}", str(key), list(fields)))
    for name, f in fields.items():
        if name not in given and f.default is f.default_factory is dataclasses.MISSING:
            raise UsageError(f"{place}{what} needs {name!r}")
    hints, start = get_type_hints(kind), f"{where}." if where else ""
    values = {name: _value(value, hints[name], f"{start}{name}") for name, value in given.items()}
    try:
        return kind(**values)
    except ValueError as error:
        raise type(error)(f"{place}{error}") from None


def _value(value: Any, hint: Any, where: str) -> Any:
    """Return the value of a field of this type, lists as tuples."""
    if get_origin(hint) is tuple:
        if not isinstance(value, list):
            raise UsageError(f"{where}={excerpt(value)} is not a list")
        return tuple(_value(item, get_args(hint)[0], f"{where}.{i}") for i, item in enumerate(value))
    if dataclasses.is_dataclass(hint):
        return _made(hint, value, where)  # type: ignore[arg-type]
    kinds = get_args(hint) if isinstance(hint, UnionType) else (get_origin(hint) or hint,)
    accepted = (*kinds, int) if float in kinds else kinds
    if not isinstance(value, accepted) or (isinstance(value, bool) and bool not in kinds):
        raise UsageError(f"{where}={excerpt(value)} is not {_KINDS[kinds[0]]}")
    return value


@dataclass(frozen=True)
class Command(CommandLine):
    """Train the models of a suite file, each with several seeds at the learning rate of its configuration, and write a
    leaderboard: the boards with their test figures and costs, as Markdown and as one HTML file.

    Stopped at any moment, the same command resumes: a finished run is not trained again, and an unfinished one resumes
    from its last checkpoint. The figures of finished runs are JSON files; with them, the folders of the runs are no
    longer needed. With --minutes 0 nothing is trained, and the leaderboard is written again.

    Attributes:
        file: the suite file, such as configs/suites/recommenders.yaml
        boards: train only these boards; the leaderboard still has all
        minutes: stop after so long, keeping the unfinished run (default: no limit)
        figures: folder of the figures of finished runs (default: the suite file's)
        output: folder of the runs (default: the suite file's)
        rounds: timed rounds of speed and memory; 0: none
        open: show the page in the browser

    Raises:
        UsageError: a suite file that is missing or is none.
        ValueError: a value out of its range, or a suite that breaks a rule.
    """

    prog: ClassVar[str] = "moesaic compare"

    file: Annotated[Path, Shown("FILE", words=("--suite",))]
    boards: tuple[str, ...] = ()
    minutes: float | None = None
    figures: Folder | None = None
    output: Folder | None = None
    rounds: int = 5
    open: bool = False

    def __post_init__(self) -> None:
        if self.minutes is not None and not (self.minutes >= 0 and math.isfinite(self.minutes)):
            raise UsageError(f"--minutes {self.minutes:g} must not be negative")
        if self.rounds < 0:
            raise UsageError(f"--rounds {self.rounds} must not be negative")
        assert self.suite  # a wrong file is an error before anything heavy is imported

    @functools.cached_property
    def suite(self) -> Suite:
        """The suite, with the folders and boards that the command line gives."""
        suite = Suite.read(self.file)
        suite = suite.with_boards(self.boards) if self.boards else suite
        return replace(suite, runs=str(self.output or suite.runs), figures=str(self.figures or suite.figures))
