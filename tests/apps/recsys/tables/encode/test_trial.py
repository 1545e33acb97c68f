"""The encoding of numbers by thresholds of a table: which one, from which rows, and what a checkpoint keeps of it."""

import logging
from dataclasses import replace

import numpy as np
import pyarrow as pa
import pyarrow.csv
import pytest
import torch
from own_table import config_of
from refusals import refused

from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.schema import SplitConfig, TaskConfig
from apps.recsys.tables.encode import trial

NUMBER = {"y": TaskConfig("y", kind="regression")}
SPLIT = SplitConfig("random", val=0.25, test=0.2)


@pytest.fixture(autouse=True)
def few_steps(monkeypatch):
    monkeypatch.setattr(trial, "_STEPS", 90)


@pytest.fixture
def table(own, tmp_path):
    """Makes a TableData of columns of numbers, by default with a task of numbers."""

    def make(columns, numbers="auto", tasks=NUMBER, split=SPLIT, **options):
        pa.csv.write_csv(pa.table(columns), tmp_path / "train.csv")
        names = tuple(column for column in columns if column.startswith("x"))
        roles = {"categorical": (), "continuous": names, "tasks": tasks, "split": split, "numbers": numbers}
        return own(config_of(**{**roles, **options}), test_file=None)

    return make


def steps(num=1500):
    """Return a label that jumps from 0 to 1 and back ten times along a column."""
    x = np.random.default_rng(0).random(num)
    return {"x0": x, "y": np.floor(20 * x) % 2}


def slopes(num=1500):
    """Return a label that is a sum of smooth functions of four columns."""
    x = np.random.default_rng(0).normal(size=(4, num))
    return {**{f"x{i}": own for i, own in enumerate(x)}, "y": np.sin(3 * x).sum(0)}


def test_validation_decides_between_the_two_encodings_and_no_generator_moves(table, caplog):
    torch.manual_seed(5)
    before = torch.get_rng_state()
    with caplog.at_level(logging.INFO):
        assert table(steps()).features.numbers == "bins"
        assert table(slopes()).features.numbers == "linear"
    assert torch.equal(torch.get_rng_state(), before)
    lines = [line for line in caplog.messages if line.startswith("numbers: ")]
    assert [line.split()[1] for line in lines] == ["bins,", "linear,"]
    assert lines[0].endswith("; for the other table.numbers: linear")


def test_without_validation_the_kind_of_the_tasks_decides(table):
    rows = slopes(60)
    rows["click"] = (rows["y"] > 0).astype(int)
    no_val = SplitConfig("random", val=0, test=0.2)
    assert table(rows, split=no_val).features.numbers == "linear"
    assert table(rows, split=no_val, tasks={"click": TaskConfig("click")}).features.numbers == "bins"
    assert table(rows, numbers="linear", tasks={"click": TaskConfig("click")}).features.numbers == "linear"
    plain = table(rows, numbers=None).features
    assert (plain.numbers, plain.continuous[0].thresholds) == ("", ())
    refused("numbers='tree' is not one of auto, bins, linear", lambda: config_of(numbers="tree"))


def test_rows_without_labels_of_two_kinds_are_not_tried(own, caplog):
    roles = {"continuous": ("age",), "split": SplitConfig("random", val=0.3, test=0.3), "numbers": "auto"}
    drawn = {"kind": "items", "column": "city", "per_positive": 1}
    with caplog.at_level(logging.INFO):
        features = own(config_of(**roles, tasks={}), test_file=None, negatives=drawn).features
    assert (features.numbers, features.continuous[0].name) == ("bins", "age")
    assert not [line for line in caplog.messages if line.startswith("numbers: ")]


def test_thresholds_are_learned_from_training_rows_alone(table):
    # By time 60 rows train. The label jumps at 29, and in later rows, whose numbers are larger, at 129.
    x = np.arange(200)
    columns = {"x": x % 60 + 100 * (x >= 60), "time": x, "y": np.where(x < 60, x > 29, x % 60 > 29).astype(int)}
    split = SplitConfig("time", val=0.5, test=0.4)
    options = {"tasks": {"y": TaskConfig("y")}, "time": "time", "split": split}
    data = table(columns, "bins", **options)
    assert data.sizes()["train"] == 60
    found = data.features.continuous[0].thresholds
    assert 29.0 in found
    assert max(found) < 59
    columns["y"][60:], columns["x"][60:] = 1 - columns["y"][60:], 7
    assert table(columns, "bins", **options).features.continuous == data.features.continuous


def test_a_checkpoint_keeps_its_thresholds_and_its_choice(table):
    rows = {**slopes(80), "city": ["Rome", "Oslo"] * 40}
    data = table(rows, "linear", categorical=("city",))
    state = data.encoding_state
    assert Encoding.from_state(state).digest == data.encoding.digest
    other = replace(data.encoding, features=replace(data.features, numbers="bins"))
    assert other.digest != data.encoding.digest
    rows |= {"x0": 9 * rows["x0"], "city": ["Rome", "Bonn"] * 40}
    for use, known in (("adopt", 3), ("extend", 4)):
        later = table(rows, "auto", categorical=("city",))
        getattr(later, use)(state)
        assert later.features.continuous == data.features.continuous
        assert (later.features.numbers, later.features.categorical[0].num_rows) == ("linear", known)
    wrong = table(rows, "bins", categorical=("city",))
    wrong.adopt(state)
    message = "the table does not fit the checkpoint: table.numbers is 'linear' there and 'bins' here"
    refused(message, lambda: wrong.setup("fit"))
    # A checkpoint of an earlier version has neither.
    del state["features"]["numbers"]
    for feature in state["features"]["continuous"]:
        del feature["thresholds"]
    old = Encoding.from_state(state).features
    assert (old.numbers, old.continuous[0].thresholds) == ("", ())


def test_columns_and_labels_at_their_edges(table):
    num, draw = 300, np.random.default_rng(0)
    few = [str(i) if i % 100 == 0 else "" for i in range(num)]
    infinite = ["inf" if i % 7 == 0 else str(i) for i in range(num)]
    columns = {"x0": [3] * num, "x1": few, "x2": infinite, "x3": draw.normal(size=num), "y": draw.normal(size=num)}
    columns |= {"kind": draw.choice(["a", "b", "c"], num), "bought": draw.choice(["yes", "no"], num)}
    columns["late"] = ["1" if i == 250 else "0" if i == 251 else "" for i in range(num)]
    tasks = {
        **NUMBER, "kind": TaskConfig("kind", kind="multiclass"), "bought": TaskConfig("bought", positive=("yes",)),
    }  # fmt: skip
    features = table(columns, tasks=tasks).features
    constant, sparse, with_infinities, _ = features.continuous
    assert (constant.thresholds, features.numbers in ("bins", "linear")) == ((), True)
    assert len(sparse.thresholds) < 3
    assert max(with_infinities.thresholds) < num
    first = {name: values[:30] for name, values in columns.items()}
    assert table(first, tasks=NUMBER).features.numbers in ("bins", "linear")
    late = table(first, tasks={"late": TaskConfig("late")})
    refused("task 'late' has no label in the train split", lambda: late.features)
