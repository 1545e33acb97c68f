"""The choice of the rows of a table that train, validate and test.

Draws come from numpy's ``RandomState``, whose stream numpy guarantees to keep: a split is the same on every machine and
with every version.
"""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import numpy as np
from numpy.typing import NDArray

from apps.recsys.schema import SplitConfig

Rows = NDArray[np.int64]


@dataclass(frozen=True)
class Splits:
    """Row numbers of each split, ascending; no row is in two of them.

    Attributes:
        train, val, test: int64. val and test are empty if the configuration wants none.
        in_gap: number of rows that ``split.gap`` leaves out.
        later: number of rows after the test window of ``split.origin``.
    """

    train: Rows
    val: Rows
    test: Rows
    in_gap: int = 0
    later: int = 0


def split_rows(
    config: SplitConfig,
    num_train: int,
    num_val: int | None = None,
    num_test: int | None = None,
    *,
    group: NDArray[np.int64] | None = None,
    time: NDArray[np.int64] | NDArray[np.float64] | None = None,
    label: NDArray[np.float64] | None = None,
    time_name: str = "",
) -> Splits:
    """Share out the rows of up to three files, numbered one after the other: training, validation, test.

    Args:
        config: the rules.
        num_train: rows of the first file, from which the splits without a file are taken.
        num_val: rows of the validation file; None: there is none.
        num_test: rows of the test file; None: there is none.
        group: (num_train,) users or other groups as numbers, for the kinds "user", "group" and "leave_last_out".
        time: (num_train,) times for the kinds "time" and "leave_last_out", int64 microseconds or float64 numbers; with
            ``split.gap`` of all files' rows. None: the order of the rows.
        label: (num_train,) labels of the task to stratify by, NaN if missing.
        time_name: column of the times, for messages.

    Raises:
        ValueError: a split that must hold rows would be empty, or the kind has no use for a file, or the gap does not
            fit the times.
    """
    given_val = None if num_val is None else num_train + np.arange(num_val)
    given_test = None if num_test is None else num_train + (num_val or 0) + np.arange(num_test)
    kind = config.kind
    if kind == "leave_last_out":
        if given_val is not None or given_test is not None:
            raise ValueError("split.kind='leave_last_out' draws every split itself: leave out val_file and test_file")
        assert group is not None
        drawn = _leave_last_out(config, group, time)
    elif kind in ("user", "group"):
        assert group is not None
        drawn = _by_group(config, group, given_val is None, given_test is None)
    elif kind == "time":
        assert time is not None
        if config.origins > 1 and given_test is not None:
            raise ValueError(f"split.origins={config.origins} cuts test windows itself: leave out test_file")
        drawn = _by_time(config, time[:num_train], given_val is None, given_test is None)
    else:
        if kind == "given" and given_test is None:
            raise ValueError("split.kind='given' needs test rows in a file of their own (test_file), and there is none")
        drawn = _at_random(config, num_train, label, given_val is None, given_test is None)
    train, val, test = drawn
    val = val if given_val is None else given_val
    test = test if given_test is None else given_test
    later = 0 if kind != "time" else num_train - sum(map(len, drawn))
    before_gap = len(train) + len(val)
    if config.gap is not None:
        assert time is not None
        gap = config.gap_in(np.issubdtype(time.dtype, np.integer), time_name)
        train, val = _before(train, np.concatenate((val, test)), time, gap), _before(val, test, time, gap)
    wanted = {
        "training": (train, True),
        "validation": (val, given_val is not None or config.val > 0),
        "test": (test, given_test is not None or config.test > 0 or kind == "leave_last_out"),
    }
    for name, (part, must) in wanted.items():
        if must and not len(part):
            gap_text = "" if config.gap is None else f", gap={config.gap!r}"
            raise ValueError(
                f"the {name} split is empty: split.kind={kind!r}, val={config.val}, test={config.test}{gap_text} on "
                f"{num_train} rows"
            )
    return Splits(np.sort(train), np.sort(val), np.sort(test), before_gap - len(train) - len(val), later)


