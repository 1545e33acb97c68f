"""The label of a table that a user names: the likeliest column, its kind, and what its values mean."""

from __future__ import annotations

from collections.abc import Mapping
from dataclasses import dataclass
from typing import Any

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.base.messages import excerpt, some
from apps.data.given import TargetKind
from apps.recsys.encoding.numbers import is_text, plain
from apps.recsys.guesses import FEW_VALUES, words_of

LEAST_ROWS = 20
"""Least number of rows of each of the target's two classes: the smallest split, a ninth of them, has two then."""

LEAST_ZEROS = 0.1
"""Share of zeros from which on amounts are "revenue"."""

_CERTAIN = {"label", "target", "y", "class", "outcome"}
_LABELS = {"churn", "churned", "click", "clicked", "bought", "buy", "purchase", "purchased", "converted", "conversion"}
_LABELS |= {"survived", "default", "fraud", "spam", "response", "subscribed", "canceled", "returned", "liked"}
_LABELS |= _CERTAIN
_OUTCOMES = _LABELS - {"y", "class", "default"}  # these are also features that are known before
_LAST = {"price", "amount", "sales", "revenue", "rating", "score", "demand", "count", "cnt", "value", "quality"}


@dataclass(frozen=True)
class Label:
    """A column that is predicted.

    Attributes:
        config: arguments of its ``TaskConfig`` that are no default.
        meaning: its kind and its values in words.
        values_N: float64, NaN for none; of several classes, whether it is the most frequent one.
    """

    config: Mapping[str, Any]
    meaning: str
    values_N: np.ndarray

    @property
    def kind(self) -> str:
        return self.config.get("kind", "binary")

    @property
    def is_number(self) -> bool:
        """Whether it is a number and neither one of two values nor a class."""
        return self.kind not in ("binary", "multiclass")


def label_of(name: str, column: pa.ChunkedArray, kind: TargetKind | None = None, least_rows: int = LEAST_ROWS) -> Label:
    """Return what is to be known of a target.

    Args:
        name: name of the column.
        column: its values.
        kind: kind of label. None: two values are "binary", more texts "multiclass", integers of few values "ordinal",
            and other numbers as ``number_kind`` says.
        least_rows: least number of rows of each of two classes, and half of that of numbers.

    Raises:
        ValueError: there is nothing to learn, or the values are not of the kind.
    """
    column = plain(column)
    if pa.types.is_floating(column.type):
        column = pc.if_else(pc.is_finite(column), column, pa.scalar(None, column.type))
    if is_text(column.type):
        column = pc.utf8_trim_whitespace(column)
        column = pc.if_else(pc.equal(column, ""), pa.scalar(None, column.type), column)
    counts = {own["values"]: own["counts"] for own in pc.value_counts(column.drop_null()).to_pylist()}
    if not counts:
        raise ValueError(f"--target {name!r} has no value in any of {len(column):,} rows: there is nothing to learn")
    if len(counts) == 1:
        (value,) = counts
        raise ValueError(f"--target {name!r} is {excerpt(value)} in every row that has one: there is nothing to learn")
    is_number = pa.types.is_integer(column.type) or pa.types.is_floating(column.type)
    if not (is_number or is_text(column.type) or pa.types.is_boolean(column.type)):
        raise ValueError(f"--target {name!r} holds {column.type}, and not numbers, text or truth values")
    missing = f", {column.null_count:,} rows without" if column.null_count else ""
    if kind == "binary" or (kind is None and len(counts) == 2):
        return _binary(name, column, counts, is_number, missing, least_rows)
    most = max(counts, key=lambda value: counts[value])
    if kind == "multiclass" or (kind is None and not is_number):
        if (enough := sum(count >= least_rows for count in counts.values())) < 2:
            found = f"{enough} of {len(counts):,} classes have {least_rows} rows"
            raise ValueError(f"--target {name!r}: {found}, and two are needed")
        values_N = floats_of(pc.equal(column, pa.scalar(most, column.type)))
        meaning = f"multiclass, {len(counts):,} classes, most often {excerpt(most)}{missing}"
        return Label({"column": name, "kind": "multiclass"}, meaning, values_N)
    if not is_number:
        raise ValueError(f"--target {name!r} holds {column.type}, and kind {kind!r} takes numbers")
    if (count := len(column) - column.null_count) < 2 * least_rows:
        raise ValueError(f"--target {name!r} has a number in {count} rows, and {2 * least_rows} are needed")
    values_N = floats_of(column)
    known = values_N[~np.isnan(values_N)]
    if kind is None:
        few = pa.types.is_integer(column.type) and len(counts) <= FEW_VALUES
        kind = "ordinal" if few else number_kind(known)
    meaning = f"{kind}, {known.min():,.10g} to {known.max():,.10g}, {np.mean(known == 0):.0%} zeros{missing}"
    return Label({"column": name, "kind": kind}, meaning, values_N)


