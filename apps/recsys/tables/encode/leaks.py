"""Columns that give a label away: rules on plain arrays, for a first configuration and for the encoding of a table."""

from __future__ import annotations

import itertools
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass

import numpy as np
from numpy.typing import NDArray

from apps.recsys.tables.encode.checks import LEAK_AUC, category_auc, column_auc
from apps.recsys.value_metrics import correlation

LEAK_R2 = 0.95
"""Above it the R^2 of a single column, of ranks or of its values' means, is more likely a leak than a success."""
LEAST_FILLED = 20
"""Rows that have a value before it says something that all of them have the same label."""
_CHANCE = 1e-6
_MOST_VALUES = 50
_MOST_ROWS = 200_000
"""Rows at most in which a column is compared with what is made of labels."""
_EXACT, _EXACT_OTHERS = 0.95, 0.9
"""Shares of all rows, and of those without the most frequent value, in which two columns are equal if they are one."""

_Numbers = NDArray[np.float64]
_Codes = NDArray[np.int64]


@dataclass(frozen=True)
class Column:
    """A feature before it is encoded.

    Attributes:
        code_N: int64, equal for equal values; a missing value has a code of its own.
        missing_N: rows without a value.
        number_N: the numbers, NaN for none; None: the values are no numbers.
        texts: the value of each code, as far as they are worth a name.
    """

    code_N: _Codes
    missing_N: NDArray[np.bool_]
    number_N: _Numbers | None = None
    texts: Sequence[str] = ()

    def take(self, rows: _Codes) -> Column:
        """Return some of the rows."""
        number_N = None if self.number_N is None else self.number_N[rows]
        return Column(self.code_N[rows], self.missing_N[rows], number_N, self.texts)


def leak(column: Column, label_N: _Numbers, is_number: bool) -> str:
    """Return how a column gives a label away by itself, with ``{label}`` for its name; empty if it does not.

    Args:
        column: the column in rows of a random order: what a value says of half of them is tried on the others.
        label_N: the label, NaN for none; 0 or 1 of a binary task, and of classes whether it is the most frequent one.
        is_number: whether it is a number and not a class.
    """
    keep_N = ~np.isnan(label_N)
    y, code = label_N[keep_N], column.code_N[keep_N]
    number = None if column.number_N is None else column.number_N[keep_N]
    if len(np.unique(y)) < 2:
        return ""
    if not is_number:
        auc = max(category_auc(code, y), 0.5 if number is None else column_auc(number, y))
        if auc > LEAK_AUC:
            return f"alone predicts {{label}} with AUC {auc:.4f}"
        return outcome(column, label_N, is_number)
    from scipy.stats import rankdata

    r2 = _means_r2(code, y)
    if number is not None and 2 * (there := ~np.isnan(number)).sum() > len(y):
        r2 = max(r2, correlation(rankdata(number[there]), rankdata(y[there])) ** 2)
    if r2 > LEAK_R2:
        return f"alone predicts {{label}} with R2 {r2:.4f}"
    if len(np.unique(code)) == 2 and (auc := column_auc(y, code)) > LEAK_AUC:
        return f"alone tells small {{label}} from large, AUC {auc:.4f}"
    return outcome(column, label_N, is_number)


def outcome(column: Column, label_N: _Numbers, is_number: bool) -> str:
    """Return how a column has a value with one label only, with ``{label}`` for its name; empty if it has none.

    A second label is one of these: it is filled, other than 0 or "yes" only in rows whose first label is positive. Of
    several values one counts if it comes with the rarer label, and with a share of that label's rows that matters:
    a category in which nothing is sold is no leak.
    """
    keep_N = ~np.isnan(label_N)
    y, code, missing = label_N[keep_N], column.code_N[keep_N], column.missing_N[keep_N]
    if is_number:
        if np.mean(y == 0) < 0.05:
            return ""
        y = (y > 0).astype(float)
    yes, no = ("above 0", "0") if is_number else ("positive", "negative")
    zero = missing if column.number_N is None else missing | (column.number_N[keep_N] == 0)
    for is_empty, what in ((missing, "filled"), (zero, "other than 0")):
        if is_empty.any() and (sign := _one_label(y[~is_empty], y)) is not None:
            return f"is {what} only where {{label}} is {yes if sign else no}"
    values, place, counts = np.unique(code, return_inverse=True, return_counts=True)
    if not 2 <= len(values) <= _MOST_VALUES:
        return ""
    rate = float(y.mean())
    for i in np.argsort(-counts):
        own = y[place == i]
        sign = _one_label(own, y, _CHANCE / len(values))
        base = rate if sign else 1 - rate
        is_yes = len(values) == 2 and sign and i == 1
        if sign is not None and (is_yes or (base <= 0.5 and len(own) >= 0.05 * base * len(y))):
            text = repr(column.texts[values[i]]) if 0 <= values[i] < len(column.texts) else "one of its values"
            return f"is {text} only where {{label}} is {yes if sign else no}"
    return ""


