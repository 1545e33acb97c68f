"""Guards and the drift of new rows: each finds what it is there for, in one line, and is silent else."""

import itertools
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pytest
from own_table import config_of
from refusals import refused

from apps.recsys.binary_metrics import task_metrics
from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, Target
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import SplitConfig
from apps.recsys.tables.encode import checks
from apps.recsys.tables.encode.checks import label_among_features, shared_groups, suspicious_metrics
from apps.recsys.tables.encode.drift import drift
from apps.recsys.tables.rows.arrays import MultiValued, TableArrays

N = 400


def arrays(**changed: object) -> TableArrays:
    """A number, a category, an id of each row, and two tasks that none of them gives away."""
    rng = np.random.default_rng(0)
    label_Nt = (rng.random((N, 2)) < 0.3).astype(np.float32)
    features = Features(
        categorical=(CategoricalFeature("kind", 8), CategoricalFeature("row", N + 1)),
        continuous=(ContinuousFeature("age"),),
        tasks=("click", "buy"),
    )
    ids_NF = np.stack([rng.integers(1, 8, N), np.arange(1, N + 1)], 1)
    values = {"dense_NC": rng.normal(size=(N, 1)).astype(np.float32), "ids_NF": ids_NF, "label_Nt": label_Nt}
    changed = {"features": features, "multi": {}, **values, **changed}
    return TableArrays(**changed)  # type: ignore[arg-type]


def test_a_clean_table_and_tiny_ones_have_no_finding_and_a_task_s_name_is_one():
    # The ids would predict every label that their own means were taken of.
    whole = arrays()
    assert label_among_features(whole) == []
    for n in (0, 1):
        part = TableArrays(whole.features, whole.dense_NC[:n], whole.ids_NF[:n], {}, whole.label_Nt[:n])
        assert label_among_features(part) == []
    named = Features((CategoricalFeature("click", 8), CategoricalFeature("row", N + 1)), (ContinuousFeature("age"),),
                     ("click", "buy"))  # fmt: skip
    (finding,) = label_among_features(arrays(features=named))
    assert finding == "column 'click' has the name of a task: is the label among the features?"


def test_a_number_that_orders_the_label_is_found_in_either_direction_with_a_few_other_rows_too():
    plain = arrays()
    for sign in (1, -1):
        dense_NC = (sign * (plain.label_Nt[:, 1:] * 2 + 0.1 * plain.dense_NC)).astype(np.float32)
        dense_NC[plain.label_Nt[:, 1] == (sign < 0)] = np.nan  # missing is a value like others
        (finding,) = label_among_features(arrays(dense_NC=dense_NC))
        assert finding.startswith("column 'age' alone predicts task 'buy' with AUC 1.00000")
    # 0 of a negative and a sum of a positive, but for 1 of 120 positives: a half of its pairs are ties, 1 - 0.5 / 120.
    plain = arrays()
    dense_NC = np.where(plain.label_Nt[:, 1:] == 1, np.exp(plain.dense_NC), 0).astype(np.float32)
    dense_NC[np.argmax(plain.label_Nt[:, 1])] = 0
    (finding,) = label_among_features(arrays(dense_NC=dense_NC))
    assert finding.startswith("column 'age' alone predicts task 'buy' with AUC 0.99")
    assert finding.endswith("Else leave it out (exclude: [age])")


@pytest.mark.parametrize("of_numbers", [True, False])
def test_a_yes_or_no_that_a_number_is_made_of_is_found(of_numbers):
    plain = arrays()
    bought_N1 = plain.label_Nt[:, 1:]
    spent_N1 = np.where(bought_N1 == 1, np.exp(plain.dense_NC), 0).astype(np.float32)
    features = replace(plain.features, tasks=("spend",), targets=(Target("regression"),))
    ids_NF = plain.ids_NF.copy()
    ids_NF[:, 0] = 1 + bought_N1[:, 0]
    changed = {"dense_NC": bought_N1} if of_numbers else {"ids_NF": ids_NF}
    (finding,) = label_among_features(arrays(features=features, label_Nt=spent_N1, **changed))
    name = "age" if of_numbers else "kind"
    assert finding.startswith(f"column {name!r} alone tells small labels of task 'spend' from large ones, AUC 1.00000")


