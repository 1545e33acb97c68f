"""Thresholds of a column of numbers: quantiles, and the steps of labels of any kind."""

import numpy as np
import pytest

from apps.recsys.encoding.features import Target
from apps.recsys.encoding.thresholds import thresholds

X = np.arange(400, dtype=np.float32)
STEP = (X > 137).astype(np.float32)
NAN = np.float32(np.nan)


@pytest.mark.parametrize(
    ("target", "label"),
    [
        (Target(), STEP),
        (Target("regression"), 5 * STEP),
        (Target("revenue"), 5 * STEP),
        (Target("ordinal", levels=(1.0, 4.0)), STEP),
        (Target("multiclass", classes=("a", "b", "c"), shares=(0.2, 0.5, 0.3)), 2 * STEP),
        (Target(), np.where(X % 2 == 0, STEP, NAN)),  # odd rows have no label: 136 and 138 do
    ],
)
def test_the_step_of_a_label_is_a_threshold_between_the_quantiles(target, label):
    quantiles = thresholds(X, [])
    assert quantiles == tuple(range(16, 400, 16))  # 24, each after 16 of 400 values
    assert thresholds(X, [(target, np.full_like(X, NAN))]) == quantiles
    found = thresholds(X, [(target, label)])
    assert found == tuple(sorted({*quantiles, 137}))
    # Places of values are split, so no unit matters; each threshold is a value of the column as float32 has it.
    tiny = (X * np.float32(1e-9)).astype(np.float32)
    assert thresholds(tiny, [(target, label)]) == tuple(float(tiny[int(place)]) for place in found)


def test_several_tasks_each_split_and_missing_values_do_not():
    other = (X > 300).astype(np.float32)
    found = thresholds(np.append(X, [NAN] * 99), [(Target(), np.append(y, [0] * 99)) for y in (STEP, other)])
    assert found == tuple(sorted({*range(16, 400, 16), 137, 300}))


def test_columns_that_say_nothing_and_small_ones():
    y = (np.arange(30) % 2).astype(np.float32)
    assert thresholds(np.full(30, 3, np.float32), [(Target(), y)]) == ()
    assert thresholds(np.full(30, NAN), [(Target(), y)]) == ()
    assert thresholds(y, [(Target(), y)]) == (0.0,)
    assert thresholds(np.array([1, 2, 3], np.float32), [(Target(), y[:3])]) == (1.0, 2.0)
    sparse = np.where(np.arange(3000) % 100 == 0, np.arange(3000), NAN).astype(np.float32)  # 30 values of 3,000
    found = thresholds(sparse, [(Target(), (np.arange(3000) > 1450).astype(np.float32))])
    assert 1400.0 in found
    assert found == tuple(sorted(set(found)))


def test_a_million_distinct_numbers_have_few_thresholds_and_always_the_same():
    x = np.random.default_rng(1).permutation(1_000_000).astype(np.float32)
    y = np.sin(x / 1e5).astype(np.float32)
    found = thresholds(x, [(Target("regression"), y)])
    assert 24 < len(found) <= 24 + 47
    assert found == thresholds(x, [(Target("regression"), y)])
