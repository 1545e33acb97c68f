"""Task heads (towers, ESMM, AITM), and tasks of every kind from a table's columns to predictions."""

import csv
import math

import pytest
import torch
import torch.nn.functional as F
from quiet_trainer import quiet_trainer
from refusals import refused
from torch.testing import assert_close

from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Outputs
from apps.recsys.metrics import MultiTaskMetrics
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.tasks import HeadConfig, and_logit, over_all, step_labels

NAN = math.nan


def logit(p):
    return math.log(p / (1 - p))


@pytest.mark.parametrize("hidden_dims", [(4, 2), ()])
def test_towers_are_mlps_side_by_side(hidden_dims):
    torch.manual_seed(0)
    head = HeadConfig(hidden_dims=hidden_dims, activation="silu").build(5, 3)
    x_tBD = torch.randn(3, 7, 5)
    for t in range(3):
        h = x_tBD[t]
        for i in range(len(hidden_dims)):
            h = F.silu(h @ getattr(head.towers, f"w_{i}")[t] + getattr(head.towers, f"b_{i}")[t])
        assert_close(head(x_tBD)[:, t], (h @ head.weight[t] + head.bias[t]).squeeze(-1))


def test_a_batch_of_one_trains_under_batch_norm_and_dropout_is_of_training_alone():
    head = HeadConfig(norm="batch").build(4, 2)
    before = {k: v.clone() for k, v in head.state_dict().items()}
    x_tBD = torch.randn(2, 1, 4)
    y = head(x_tBD)
    y.sum().backward()
    assert_close(y, head.eval()(x_tBD))  # the running statistics, which stay
    assert_close(head.state_dict(), before)
    # Dropout is of training alone.
    head = HeadConfig(hidden_dims=(32,), dropout=0.5).build(4, 2)
    x_tBD = torch.randn(2, 8, 4)
    assert not torch.equal(head(x_tBD), head(x_tBD))
    assert torch.equal(head.eval()(x_tBD), head(x_tBD))


@pytest.mark.parametrize("kind", ["plain", "esmm", "aitm"])
def test_logits_start_at_the_share_of_positives(kind):
    # With towers at zero: 0.5 and 0.2. Of ESMM the second tower starts at 0.2 / 0.5, and the product is 0.2 again.
    head = HeadConfig(kind).build(4, 2, positives=(0.5, 0.2))
    with torch.no_grad():
        head.weight.zero_()
    assert_close(head(torch.randn(2, 3, 4)).sigmoid(), torch.tensor([[0.5, 0.2]] * 3))
    assert HeadConfig(kind, prior_bias=False).build(4, 2, positives=(0.5, 0.2)).bias.abs().sum() > 0


def test_esmm_multiplies_chances_and_has_their_losses():
    # 0.5 * 0.4 = 0.2, and 0.2 * 0.25 = 0.05 for a third step.
    head = HeadConfig("esmm", hidden_dims=()).build(1, 3)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
    x_tBD = torch.tensor([logit(0.5), logit(0.4), logit(0.25)]).view(3, 1, 1)
    assert_close(head(x_tBD).sigmoid(), torch.tensor([[0.5, 0.2, 0.05]]))
    # Float32 probabilities are 0 below exp(-104): -60 - 60 is the logit of a product all the same. 1 times 1 stays
    # below 1: of two chances 1 - e^-40, the complement is 2 e^-40.
    a = torch.tensor([-60.0, 40.0, 300.0, -300.0], requires_grad=True)
    b = torch.tensor([-60.0, 40.0, -2.0, 300.0])
    z = and_logit(a, b)
    assert_close(z.detach(), torch.tensor([-120.0, 40.0 - math.log(2), -2.0, -300.0]))
    F.binary_cross_entropy_with_logits(z, torch.ones(4)).backward()
    assert a.grad.isfinite().all()
    assert a.grad[0] != 0
    # The loss on ctcvr written out, in float64: -y log(p q) - (1 - y) log(1 - p q).
    a, b = torch.randn(2, 9, dtype=torch.float64, generator=torch.Generator().manual_seed(0))
    y = (torch.arange(9) % 2).double()
    pq = a.sigmoid() * b.sigmoid()
    expected = -(y * pq.log() + (1 - y) * (1 - pq).log())
    assert_close(F.binary_cross_entropy_with_logits(and_logit(a, b), y, reduction="none"), expected)


