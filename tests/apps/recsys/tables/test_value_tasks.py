"""Tasks of every kind from a table's columns to predictions, with weights and masks."""

from __future__ import annotations

import csv
import math

import pytest
import torch
from lightning import Trainer
from torch.testing import assert_close

from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Outputs
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.tasks import HeadConfig

TASKS = {
    "clicked": TaskConfig("clicked"),
    "price": TaskConfig("price", kind="regression", mask="sold"),
    "visits": TaskConfig("visits", kind="count"),
    "stars": TaskConfig("stars", kind="ordinal"),
    "colour": TaskConfig("colour", kind="multiclass"),
}
ROWS = [  # user, x, clicked, price, sold, visits, stars, colour, weight
    ("a", 0.0, 0, 4.0, 1, 0, 1, "red", 1.0),
    ("b", 1.0, 1, 8.0, 1, 3, 3, "blue", 3.0),
    ("a", 2.0, 0, 99.0, 0, 1, 5, "red", 0.0),
    ("b", 3.0, 1, "", 1, 0, 3, "", 2.0),
]
NAMES = ("user", "x", "clicked", "price", "sold", "visits", "stars", "colour", "weight")


def write(path, rows=ROWS, times=1):
    with open(path, "w", newline="") as file:
        writer = csv.writer(file)
        writer.writerow(NAMES)
        writer.writerows(list(rows) * times)
    return str(path)


def table(tmp_path, tasks=TASKS, rows=ROWS, test=None, times=1, categorical=("user",), **options):
    test_file = write(tmp_path / "test.csv", test or rows)
    own = {"split": SplitConfig("given", val=0.0), **options}
    config = TableConfig(categorical=categorical, continuous=("x",), tasks=tasks, **own)
    train = write(tmp_path / "train.csv", rows, times)
    return TableData(
        "table", cache_dir=str(tmp_path / "cache"), train_file=train, test_file=test_file, table=config, batch_size=4
    )


def test_targets_are_those_of_the_training_rows(tmp_path):
    features = table(tmp_path).features
    clicked, price, visits, stars, colour = features.targets
    assert clicked.kind == "binary"
    assert (price.mean, price.std) == (6.0, 2.0)  # 4 and 8: the masked row has no price
    assert (visits.mean, visits.std) == (1.0, pytest.approx(math.sqrt(1.5)))
    assert stars.levels == (1.0, 3.0, 5.0)
    assert stars.shares == (0.25, 0.5, 0.25)
    assert colour.classes == ("blue", "red")
    assert colour.shares == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert features.positives == (0.5, 0.5, 0.5, 0.5, 0.5)


def test_labels_are_numbers_and_places(tmp_path):
    nan = math.nan
    label_Bt = table(tmp_path).rows("train")[:].label_Bt
    expected = [[0, 4, 0, 0, 1], [1, 8, 3, 1, 0], [0, nan, 1, 2, 1], [1, nan, 0, 1, nan]]
    assert_close(label_Bt, torch.tensor(expected, dtype=torch.float32), equal_nan=True)


def test_a_level_or_class_that_training_lacks_is_no_label(tmp_path):
    data = table(tmp_path, test=[("a", 0.0, 0, 4.0, 1, 0, 4, "green", 1.0)])
    assert data.rows("test")[:].label_Bt[0, 3:].isnan().all()
    lines = [w for w in data.findings.warnings if "values that training lacks" in w]
    assert [w.split(":")[0] for w in lines] == ["task 'stars'", "task 'colour'"]


def test_weights_have_the_mean_one_over_a_task_s_labeled_rows(tmp_path):
    tasks = {**TASKS, "visits": TaskConfig("visits", kind="count", weight="x")}
    weight_Bt = table(tmp_path, tasks, weight="weight").rows("train")[:].weight_Bt
    # Weights 1, 3, 0, 2 of mean 3/2; the price has two labels, of weights 1 and 3 and mean 2; x has mean 3/2.
    assert_close(weight_Bt[:, 0], torch.tensor([2 / 3, 2.0, 0.0, 4 / 3]))
    assert_close(weight_Bt[:, 1], torch.tensor([0.5, 1.5, 0.0, 1.0]))
    assert_close(weight_Bt[:, 2], torch.tensor([0.0, 2 / 3, 4 / 3, 2.0]))


