"""Columns as labels, and features that give them away."""

from __future__ import annotations

import numpy as np
import pyarrow as pa
import pytest

from apps.recsys.encoding.categories import MISSING
from apps.recsys.encoding.labels import determines, to_labels
from apps.recsys.schema import TaskConfig


def part(values, kind=None, where="the training table"):
    return (where, pa.chunked_array([pa.array(values, kind)]))


@pytest.mark.parametrize(
    ("values", "task", "expected"),
    [
        (["0", "1", None], TaskConfig("y"), [0, 1, np.nan]),
        (["0", "NA", "1", "?"], TaskConfig("y"), [0, np.nan, 1, np.nan]),
        ([True, False, None], TaskConfig("y"), [1, 0, np.nan]),
        ([1.0, 0.0, float("nan")], TaskConfig("y"), [1, 0, np.nan]),
        ([" 50+.", "-50", "", "49+"], TaskConfig("y", positive=("50+.", "49+")), [1, 0, np.nan, 1]),
        ([3, 4, 5, None], TaskConfig("y", at_least=4), [0, 1, 1, np.nan]),
        (["3.5", "4", ""], TaskConfig("y", at_least=4), [0, 1, np.nan]),
    ],
)
def test_labels(values, task, expected):
    labels = to_labels([part(values)], "t", task)
    assert np.array_equal(labels, np.array(expected, dtype=np.float32), equal_nan=True)


def test_labels_that_are_none_are_refused():
    with pytest.raises(ValueError, match="task 't': column 'y' must hold 0 and 1, but row 2 holds '2'"):
        to_labels([part([0, 1, 2])], "t", TaskConfig("y"))
    many = [*range(2), *range(2000)]  # more values than are looked at one by one
    with pytest.raises(ValueError, match="column 'y' must hold 0 and 1, but row 4 holds '2'"):
        to_labels([part(many)], "t", TaskConfig("y"))
    with pytest.raises(ValueError, match="column 'y' never holds positive='yes'; it holds 'Yes', 'no'"):
        to_labels([part(["Yes", "no"])], "t", TaskConfig("y", positive=("yes",)))
    with pytest.raises(ValueError, match="must hold numbers: row 1 holds 'good'"):
        to_labels([part(["3", "good"])], "t", TaskConfig("y", at_least=4))


def test_a_column_that_is_the_label_under_another_name_is_found():
    label = np.array([0, 1, 1, 0, 1, np.nan], dtype=np.float32)
    assert determines(np.array([4, 2, 2, 4, 2, 2]), label)
    assert not determines(np.array([4, 2, 2, 4, 4, 2]), label)  # one row differs
    assert not determines(np.arange(6), label)  # an id of the row says nothing
    assert determines(np.array([MISSING, 2, 2, MISSING, 2, 2]), label)  # that it is missing may
    assert not determines(np.array([0, 0, 0, 0, 0, 0]), np.zeros(6, dtype=np.float32))


@pytest.mark.parametrize(
    ("column", "positive"),
    [
        (pa.array([0, 1, 2]), (2, 1)),
        (pa.array(["0.0", "1", "2"]), (1.0, "2")),
        (pa.array([False, True, True]), (True,)),
    ],
)
def test_positive_values_may_be_of_any_type(column, positive):
    part = ("the training table", pa.chunked_array([column]))
    assert to_labels([part], "t", TaskConfig("c", positive=positive)).tolist() == [0, 1, 1]
    with pytest.raises(ValueError, match="task 't': column 'c' never holds positive=7"):
        to_labels([part], "t", TaskConfig("c", positive=(7,)))
