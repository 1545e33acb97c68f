"""Splits of a table: worked by hand where the rule is fixed, laws where rows are drawn."""

from dataclasses import replace

import numpy as np
import pytest
from refusals import refused

from apps.recsys.schema import SplitConfig
from apps.recsys.tables.encode.splits import split_rows


def lists(splits):
    return splits.train.tolist(), splits.val.tolist(), splits.test.tolist()


def test_by_time_the_last_rows_test_and_rows_of_one_time_are_on_the_later_side():
    # 10 rows: 20 % test = the 2 latest; 25 % of the other 8 validate = the 2 before.
    time = np.array([9, 8, 7, 6, 5, 4, 3, 2, 1, 0])
    splits = split_rows(SplitConfig("time", val=0.25, test=0.2), 10, time=time)
    assert lists(splits) == ([4, 5, 6, 7, 8, 9], [2, 3], [0, 1])
    # 10 rows of times 0 1 2 2 2 2 2 3 4 5: 40 % test would begin at row 6, within the 2s, so all 2s test; half of the
    # other 2 rows validates.
    time = np.array([0, 1, 2, 2, 2, 2, 2, 3, 4, 5])
    splits = split_rows(SplitConfig("time", val=0.5, test=0.4), 10, time=time)
    assert lists(splits) == ([0], [1], [2, 3, 4, 5, 6, 7, 8, 9])
    with pytest.raises(ValueError, match="the training split is empty"):
        split_rows(SplitConfig("time", val=0, test=0.4), 10, time=np.zeros(10))


def test_leave_last_out_by_hand():
    #            row    0  1  2  3  4  5  6  7
    user = np.array([7, 7, 5, 7, 5, 9, 5, 5])
    time = np.array([3, 1, 4, 2, 4, 0, 1, 9])
    # user 7: rows by time 1, 3, 0: tests 0, validates 3. User 5: 6, 2, 4, 7 (2 and 4 tie, in the order of rows): tests
    # 7, validates 4. User 9 has one row, less than three: it trains.
    splits = split_rows(SplitConfig("leave_last_out"), 8, group=user, time=time)
    assert lists(splits) == ([1, 2, 5, 6], [3, 4], [0, 7])
    # Without validation two rows are enough; without times the order of the rows counts.
    splits = split_rows(SplitConfig("leave_last_out", val=0), 8, group=user)
    assert lists(splits) == ([0, 1, 2, 4, 5, 6], [], [3, 7])
    with pytest.raises(ValueError, match="leave_last_out' draws every split itself"):
        split_rows(SplitConfig("leave_last_out"), 8, num_test=2, group=user)


@pytest.mark.parametrize("kind", ["random", "user", "group"])
def test_a_drawn_split_shares_out_all_rows_and_hangs_on_its_seed_alone(kind):
    user = np.arange(1000) // 4
    column = "session" if kind == "group" else None
    config = SplitConfig(kind, val=0.1, test=0.2, seed=3, column=column)
    splits = split_rows(config, 1000, group=user)
    rows = np.concatenate((splits.train, splits.val, splits.test))
    assert np.array_equal(np.sort(rows), np.arange(1000))
    # of 1000 rows (250 users) 200 (50) test; of the other 800 (200) 80 (20) validate
    assert [len(s) for s in (splits.train, splits.val, splits.test)] == [720, 80, 200]
    np.random.seed(0)
    assert lists(splits) == lists(split_rows(config, 1000, group=user))
    assert lists(splits) != lists(
        split_rows(SplitConfig(kind, val=0.1, test=0.2, seed=4, column=column), 1000, group=user)
    )
    draws = [replace(config, origins=3, origin=origin) for origin in (None, 0, 1, 2)]
    rows = [lists(split_rows(each, 1000, group=user)) for each in draws]
    assert rows[0] == rows[1] == lists(splits)
    assert rows[2] == lists(split_rows(replace(config, seed=4), 1000, group=user)) != rows[3]
    if kind != "random":
        sides = [set(user[s]) for s in (splits.train, splits.val, splits.test)]
        assert sum(map(len, sides)) == len(set.union(*sides))


def test_the_stream_of_draws_is_pinned_and_what_the_files_give_is_kept():
    # numpy keeps RandomState's stream: RandomState(0).permutation(10) is 2 8 4 9 1 6 7 3 0 5, here and everywhere. The
    # first 20 % test, 25 % of the other 8 validate. If these rows change, so do all published splits.
    splits = split_rows(SplitConfig("random", val=0.25, test=0.2, seed=0), 10)
    assert lists(splits) == ([0, 1, 3, 5, 6, 7], [4, 9], [2, 8])
    splits = split_rows(SplitConfig("given"), 4, num_val=2, num_test=3)
    assert lists(splits) == ([0, 1, 2, 3], [4, 5], [6, 7, 8])
    splits = split_rows(SplitConfig("time", val=0.5), 4, num_test=1, time=np.array([1, 0, 3, 2]))
    assert lists(splits) == ([0, 1], [2, 3], [4])
    refused("'given' needs test rows in a file of their own", lambda: split_rows(SplitConfig("given"), 4))
    assert lists(split_rows(SplitConfig("random", val=0, test=0), 3)) == ([0, 1, 2], [], [])