def test_a_category_or_values_that_hold_the_label_are_found():
    plain = arrays()
    ids_NF = plain.ids_NF.copy()
    ids_NF[:, 0] = 2 + 3 * plain.label_Nt[:, 0]
    (finding,) = label_among_features(arrays(ids_NF=ids_NF))
    assert finding.startswith("column 'kind' alone predicts task 'click' with AUC 1.00000")
    plain = arrays()
    label_Nt = plain.label_Nt.copy()
    ids_NF = plain.ids_NF.copy()
    ids_NF[:, 0] = 2 + 3 * label_Nt[:, 0]
    label_Nt[::3, 0] = np.nan
    assert len(label_among_features(arrays(ids_NF=ids_NF, label_Nt=label_Nt))) == 1
    label_N = arrays().label_Nt[:, 0].astype(np.int64)
    values_N2 = np.where(label_N[:, None] == 1, [[5, 2]], [[2, 4]])
    values_N2[::2] = values_N2[::2, ::-1]  # in either order
    held = MultiValued(values_N2.ravel(), np.full(N, 2))
    (finding,) = label_among_features(arrays(multi={"tags": held}))
    assert finding.startswith("column 'tags' alone predicts task 'click' with AUC 1.00000")
    assert MultiValued(np.array([7, 8, 8, 7, 7]), np.array([2, 0, 2, 1, 0])).sets_N().tolist() in (
        [a, b, a, c, b] for a, b, c in itertools.permutations(range(3))
    )


def findings(z: np.ndarray, y: np.ndarray) -> str:
    return "; ".join(suspicious_metrics({"a": task_metrics(z, y)}, "test"))


def calibrated(n: int = 4000) -> tuple[np.ndarray, np.ndarray]:
    rng = np.random.default_rng(1)
    z = rng.normal(-1, 1, n)
    return z, (rng.random(n) < 1 / (1 + np.exp(-z))).astype(float)


def test_suspicious_metrics_and_means_that_are_far_off_are_found():
    assert findings(*calibrated()) == ""
    z, y = calibrated()
    assert "of task 'a' is below 0.5: worse than chance" in findings(-z, y)
    assert "AUC 1.000000 of task 'a' is above 0.9999" in findings(np.where(y > 0, 9.0, -9.0), y)
    share = y.mean()
    constant = np.full(len(z), np.log(share / (1 - share)))
    assert findings(constant, y) == f"test: all 4000 predictions of task 'a' are {share:.4g}"
    assert findings(z, np.ones(len(z))) == "test: task 'a' has positive labels alone: its AUC does not exist"
    assert findings(z, np.full(len(z), np.nan)) == "test: task 'a' has no labels: it has no metrics"
    one_nan = np.where(np.arange(len(z)) == 7, np.nan, z)
    assert findings(one_nan, y) == "test: 1 of 4000 predictions of task 'a' are NaN"
    z, y = calibrated()
    assert findings(z + 1, y).startswith("test: the mean prediction of task 'a' is ")
    assert findings(z + 0.1, y) == ""
    # 0.10 against 0.15: a third off. Standard error sqrt(0.1 * 0.9 / n): 0.03 of 100 rows, 0.003 of 10,000.
    assert not checks.far_from(0.15, 0.10, 100)
    assert checks.far_from(0.15, 0.10, 10_000)
    # Of 0.95, the negatives' share is 0.05: 0.93 is off by 0.4 of it.
    assert checks.far_from(0.93, 0.95, 100_000)
    assert not checks.far_from(0.945, 0.95, 100_000)


def test_tasks_of_equal_auc_and_users_of_several_splits_are_found():
    z, y = calibrated()
    same, other = task_metrics(z, y), task_metrics(z[::-1] + z, y)
    first, *others = suspicious_metrics({"a": same, "b": same, "c": other}, "val")
    assert first == f"val: tasks 'a' and 'b' have the same AUC, {same.auc:.6f}: are they the same label?"
    assert not any("the same AUC" in finding for finding in others)
    users = {"train": np.array([1, 1, 2, 3]), "val": np.array([4, 5]), "test": np.array([3, 2, 2, 9])}
    assert shared_groups(users) == ["2 of 3 users of test are in train too, although the split is by user"]
    assert shared_groups({"train": np.array([1, 2]), "val": np.array([3])}) == []
    shared = {"train": np.array([7]), "val": np.array([7])}
    assert shared_groups(shared, "group") == ["1 of 1 groups of val are in train too, although the split is by group"]