def _one_label(own: _Numbers, y: _Numbers, chance: float = _CHANCE) -> float | None:
    """Return the label that all rows of ``own`` have, if they are enough to show it; else None."""
    if len(own) < LEAST_FILLED or (own != own[0]).any() or np.mean(y == own[0]) ** len(own) >= chance:
        return None
    return float(own[0])


def later_dates(dates: Mapping[str, _Numbers], label_N: _Numbers, is_number: bool) -> Iterator[tuple[str, str]]:
    """Yield dates that come after another date of their row only with one label, and how; see ``leak``."""
    keep_N = ~np.isnan(label_N)
    y = (label_N[keep_N] > 0).astype(float) if is_number else label_N[keep_N]
    for (name, own_N), (other, others_N) in itertools.permutations(dates.items(), 2):
        is_later = (own_N > others_N)[keep_N]
        if _one_label(y[is_later], y) == 1 and (own_N <= others_N)[keep_N].sum() >= LEAST_FILLED:
            yield name, f"is later than {other} only where {{label}} is {'above 0' if is_number else 'positive'}"


def groups_of(codes: Mapping[str, _Codes], most: int = 3) -> dict[str, _Codes]:
    """Return the columns whose values recur as those of users do, those of the most values first."""
    num = {name: len(np.unique(code_N)) for name, code_N in codes.items()}
    names = [name for name, code_N in codes.items() if LEAST_FILLED <= num[name] <= len(code_N) / 1.5]
    return {name: codes[name] for name in sorted(names, key=num.__getitem__, reverse=True)[:most]}


# ---- numbers made from the labels of several rows


def made_of_labels(
    number_N: _Numbers, label_N: _Numbers, groups: Mapping[str, _Codes], orders: Mapping[str, _Numbers]
) -> str:
    """Return which labels or later rows a number was made of, with ``{label}`` for the label's name; empty if none.

    Args:
        number_N: the column, of all rows of the table; NaN for no number.
        label_N: the label, NaN for none.
        groups: the rows' users, or other columns whose values recur, by name; codes from 0 on.
        orders: numbers that order the rows in time, by name.
    """
    keep_N = ~np.isnan(label_N) & ~np.isnan(number_N)
    values, place = np.unique(number_N[keep_N], return_inverse=True)
    if len(place) < LEAST_FILLED or len(values) < 2:
        return ""
    one_in = len(place) // _MOST_ROWS + 1
    for group, code_N in groups.items():
        some_N = keep_N & (code_N % one_in == 0)  # of a large table some groups, each whole
        x, y, code = number_N[some_N], label_N[some_N], code_N[some_N]
        for order, time_N in orders.items():
            for what, candidate in _statistics(code, time_N[some_N], y):
                if _is(x, candidate):
                    when = f", by {order}" if "later" in what else ""
                    return f"is {what} of the same {group}{when}"
        if _includes_own(x, y, code):
            return f"is a mean of {{label}} over the rows of a {group}, this one among them"
    some = place % one_in == 0
    if _includes_own(values[place[some]], label_N[keep_N][some], place[some]):
        return "is a mean of {label} over several rows, this one among them"
    return ""


def _statistics(code: _Codes, time: _Numbers, y: _Numbers) -> Iterator[tuple[str, _Numbers]]:
    """Yield statistics of each row's group that no one has when the row's label is asked for."""
    order = np.lexsort((time, code))
    code, y = code[order], y[order]
    first = np.flatnonzero(np.r_[True, code[1:] != code[:-1]])
    size = np.diff(np.r_[first, len(code)])
    n, place = np.repeat(size, size), np.arange(len(code)) - np.repeat(first, size)
    through = np.cumsum(y)
    until = through - np.repeat(through[first] - y[first], size)  # with the row's own label
    total = np.repeat(np.add.reduceat(y, first), size)
    back = np.empty(len(order), np.int64)
    back[order] = np.arange(len(order))
    for what, values in (
        ("the mean of {label} over all rows", total / n),
        ("the sum of {label} over all rows", total),
        ("the mean of {label} over all other rows", (total - y) / np.maximum(n - 1, 1)),
        ("the mean of {label} until this row, with its own,", until / (place + 1)),
        ("the sum of {label} until this row, with its own,", until),
        ("the number of later rows", (n - 1.0 - place)),
        ("the sum of {label} over later rows", total - until),
    ):
        yield what, values[back]