def test_a_weight_of_two_is_the_row_twice(tmp_path):
    """Losses of weighted rows and of repeated ones, whose mean weight is 1, are equal."""
    (tmp_path / "a").mkdir()
    (tmp_path / "b").mkdir()
    rows = [(*row[:-1], weight) for row, weight in zip(ROWS, (1.0, 2.0, 1.0, 2.0), strict=True)]
    tasks = {name: TASKS[name] for name in ("clicked", "visits", "stars")}
    weighted = table(tmp_path / "a", tasks, rows, categorical=(), weight="weight")
    repeated = table(tmp_path / "b", tasks, [row for row in rows for _ in range(int(row[-1]))], categorical=())
    torch.manual_seed(0)
    model = MultiTaskRecommender(weighted.features)
    by_weight, by_rows = (model.task_loss(data.rows("train")[:]).terms for data in (weighted, repeated))
    # The models' features differ: repeated rows have other shares. The losses are of the same outputs.
    assert_close(by_weight["loss_clicked"], by_rows["loss_clicked"])
    assert_close(by_weight["loss_stars"], by_rows["loss_stars"])


def test_training_lowers_every_loss_and_predictions_have_their_columns(tmp_path):
    data = table(tmp_path, times=8)
    torch.manual_seed(0)
    model = MultiTaskRecommender(data.features, optimizer={"lr": 0.02})
    batch = data.rows("train")[:]
    before = model.eval().task_loss(batch).terms
    Trainer(
        max_epochs=40, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
    after = model.eval().task_loss(batch).terms
    for task in TASKS:
        assert after[f"loss_{task}"] < 0.7 * before[f"loss_{task}"], task
    scores = model.predict({"user": ["a", "b"], "x": [0.0, 1.0]})
    assert list(scores) == [
        "probability_clicked", "value_price", "value_visits", "value_stars", "value_colour", "probability_colour",
    ]  # fmt: skip
    assert scores["value_colour"].tolist() == ["red", "blue"]
    assert scores["value_price"][0] == pytest.approx(4, abs=1)
    assert scores["value_price"][1] == pytest.approx(8, abs=1)
    metrics = model.build_metrics()
    with torch.no_grad():
        out = model.task_loss(batch)
    metrics.update(out.outputs, out.targets)
    computed = metrics.compute()
    assert_close(computed["auc"], (computed["auc_clicked"] + computed["auc_colour"]) / 2)
    # AUC and R^2 have no unit: a model of both kinds is judged by their mean.
    mains = ("auc_clicked", "r2_price", "r2_visits", "r2_stars", "auc_colour")
    assert_close(computed["quality"], sum(computed[name] for name in mains) / 5)
    assert model.monitor == "val/quality"
    assert model.task_metrics == mains
    values = model.example_values([out])
    assert values.name == "mean quality"
    assert_close(values.values_N.mean(), computed["quality"], rtol=1e-6, atol=0)


def test_rows_of_cold_users_have_no_mean_over_tasks_of_two_units():
    outputs = Outputs((Target(), Target("regression"), Target("regression")))
    metrics = MultiTaskMetrics(("click", "price", "time"), outputs=outputs)
    y_Bt = torch.tensor([[0.0, 1, 2], [1, 2, 4], [0, 3, 3], [1, 4, 1]])
    metrics.update(torch.randn(4, 3), y_Bt, None, torch.tensor([1, 1, 1, 0], dtype=torch.uint8))
    values = metrics.compute()
    assert_close(values["cold_user_r2"], (values["cold_user_r2_price"] + values["cold_user_r2_time"]) / 2)
    assert_close(values["cold_user_auc"], values["cold_user_auc_click"])
    assert not [name for name in values if "score" in name]


@pytest.mark.parametrize(
    ("tasks", "rows", "options", "match"),
    [
        ({"price": TaskConfig("colour", kind="regression")}, ROWS, {}, "'colour' of the training table must hold "
         "numbers: row 0 holds 'red'"),
        ({"visits": TaskConfig("price", kind="count")}, [*ROWS, ("a", 0.0, 0, 4.5, 1, 0, 1, "red", 1.0)], {},
         r"'visits': column 'price' must hold integers of at least 0, but row 4 holds 4\.5"),
        ({"x": TaskConfig("price", kind="regression", loss="weighted_logistic")},
         [*ROWS, ("a", 0.0, 0, -4.5, 1, 0, 1, "red", 1.0)], {}, r"at least 0 for loss 'weighted_logistic', but row 4"),
        ({"sold": TaskConfig("sold", kind="ordinal", mask="sold")}, ROWS, {}, "'sold' has the value 1 alone in"),
        ({"price": TaskConfig("price", kind="regression", mask="stars")}, ROWS, {}, "mask column 'stars' must hold "
         "0 and 1, but row 1 holds 3"),
        ({"clicked": TaskConfig("clicked")}, [*ROWS, ("a", 0.0, 0, 4.5, 1, 0, 1, "red", -1.0)], {"weight": "weight"},
         r"'weight' must hold finite weights of at least 0, but row 4 holds -1"),
        ({"clicked": TaskConfig("clicked")}, [*ROWS, ("a", 0.0, 0, 4.5, 1, 0, 1, "red", float("inf"))],
         {"weight": "weight"}, r"'weight' must hold finite weights of at least 0, but row 4 holds inf"),
        ({"clicked": TaskConfig("clicked")}, [(*row[:-1], 0.0) for row in ROWS], {"weight": "weight"},
         r"'weight' sum to 0 over the training rows of task 'clicked'"),
    ],
)  # fmt: skip
def test_bad_labels_and_weights(tmp_path, tasks, rows, options, match):
    with pytest.raises(ValueError, match=match):
        _ = table(tmp_path, tasks, rows, test=ROWS, **options).features


def test_revenue_is_learned_from_its_zeros_and_amounts(tmp_path):
    tasks = {"spent": TaskConfig("price", kind="revenue")}
    rows = [(*row[:3], price, *row[4:]) for row, price in zip(ROWS, (0.0, 0.0, math.e, math.e**3), strict=True)]
    (target,) = table(tmp_path, tasks, rows).features.targets
    assert target.shares == (0.5, 0.5)
    assert (target.log_mean, target.log_std) == (pytest.approx(2, rel=1e-6), pytest.approx(1, rel=1e-6))
    assert (target.least, target.most) == (0.0, pytest.approx(math.e**3, rel=1e-6))


@pytest.mark.parametrize(
    ("prices", "kind", "match"),
    [
        ((1.0, 2.0, 3.0, 4.0), "revenue", "has no amount of 0 in the train split: kind 'revenue' needs both"),
        ((0.0, 0.0, 3.0, 3.0), "revenue", "has fewer than two different positive amounts"),
        ((0.0, -1.0, 3.0, 4.0), "revenue", "must hold numbers of at least 0 for kind 'revenue', but row 1 holds -1"),
        ((0.0, -1.0, 3.0, 4.0), "tweedie", "must hold numbers of at least 0 for kind 'tweedie', but row 1 holds -1"),
        ((0.0, -1.0, 3.0, 4.0), "poisson", "must hold numbers of at least 0 for kind 'poisson', but row 1 holds -1"),
    ],
)
def test_amounts_that_their_kind_does_not_take(tmp_path, prices, kind, match):
    rows = [(*row[:3], price, *row[4:]) for row, price in zip(ROWS, prices, strict=True)]
    with pytest.raises(ValueError, match=match):
        _ = table(tmp_path, {"spent": TaskConfig("price", kind=kind)}, rows).features


def test_options_that_a_kind_does_not_have():
    with pytest.raises(ValueError, match=r"positive is for kind 'binary', not 'count'"):
        TaskConfig("x", kind="count", positive=(1,))
    with pytest.raises(ValueError, match=r"loss is for kind 'regression', not 'ordinal'"):
        TaskConfig("x", kind="ordinal", loss="absolute")
    with pytest.raises(ValueError, match="kind"):
        TaskConfig("x", kind="numeric")
    with pytest.raises(ValueError, match=r"stratify='price' is a task of numbers"):
        TableConfig(("user",), tasks=TASKS, split=SplitConfig(stratify="price"))


def test_steps_take_binary_tasks_alone(tmp_path):
    with pytest.raises(ValueError, match=r"head\.kind='esmm' takes tasks of kind 'binary', and one is 'regression'"):
        MultiTaskRecommender(table(tmp_path).features, head=HeadConfig("esmm"))