def test_report_prints_each_check_once(capsys, caplog):
    checks.print_checks(["test: task 'a' has [negative] labels alone"])
    out = capsys.readouterr().out
    assert out.splitlines() == ["checks", "  ! test: task 'a' has [negative] labels alone"]
    assert not caplog.messages  # the command line prints what is logged: it would be there twice
    checks.print_checks([])
    assert "nothing found (a label among the features;" in capsys.readouterr().out


# 100 rows: half in Rome, prices 1 to 100 without one in every tenth row.
TRAIN = {
    "city": ["Rome", "Oslo"] * 50,
    "kind": ["a", "a", "a", "b"] * 25,
    "price": [None if i % 10 == 0 else i for i in range(1, 101)],
    "click": [1, 0] * 50,
}


@pytest.fixture
def encoding(own, tmp_path):
    pa.csv.write_csv(pa.table(TRAIN), tmp_path / "train.csv")
    config = config_of(categorical=("city", "kind"), continuous=("price",), split=SplitConfig(val=0, test=0))
    return own(config, test_file=None).encoding


@pytest.fixture
def lines(tmp_path):
    def of(encoding, columns):
        pa.parquet.write_table(pa.table(columns), tmp_path / "new.parquet")
        return drift(encoding, str(tmp_path / "new.parquet"))

    return of


def test_each_difference_is_a_line_the_largest_comes_first_and_the_same_rows_have_none(encoding, lines):
    assert lines(encoding, TRAIN) == []
    assert lines(encoding, {column: values[::3] for column, values in TRAIN.items()}) == []
    # 200 rows: kinds that are half b, a quarter in training; a quarter of the cities unknown; 60 % of the prices that
    # are there above 99, and 70 % missing.
    new = {
        "city": ["Rome", "Oslo", "Rome", "Bonn"] * 50,
        "kind": ["a", "b"] * 100,
        "price": [*[None] * 140, *range(30, 54), *range(100, 136)],
    }
    assert lines(encoding, new) == [
        "column 'price': 70.0% of the rows have no value, 10.0% in training: their predictions rest on the other "
        "columns",
        "column 'price': 60.0% of the values are outside training's 1 to 99: predictions extrapolate",
        "column 'city': 25.0% of the values are not in training: they are read as one unknown value",
        # 0.25 ln(0.5 / 0.25) + 0.25 ln(0.75 / 0.5) = 0.17329 + 0.10137
        "column 'kind': other shares of values, population stability index 0.27 ('a' 50.0%, 75.0% in training): mean "
        "predictions and calibration shift",
    ]


def test_an_earlier_checkpoint_has_unknown_values_and_means_and_bad_files_are_named(encoding, lines, tmp_path):
    state = encoding.state()
    del state["profiles"]
    old = Encoding.from_state(state)
    assert old == encoding
    # The mean of 1 to 99 without the tens is 50, its standard deviation 28.72; (99 - 50) / 28.72 = 1.71.
    new = {"city": ["Rome", "Bonn"] * 50, "kind": ["b"] * 100, "price": [99] * 100}
    assert lines(old, new) == [
        "column 'price': mean 99, 50 in training, 1.7 standard deviations: mean predictions and calibration shift",
        "column 'city': 50.0% of the values are not in training: they are read as one unknown value",
    ]
    with pytest.raises(ValueError, match=r"column 'price' \(continuous\) is not in '.*new.parquet'"):
        lines(encoding, {"city": ["Rome"], "kind": ["a"]})
    with pytest.raises(ValueError, match=r"data='.*new.parquet' has no rows"):
        lines(encoding, {column: values[:0] for column, values in TRAIN.items()})
    refused(r"data='nowhere.csv': no such file", lambda: drift(encoding, "nowhere.csv"))