def _is(x: _Numbers, candidate: _Numbers) -> bool:
    """Tell whether a column is a statistic, also apart from the value that is the most frequent."""
    close = np.abs(x - candidate) <= 5e-3 * max(float(candidate.std()), 1e-12)
    if close.mean() < _EXACT:
        return False
    values, place, counts = np.unique(candidate, return_inverse=True, return_counts=True)
    others = place != np.argmax(counts)
    return len(values) > 2 and int(others.sum()) >= LEAST_FILLED and close[others].mean() >= _EXACT_OTHERS


def _includes_own(x: _Numbers, y: _Numbers, code: _Codes) -> bool:
    """Tell whether the labels of groups of rows agree with a number of each more closely than chance lets them.

    The residuals of a group have a sum of about the root of their squares' sum. If the number is the mean or the sum of
    these labels, smoothed or not, the sum is 0: over many groups that is a chi-squared statistic near 0. Labels that
    add up without the number, such as one purchase for each session, are no fault of its; nor are residuals of which a
    few are far larger than the others, whose statistic is as low in any other order.
    """
    from scipy.special import chdtr

    place, counts = np.unique(code, return_inverse=True, return_counts=True)[1:]
    several = counts > 1
    low, high = np.full(len(counts), np.inf), np.full(len(counts), -np.inf)
    np.minimum.at(low, place, x)
    np.maximum.at(high, place, x)
    if several.sum() < 10 or 2 * counts[several].sum() < len(x) or (low < high).mean() > 1 - _EXACT:
        return False

    def statistic(residual: _Numbers) -> float:
        squares = np.bincount(place, weights=np.square(residual))[several] + 0.3 * np.square(residual).mean()
        return float((np.square(np.bincount(place, weights=residual)[several]) / squares).sum())

    n = counts[place]
    facts = np.stack([np.ones(len(x)), x, 1 / n, x / n], 1)  # a smoothed mean is linear in these
    residual = y - facts @ np.linalg.lstsq(facts, y, rcond=None)[0]
    shuffled, of_several = residual.copy(), several[place]
    shuffled[of_several] = np.random.RandomState(0).permutation(residual[of_several])
    sums, free = statistic(residual), int(several.sum()) - facts.shape[1]
    least = min(free, statistic(y - y.mean()), statistic(shuffled))
    return sums < 0.65 * least and float(chdtr(free, sums)) < _CHANCE


class Copies:
    """Finds rows that are copies of an earlier row, as columns come by.

    Args:
        num_rows: rows of the table.
    """

    def __init__(self, num_rows: int) -> None:
        self._hash_N = np.zeros(num_rows, np.uint64)
        self._pairs = num_rows**2 / 2

    def add(self, code_N: _Codes) -> None:
        """Take a column, or a label, as codes from -1 (missing) on."""
        code_N = code_N + 1
        bits = np.random.default_rng(0).integers(2**64, size=int(code_N.max(initial=0)) + 1, dtype=np.uint64)
        self._hash_N = self._hash_N * np.uint64(0x9E3779B97F4A7C15) + bits[code_N]
        self._pairs *= float(np.square(np.bincount(code_N) / len(code_N)).sum())

    def rows(self) -> NDArray[np.bool_]:
        """Return which rows are copies, bool (N,); none if they are few or as many as chance makes."""
        _, first, counts = np.unique(self._hash_N, return_index=True, return_counts=True)
        copies = np.ones(len(self._hash_N), dtype=bool)
        copies[first] = False
        is_chance = float((counts * (counts - 1.0)).sum()) / 2 < 10 * self._pairs
        few = copies.sum() < max(LEAST_FILLED, 0.01 * len(copies))
        return np.zeros_like(copies) if few or is_chance else copies

    def shared(self, train_N: NDArray[np.bool_], other_N: NDArray[np.bool_]) -> int:
        """Return how many rows of a split repeat one of training."""
        return int(np.isin(self._hash_N[other_N], self._hash_N[train_N]).sum()) if self.rows().any() else 0


def _means_r2(code: _Codes, y: _Numbers) -> float:
    """Return the R^2, in every second row, of the mean label that a value has in the other rows."""
    counts = np.bincount(code[::2], minlength=code.max() + 1)
    means = (np.bincount(code[::2], weights=y[::2], minlength=len(counts)) + y.mean()) / (counts + 1)
    error = np.mean(np.square(y[1::2] - means[code[1::2]]))
    return float(1 - error / max(np.var(y[1::2]), 1e-300))
