"""The description of a table: what contradicts itself is refused, in one line that names it."""

import pytest
from refusals import refused

from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig, nearest

CLICK = {"click": TaskConfig("y")}


@pytest.mark.parametrize(
    ("options", "message"),
    [
        ({"tasks": CLICK}, "names no feature"),
        (
            {"categorical": ("a", "y"), "tasks": CLICK},
            "column 'y' is the label of task 'click' and a categorical feature",
        ),
        ({"continuous": ("y",), "tasks": CLICK}, "column 'y' is the label of task 'click' and a continuous feature"),
        (
            {"categorical": ("a",), "continuous": ("a",), "tasks": CLICK},
            "'a' is listed twice: under categorical and con",
        ),
        ({"categorical": ("a.b",), "tasks": CLICK}, "'a.b': a feature or a task needs a name without dot"),
        ({"categorical": ("user",), "hash_rows": {"usr": 9}, "tasks": CLICK}, "hash_rows names 'usr'.*mean 'user'"),
        ({"categorical": ("a",), "num_rows": {"a": 1}, "tasks": CLICK}, r"num_rows\['a'\]=1 is not at least 2"),
        (
            {"categorical": ("a",), "num_rows": {"a": 9}, "hash_rows": {"a": 9}, "tasks": CLICK},
            "both hash_rows and num_rows",
        ),
        ({"categorical": ("a",), "min_count": 0, "tasks": CLICK}, "min_count=0 is not at least 1"),
        ({"categorical": ("a",), "separator": "", "tasks": CLICK}, "separator='' has length 0"),
        ({"categorical": ("a",), "tasks": CLICK, "split": SplitConfig("user")}, "needs table.user"),
        ({"categorical": ("a",), "tasks": CLICK, "split": SplitConfig("time")}, "needs table.time"),
        (
            {"categorical": ("a",), "tasks": CLICK, "split": SplitConfig(stratify="clik")},
            "split.stratify='clik' is not one of click; did you mean 'click'",
        ),
    ],
)
def test_a_description_that_contradicts_itself_is_refused(options, message):
    refused(message, lambda: TableConfig(**options))


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (lambda: SplitConfig("usr"), "split.kind='usr' is not one of .*; did you mean 'user'"),
        (lambda: SplitConfig(val=1.0), "split.val=1.0 is not in"),
        (lambda: SplitConfig(test=-0.1), "split.test=-0.1 is not in"),
        (lambda: SplitConfig("time", stratify="click"), "is for kind 'given' or 'random', not 'time'"),
        (lambda: SplitConfig(seed=-1), "split.seed=-1 is not in"),
        (lambda: TaskConfig("y", positive=("a",), at_least=1), "'y': positive and at_least exclude each other"),
        (lambda: TaskConfig("y", positive=()), r"positive=\(\) has length 0"),
    ],
)
def test_impossible_splits_and_labels_are_refused(make, message):
    refused(message, make)


def test_a_feature_is_left_out_with_its_options_and_a_near_name_is_suggested():
    config = TableConfig(
        categorical=("a", "b"), continuous=("c",), tasks=CLICK, hash_rows={"a": 9}, user="a", num_rows={"b": 4}
    )
    left = config.without(["a"])
    assert (left.features, left.hash_rows, left.num_rows) == (("b", "c"), {}, {"b": 4})
    assert left.user == "a"  # the role of the user is not that of a feature
    assert left.roles == {"a": "user", "y": "task click", "b": "categorical", "c": "continuous"}
    refused("exclude='d' is not a feature", lambda: config.without(["d"]))
    refused("exclude leaves no feature", lambda: config.without(["a", "b", "c"]))
    assert nearest("citty", ("City", "age")) == "; did you mean 'City'?"
    assert nearest("price", ("dice", "created")) == ""  # they share three letters of nine