@pytest.mark.parametrize(("kind", "num_test"), [("given", 100), ("random", None)])
def test_stratified_each_split_has_the_positives_in_their_share(kind, num_test):
    # 60 of 1000 are positive, 40 have no label.
    label = np.zeros(1000, dtype=np.float32)
    label[:60], label[60:100] = 1, np.nan
    config = SplitConfig(kind, val=0.1, test=0.2, stratify="y", seed=1)
    splits = split_rows(config, 1000, num_test=num_test, label=label)
    drawn = [splits.val] if kind == "given" else [splits.val, splits.test]
    for rows in drawn:
        assert abs(float((label[rows] == 1).sum()) - 0.06 * len(rows)) <= 1
        assert abs(float(np.isnan(label[rows]).sum()) - 0.04 * len(rows)) <= 1
    assert len(splits.val) == (100 if kind == "given" else 80)


@pytest.mark.parametrize(
    ("config", "name"),
    [
        (SplitConfig("random", val=0.1, test=0.5), "validation"),  # 10 % of 2 rows
        (SplitConfig("random", val=0, test=0.1), "test"),  # 10 % of 4 rows
        (SplitConfig("user", val=0.9, test=0), "training"),  # 90 % of 1 user
    ],
)
def test_an_empty_split_is_refused(config, name):
    refused(f"the {name} split is empty", lambda: split_rows(config, 4, group=np.zeros(4, dtype=np.int64)))


def test_gaps_by_hand():
    # Days 0 to 19, one row each: 20 % = days 16-19 test, 25 % of the other 16 = days 12-15 validate. A gap of 2 days
    # takes days 14 and 15 from validation (first test row: 16), and 10 and 11 from training (first validation row: 12).
    day = np.arange(20.0)
    config = SplitConfig("time", val=0.25, test=0.2, gap=2)
    splits = split_rows(config, 20, time=day)
    assert (lists(splits), splits.in_gap) == (([*range(10)], [12, 13], [16, 17, 18, 19]), 4)
    # A gap of 7 days reaches beyond the validation's 4.
    with pytest.raises(ValueError, match=r"the validation split is empty: .*, gap=7 on 20 rows"):
        split_rows(SplitConfig("time", val=0.25, test=0.2, gap=7), 20, time=day)
    # Without validation the gap is before the test: days 14 and 15.
    splits = split_rows(SplitConfig("time", val=0, test=0.2, gap=2), 20, time=day)
    assert lists(splits) == ([*range(14)], [], [16, 17, 18, 19])
    # Dates are microseconds: 36 hours before day 16 begin at noon of day 14.
    micro = (day * 86_400e6).astype(np.int64)
    splits = split_rows(SplitConfig("time", val=0, test=0.2, gap="36h"), 20, time=micro)
    assert (splits.train.tolist(), splits.in_gap) == ([*range(15)], 1)
    # Rows of days 0-9, then a test file of days 10 and 11: a gap of 3 days is days 7, 8 and 9.
    config = SplitConfig("time", val=0, gap=3)
    splits = split_rows(config, 10, num_test=2, time=np.arange(12.0))
    assert (lists(splits), splits.in_gap) == (([*range(7)], [], [10, 11]), 3)
    # A gap has the kind of the times.
    with pytest.raises(ValueError, match=r"split\.gap=90 must have a unit, such as 90d: column 'day' holds times"):
        split_rows(SplitConfig("time", gap=90), 10, time=np.arange(10), time_name="day")
    with pytest.raises(ValueError, match=r"split\.gap='90d' must be a number: column 'day' holds numbers"):
        split_rows(SplitConfig("time", gap="90d"), 10, time=np.arange(10.0), time_name="day")


def test_each_origin_tests_the_next_window_and_trains_on_all_before():
    # 3 windows of 2 of 10 rows: rows 4-5, 6-7, 8-9; a quarter of the rows before validates.
    def of(origin):
        config = SplitConfig("time", val=0.25, test=0.2, origins=3, origin=origin)
        splits = split_rows(config, 10, time=np.arange(10))
        return (*lists(splits), splits.later)

    assert of(0) == ([0, 1, 2], [3], [4, 5], 4)
    assert of(1) == ([0, 1, 2, 3], [4, 5], [6, 7], 2)  # round(1.5) is 2
    assert of(2) == of(None) == ([0, 1, 2, 3, 4, 5], [6, 7], [8, 9], 0)
    with pytest.raises(ValueError, match=r"split\.origins=2 cuts test windows itself: leave out test_file"):
        split_rows(SplitConfig("time", origins=2), 8, num_test=2, time=np.arange(8))