def _binary(
    name: str, column: pa.ChunkedArray, counts: Mapping[Any, int], is_number: bool, missing: str, least_rows: int
) -> Label:
    """Return a target of yes and no: of two values the larger is yes, of more numbers those from the median on, of more
    texts the most frequent one."""
    config: dict[str, Any] = {"column": name}
    if is_number and len(counts) > 2:
        values = np.asarray(column.drop_null())
        middle = float(np.median(values))
        # Where half of the rows have the smallest value, "at least the median" would be all of them.
        above = middle if middle > values.min() else float(values[values > middle].min())
        positive, what, config["at_least"] = pc.greater_equal(column, above), f"at least {above:.10g}", above
    else:
        high = max(counts) if len(counts) == 2 else max(counts, key=lambda value: (counts[value], value))
        positive, what = pc.equal(column, pa.scalar(high, column.type)), excerpt(high)
        if len(counts) > 2:
            what += f", the most frequent of {len(counts):,} values,"
        if not {str(value).lower().removesuffix(".0") for value in counts} <= {"0", "1", "false", "true"}:
            config |= {"at_least": high} if is_number else {"positive": [high]}
    num_positive, num_rows = int(pc.sum(positive).as_py()), sum(counts.values())
    for count, which in ((num_positive, "are"), (num_rows - num_positive, "are not")):
        if count < least_rows:
            rule = f"each class needs {least_rows}"
            raise ValueError(f"--target {name!r}: {count} rows {which} positive ({what}), and {rule}")
    return Label(config, f"binary, {what} in {num_positive / num_rows:.1%}{missing}", floats_of(positive))


def number_kind(values: np.ndarray) -> TargetKind:
    """Return the kind of a target of numbers, of more values than levels have."""
    from scipy.stats import skew

    is_whole = bool((np.floor(values) == values).all())
    if values.min() < 0:
        return "regression"
    if np.mean(values == 0) >= LEAST_ZEROS and (not is_whole or skew(values) > 1):
        return "revenue"
    return "count" if is_whole and values.min() <= 1 and np.median(values) < 5 * FEW_VALUES else "regression"


def likeliest(table: pa.Table, name: str) -> tuple[list[str], str]:
    """Return the column that is most likely the label, alone, and why.

    Raises:
        ValueError: none is more likely than others.
    """
    counts = {
        c: len(pc.unique(own.drop_null())) for c, own in zip(table.column_names, map(_flat, table.columns), strict=True)
    }
    can_be = [column for column, number in counts.items() if number > 1]
    two = [column for column in can_be if counts[column] == 2]
    named = [column for column in can_be if _LABELS & {*words_of(column)} and counts[column] <= len(table) / 2]
    certain = [column for column in table.column_names if column.lower() in _CERTAIN]
    last = table.column_names[-1]
    for columns, why in (
        (certain, "by its name"),
        ([column for column in named if column in two], "by its name and its two values"),
        (named, "by its name"),
        ([last] if last in two else [], "the last column, of two values"),
        (two if len(two) == 1 else [], "the only column of two values"),
        ([last] if last in can_be and _LAST & {*words_of(last)} else [], "the last column, by its name"),
    ):
        if columns:
            others = f"; also likely: {some(columns[1:])}" if len(columns) > 1 else ""
            return columns[:1], why + others
    hint = ": is it separated by commas, or .tsv by tabs?" if len(table.column_names) == 1 else ""
    names = some(table.column_names, 20)
    raise ValueError(f"{name} has no column that is plainly the label: give --target, one of {names}{hint}")


def is_outcome(name: str, num_values: int) -> bool:
    """Tell whether a column is likely another label, such as "bought" next to "clicked"."""
    return num_values == 2 and not _OUTCOMES.isdisjoint(words_of(name))


def floats_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return numbers as float64 (N,), NaN for none."""
    return np.asarray(column.cast(pa.float64(), safe=False).fill_null(np.nan), dtype=np.float64)


def _flat(column: pa.ChunkedArray) -> pa.ChunkedArray:
    """Return a column, or nothing of one whose values are no single ones."""
    return column.slice(0, 0).cast(pa.null()) if pa.types.is_nested(column.type) else plain(column)