@pytest.mark.parametrize("kind", ["esmm", "aitm"])
def test_a_step_without_the_one_before_is_refused(kind):
    head = HeadConfig(kind).build(4, 2)
    head.check_labels(torch.tensor([[1.0, 1.0], [0.0, math.nan], [math.nan, 1.0]]), ("click", "buy"))
    with pytest.raises(ValueError, match="an example has 'buy' and not 'click'"):
        head.check_labels(torch.tensor([[1.0, 1.0], [0.0, 1.0]]), ("click", "buy"))
    refused(f"head.kind='{kind}' needs at least 2 tasks, there is 1", lambda: HeadConfig(kind).build(4, 1))


def test_a_step_without_a_label_is_0_where_an_earlier_one_is_and_shares_of_all_start_so():
    # Not clicked, so neither carted nor bought, written or not; clicked, or not known: what is not labeled stays so.
    label_Bt = torch.tensor([[0.0, NAN, NAN], [0.0, 0.0, NAN], [1.0, NAN, NAN], [NAN, NAN, 1.0], [1.0, 0.0, NAN]])
    filled = [[0.0, 0.0, 0.0], [0.0, 0.0, 0.0], [1.0, NAN, NAN], [NAN, NAN, 1.0], [1.0, 0.0, 0.0]]
    assert_close(step_labels(label_Bt), torch.tensor(filled), equal_nan=True)
    for config in (HeadConfig("esmm"), HeadConfig("aitm"), HeadConfig(steps=True)):
        assert_close(config.build(4, 3).labels(label_Bt), torch.tensor(filled), equal_nan=True)
    assert HeadConfig().build(4, 3).labels(label_Bt) is label_Bt
    head = HeadConfig("esmm").build(4, 3)
    with pytest.raises(ValueError, match="an example has 'c' and not 'b'"):  # b is 0, since a is
        head.check_labels(head.labels(torch.tensor([[0.0, NAN, 1.0]])), ("a", "b", "c"))
    # 20 % click and 50 % of these buy, the others have no label: 10 % buy.
    assert over_all([0.2, 0.5, 0.1]) == pytest.approx([0.2, 0.1, 0.1])
    for kind in ("esmm", "aitm"):
        head = HeadConfig(kind).build(4, 2, positives=(0.2, 0.5))
        with torch.no_grad():
            head.weight.zero_()
        assert_close(head(torch.randn(2, 3, 4)).sigmoid(), torch.tensor([[0.2, 0.1]] * 3))


def test_aitm_attends_to_what_is_passed_on_and_is_calibrated_by_a_hinge():
    # D = 1. z1 = q1 = 2; passed on: relu(3 * 2 + 1) = 7; q2 = 5. v(u) = u, k(u) = u, s(u) = 0.1 u:
    # scores 0.1 * 49 and 0.1 * 25, so z2 = (7 e^4.9 + 5 e^2.5) / (e^4.9 + e^2.5) = 6.8336. Logits are z.
    head = HeadConfig("aitm", hidden_dims=()).build(1, 2)
    with torch.no_grad():
        head.weight.fill_(1.0)
        head.bias.zero_()
        head.transfer_weight.fill_(3.0)
        head.transfer_bias.fill_(1.0)
        head.attention_weight.copy_(torch.tensor([[[1.0, 1.0, 0.1]]]))
    z2 = (7 * math.exp(4.9) + 5 * math.exp(2.5)) / (math.exp(4.9) + math.exp(2.5))
    assert_close(head(torch.tensor([[[2.0]], [[5.0]]])), torch.tensor([[2.0, z2]]))
    # Probabilities (0.5, 0.7) and (0.5, 0.3): excess 0.2 and 0, mean 0.1, times 0.6.
    head = HeadConfig("aitm").build(4, 2)
    logits_Bt = torch.tensor([[0.0, logit(0.7)], [0.0, logit(0.3)]])
    assert float(head.losses(logits_Bt)["calibrator"]) == pytest.approx(0.06)
    assert HeadConfig("aitm", calibrator_weight=0.0).build(4, 2).losses(logits_Bt) == {}
    assert HeadConfig().build(4, 2).losses(logits_Bt) == {}


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