def _before(rows: Rows, later: Rows, time: NDArray[Any], gap: float) -> Rows:
    """Return the rows that are more than ``gap`` earlier than the first of the later ones."""
    return rows[time[rows] < time[later].min() - gap] if len(later) else rows


def _by_time(config: SplitConfig, time: NDArray[Any], draw_val: bool, draw_test: bool) -> tuple[Rows, Rows, Rows]:
    """Return the rows that train, validate and test, of which rows of equal time are on one side, the later one."""
    order = np.argsort(time, kind="stable")
    ascending = time[order]

    def cut(place: int) -> int:
        return place if place >= len(order) else int(np.searchsorted(ascending, ascending[place]))

    num_test = round(config.test * len(order)) if draw_test else 0
    windows_after = 0 if config.origin is None else config.origins - 1 - config.origin
    end = cut(len(order) - windows_after * num_test)
    begin = cut(len(order) - (windows_after + 1) * num_test)
    begin_val = cut(begin - (round(config.val * begin) if draw_val else 0))
    return order[:begin_val], order[begin_val:begin], order[begin:end]


def _at_random(
    config: SplitConfig, num: int, label: NDArray[np.float64] | None, draw_val: bool, draw_test: bool
) -> tuple[Rows, Rows, Rows]:
    order = np.random.RandomState(config.drawn_by).permutation(num)
    if label is not None:
        order = order[np.argsort(_even_places(label[order]), kind="stable")]
    # The test rows are the first on the line and validation the next, each an even sample where it is stratified.
    num_test = round(config.test * num) if draw_test else 0
    num_val = round(config.val * (num - num_test)) if draw_val else 0
    if label is not None and num_test:  # the rest of the line is no longer even
        rest = order[num_test:]
        rest = rest[np.argsort(_even_places(label[rest]), kind="stable")]
        order = np.concatenate((order[:num_test], rest))
    return order[num_test + num_val :], order[num_test : num_test + num_val], order[:num_test]


def _even_places(label: NDArray[np.float64]) -> NDArray[np.float64]:
    """Return a place on [0, 1] for each row, such that each class (and the rows without a label) lies there evenly.

    The first n rows by place then hold each class in its share, to one row.
    """
    place = np.empty(len(label))
    classes = np.unique(label[~np.isnan(label)])
    for of_class in (*(label == one for one in classes), np.isnan(label)):
        count = int(of_class.sum())
        place[of_class] = (np.arange(count) + 0.5) / max(count, 1)
    return place


def _cut(config: SplitConfig, order: Rows, draw_val: bool, draw_test: bool) -> tuple[Rows, Rows, Rows]:
    """Return the rows that train, validate and test: the last of ``order`` test, those before validate."""
    num_test = round(config.test * len(order)) if draw_test else 0
    rest = len(order) - num_test
    num_val = round(config.val * rest) if draw_val else 0
    return order[: rest - num_val], order[rest - num_val : rest], order[rest:]


def _by_group(
    config: SplitConfig, group: NDArray[np.int64], draw_val: bool, draw_test: bool
) -> tuple[Rows, Rows, Rows]:
    groups = np.unique(group)
    order = np.random.RandomState(config.drawn_by).permutation(len(groups))
    parts = _cut(config, order, draw_val, draw_test)
    train, val, test = (np.flatnonzero(np.isin(group, groups[part])) for part in parts)
    return train, val, test


def _leave_last_out(
    config: SplitConfig, user: NDArray[np.int64], time: NDArray[np.int64] | NDArray[np.float64] | None
) -> tuple[Rows, Rows, Rows]:
    num = len(user)
    by_time = np.arange(num) if time is None else np.argsort(time, kind="stable")
    order = by_time[np.argsort(user[by_time], kind="stable")]  # by user, then time, then row
    _, starts, counts = np.unique(user[order], return_index=True, return_counts=True)
    # All rows of a user with fewer rows than splits train: else there would be nothing to learn from.
    num_out = 2 if config.val > 0 else 1
    enough = counts > num_out
    last = (starts + counts - 1)[enough]
    test, val = order[last], order[last - 1] if num_out == 2 else order[:0]
    held_out = np.zeros(num, dtype=bool)
    held_out[test], held_out[val] = True, True
    return np.flatnonzero(~held_out), val, test
