"""How a table is described: which column is what, what is predicted, and how it is split."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass, field
from typing import Literal


@dataclass(frozen=True)
class TaskConfig:
    """One binary label.

    Attributes:
        column: of the table.
        positive: the values that are positive; None: the column holds 0 and 1 (or false and true).
        at_least: positive from this value on, such as 4 for a rating; not together with ``positive``.
    """

    column: str
    positive: tuple[str, ...] | None = None
    at_least: float | None = None


@dataclass(frozen=True)
class SplitConfig:
    """Which rows train, validate and test.

    Attributes:
        kind: "given": as the files have it; "random": rows; "user": all rows of a user fall on one side; "time": the
            last rows by time; "leave_last_out": of each user the last row tests, the one before validates.
        val: share of the training rows (of the users with "user") that validates, where the files give no validation.
        test: share of all rows that tests, where the files give no test; "given" and "leave_last_out" take none.
        stratify: task whose positives are shared out evenly over validation and training, with "given" and "random".
        seed: of what is drawn; its own, so that runs of other seeds have the same rows.
    """

    kind: Literal["given", "random", "user", "time", "leave_last_out"] = "random"
    val: float = 0.1
    test: float = 0.1
    stratify: str | None = None
    seed: int = 0


@dataclass(frozen=True)
class TableConfig:
    """The columns of a table by role. A column that has none is not read.

    Attributes:
        categorical: columns of one value a row.
        multi_valued: columns of any number of values a row: lists, or text that ``separator`` cuts.
        continuous: columns of numbers.
        tasks: the labels by the name of the task.
        domain: column of the scenario; None: there is one.
        user: column whose rows belong together, for a split by user and figures by user.
        time: column by which rows are ordered.
        hash_rows: rows of the table of a column whose ids are hashed, by column.
        min_count: values seen less often in training share the row of the unseen ones.
        separator: of the values in a text of a multi-valued column.
        split: how the rows are shared out.
    """

    categorical: tuple[str, ...] = ()
    multi_valued: tuple[str, ...] = ()
    continuous: tuple[str, ...] = ()
    tasks: Mapping[str, TaskConfig] = field(default_factory=dict)
    domain: str | None = None
    user: str | None = None
    time: str | None = None
    hash_rows: Mapping[str, int] = field(default_factory=dict)
    min_count: int = 1
    separator: str = "|"
    split: SplitConfig = SplitConfig()
