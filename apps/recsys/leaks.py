"""Columns of a table that give a label away, before anything is encoded.

``apps.recsys.tables.encode.checks`` looks at the training rows again when a model is trained.
"""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pyarrow.compute as pc

from apps.recsys.encoding.numbers import is_text
from apps.recsys.encoding.timestamps import to_seconds
from apps.recsys.guesses import Role
from apps.recsys.tables.encode.checks import LEAK_AUC, category_auc, column_auc
from apps.recsys.value_metrics import correlation

LEAK_R2 = 0.95
"""Above it the R^2 of a single column, of ranks or of its values' means, is more likely a leak than a success."""
LEAST_FILLED = 20
"""Rows in which a column is filled before it says something that all of them have the same label."""


def leak(values: pa.ChunkedArray, role: Role, label_N: np.ndarray, kind: str) -> str:
    """Return how a column gives a label away by itself, with ``{label}`` for its name; empty if it does not.

    Args:
        values: the column in rows of a random order, of which halves are compared.
        role: what it holds.
        label_N: the label as a number, NaN for none; of several classes, whether it is the most frequent one.
        kind: kind of the label.
    """
    keep_N = ~np.isnan(label_N)
    missing_N = np.asarray(pc.is_null(values))
    if is_text(values.type):
        missing_N |= np.asarray(pc.fill_null(pc.equal(values, ""), fill_value=True))
    number_N = None
    if role in ("number", "count", "money"):
        number_N = floats_of(values)
    elif role == "date":
        number_N = to_seconds(values, "column", "the table")
    flat = pa.array(map(str, values.to_pylist())) if pa.types.is_nested(values.type) else values
    code_N = np.unique(np.asarray(flat.cast(pa.string()).fill_null("")), return_inverse=True)[1]
    y, missing, code = label_N[keep_N], missing_N[keep_N], code_N[keep_N]
    number = None if number_N is None else number_N[keep_N]
    if len(np.unique(y)) < 2:
        return ""
    if kind in ("binary", "multiclass"):
        auc = max(category_auc(code, y), 0.5 if number is None else column_auc(number, y))
        if auc > LEAK_AUC:
            return f"alone predicts {{label}} with AUC {auc:.4f}"
        zero = missing if number is None else missing | (number == 0)
        for is_empty, what in ((missing, "filled"), (zero, "other than 0")):
            filled = y[~is_empty]
            is_one = len(filled) >= LEAST_FILLED and is_empty.any() and (filled == filled[0]).all()
            if is_one and np.mean(y == filled[0]) ** len(filled) < 1e-6:  # not by chance
                return f"is {what} only where {{label}} is {'positive' if filled[0] else 'negative'}"
        return ""
    from scipy.stats import rankdata

    r2 = _means_r2(code, y)
    if number is not None and 2 * (there := ~np.isnan(number)).sum() > len(y):
        r2 = max(r2, correlation(rankdata(number[there]), rankdata(y[there])) ** 2)
    if r2 > LEAK_R2:
        return f"alone predicts {{label}} with R2 {r2:.4f}"
    if len(np.unique(code)) == 2 and (auc := column_auc(y, code)) > LEAK_AUC:
        return f"alone tells small {{label}} from large, AUC {auc:.4f}"
    return ""


def floats_of(column: pa.ChunkedArray) -> np.ndarray:
    """Return numbers as float64 (N,), NaN for none."""
    return np.asarray(column.cast(pa.float64(), safe=False).fill_null(np.nan), dtype=np.float64)


def _means_r2(code: np.ndarray, y: np.ndarray) -> float:
    """Return the R^2, in every second row, of the mean label that a value has in the other rows."""
    counts = np.bincount(code[::2], minlength=code.max() + 1)
    means = (np.bincount(code[::2], weights=y[::2], minlength=len(counts)) + y.mean()) / (counts + 1)
    error = np.mean(np.square(y[1::2] - means[code[1::2]]))
    return float(1 - error / max(np.var(y[1::2]), 1e-300))
