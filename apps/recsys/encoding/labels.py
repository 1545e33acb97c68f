"""Columns as the labels of a task, and whether a feature gives a label away."""

from __future__ import annotations

from collections.abc import Sequence

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc
from numpy.typing import NDArray

from apps.recsys.encoding.categories import factorize, to_text
from apps.recsys.encoding.numbers import NO_VALUE, Part, to_numbers
from apps.recsys.schema import TaskConfig


def to_labels(parts: Sequence[Part], name: str, task: TaskConfig) -> NDArray[np.float32]:
    """Return a task's labels over all tables: 0, 1, or NaN if the column has no value.

    Raises:
        ValueError: the column does not hold 0 and 1, never holds a ``positive`` value, or holds no numbers for
            ``at_least``.
    """
    column = task.column
    if task.at_least is not None:
        numbers = to_numbers(parts, column)
        return np.where(np.isnan(numbers), np.nan, numbers >= task.at_least).astype(np.float32)
    codes = factorize(parts, column)
    values = codes.values.to_pylist() if len(codes.values) <= 1000 else None
    if task.positive is not None:
        wanted = [to_text(pa.array([value]))[0] for value in task.positive]
        positive = np.asarray(pc.is_in(codes.values, pa.array(wanted, pa.string())), dtype=bool)
        for value, text in zip(task.positive, wanted, strict=True):
            if not pc.any(pc.equal(codes.values, text)).as_py():
                some = ", ".join(map(repr, (values or codes.values[:5].to_pylist())[:5]))
                raise ValueError(f"task {name!r}: column {column!r} never holds positive={value!r}; it holds {some}")
        label = positive.astype(np.float32)
    else:
        known = dict.fromkeys((own.lower() for own in NO_VALUE), np.nan) | {
            "0": 0.0,
            "1": 1.0,
            "false": 0.0,
            "true": 1.0,
        }
        labels = [] if values is None else [known.get(v.lower()) for v in values]
        if values is None or None in labels:
            fits = pc.is_in(pc.utf8_lower(codes.values), pa.array(list(known), pa.string()))
            code = int(np.argmin(np.asarray(fits, dtype=bool)))
            odd, row = codes.values[code].as_py(), int(np.argmax(codes.codes == code))
            raise ValueError(
                f"task {name!r}: column {column!r} must hold 0 and 1, but row {row} holds {odd!r}; "
                "set positive (the values that count) or at_least"
            )
        label = np.array(labels, dtype=np.float32)
    return np.append(label, np.float32(np.nan))[codes.codes]


def determines(codes: NDArray[np.int64], label: NDArray[np.floating]) -> bool:
    """Tell whether the column's value decides the label in every row.

    Values that occur once are left out, since they prove nothing. The others must cover half of the labeled rows and
    two labels, or the answer is no. Missing is a value too.
    """
    known = ~np.isnan(label)
    value, own = codes[known] + 1, label[known]
    total = np.bincount(value)
    is_repeated = total[value] > 1
    if 2 * int(is_repeated.sum()) < len(value) or not len(value):
        return False
    value, own = value[is_repeated], own[is_repeated]
    some = np.empty(len(total), own.dtype)
    some[value] = own  # one of the labels of each value
    return bool((some[value] == own).all() and (own != own[0]).any())