def test_targets_weights_and_labels_are_those_of_the_training_rows(tmp_path):
    features = table(tmp_path).features
    clicked, price, visits, stars, colour = features.targets
    assert clicked.kind == "binary"
    assert (price.mean, price.std) == (6.0, 2.0)  # 4 and 8: the masked row has no price
    assert (visits.mean, visits.std) == (1.0, pytest.approx(math.sqrt(1.5)))
    assert (stars.levels, stars.shares, colour.classes) == ((1.0, 3.0, 5.0), (0.25, 0.5, 0.25), ("blue", "red"))
    assert colour.shares == (pytest.approx(1 / 3), pytest.approx(2 / 3))
    assert features.positives == (0.5, 0.5, 0.5, 0.5, 0.5)
    # Labels are numbers and places.
    nan = math.nan
    label_Bt = table(tmp_path).rows("train")[:].label_Bt
    expected = [[0, 4, 0, 0, 1], [1, 8, 3, 1, 0], [0, nan, 1, 2, 1], [1, nan, 0, 1, nan]]
    assert_close(label_Bt, torch.tensor(expected, dtype=torch.float32), equal_nan=True)
    # A level or class that training lacks is no label.
    data = table(tmp_path, test=[("a", 0.0, 0, 4.0, 1, 0, 4, "green", 1.0)])
    assert data.rows("test")[:].label_Bt[0, 3:].isnan().all()
    lines = [w for w in data.findings.warnings if "values that training lacks" in w]
    assert [w.split(":")[0] for w in lines] == ["task 'stars'", "task 'colour'"]
    tasks = {**TASKS, "visits": TaskConfig("visits", kind="count", weight="x")}
    weight_Bt = table(tmp_path, tasks, weight="weight").rows("train")[:].weight_Bt
    # Weights 1, 3, 0, 2 of mean 3/2; the price has two labels, of weights 1 and 3 and mean 2; x has mean 3/2.
    assert_close(weight_Bt[:, 0], torch.tensor([2 / 3, 2.0, 0.0, 4 / 3]))
    assert_close(weight_Bt[:, 1], torch.tensor([0.5, 1.5, 0.0, 1.0]))
    assert_close(weight_Bt[:, 2], torch.tensor([0.0, 2 / 3, 4 / 3, 2.0]))


def test_a_weight_of_two_is_the_row_twice(tmp_path):
    """Losses of weighted rows and of repeated ones, whose mean weight is 1, are equal."""
    for name in "ab":
        (tmp_path / name).mkdir()
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
    quiet_trainer(tmp_path, max_epochs=40).fit(model, data)
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
    assert (model.monitor, model.comparison.task_metrics) == ("val/quality", mains)
    values = model.comparison.example_values([out])
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
    refused(match, lambda: table(tmp_path, tasks, rows, test=ROWS, **options).features)


def test_revenue_is_learned_from_its_zeros_and_amounts_and_steps_take_binary_tasks_alone(tmp_path):
    tasks = {"spent": TaskConfig("price", kind="revenue")}
    rows = [(*row[:3], price, *row[4:]) for row, price in zip(ROWS, (0.0, 0.0, math.e, math.e**3), strict=True)]
    (target,) = table(tmp_path, tasks, rows).features.targets
    assert target.shares == (0.5, 0.5)
    assert (target.log_mean, target.log_std) == (pytest.approx(2, rel=1e-6), pytest.approx(1, rel=1e-6))
    assert (target.least, target.most) == (0.0, pytest.approx(math.e**3, rel=1e-6))
    with pytest.raises(ValueError, match=r"stratify='price' is a task of numbers"):
        TableConfig(("user",), tasks=TASKS, split=SplitConfig(stratify="price"))
    with pytest.raises(ValueError, match=r"head\.kind='esmm' takes tasks of kind 'binary', and one is 'regression'"):
        MultiTaskRecommender(table(tmp_path).features, head=HeadConfig("esmm"))


@pytest.mark.parametrize(
    ("prices", "kind", "match"),
    [
        ((1.0, 2.0, 3.0, 4.0), "revenue", "has no amount of 0 in the train split: kind 'revenue' needs both"),
        ((0.0, 0.0, 3.0, 3.0), "revenue", "has fewer than two different positive amounts"),
        *(
            ((0.0, -1.0, 3.0, 4.0), kind, f"must hold numbers of at least 0 for kind '{kind}', but row 1 holds -1")
            for kind in ("revenue", "tweedie", "poisson")
        ),
    ],
)
def test_amounts_that_their_kind_does_not_take(tmp_path, prices, kind, match):
    rows = [(*row[:3], price, *row[4:]) for row, price in zip(ROWS, prices, strict=True)]
    refused(match, lambda: table(tmp_path, {"spent": TaskConfig("price", kind=kind)}, rows).features)
