"""scikit-learn's models on tables: the columns they see, what they learn, and that the test split is read once."""

import pickle
from types import SimpleNamespace

import numpy as np
import pytest
from every_column import EveryColumn
from every_kind import every_kind
from refusals import refused
from sklearn.metrics import log_loss, roc_auc_score

from apps.equal_cost.comparison import Estimator, Search
from apps.recsys.encoding.features import Target
from apps.recsys.kinds import kind_of
from apps.recsys.tables.estimators import (
    CatBoost,
    HistGradientBoosting,
    HistGradientBoostingUntuned,
    LightGBM,
    LogisticRegression,
    boosting,
)
from apps.recsys.tables.estimators.boosting import Columns
from apps.recsys.tables.estimators.linear import design_matrix
from apps.recsys.tables.rows.arrays import gather

FAST = {"max_iter": 15, "search_rows": 300}


def test_a_split_is_gathered_in_the_tables_order_and_its_design_matrix_is_by_hand():
    data = EveryColumn()
    c = data.columns("train")
    train = gather(data, "train")  # the training loader shuffles
    np.testing.assert_array_equal(train.ids_NF, np.stack([c["kind"], c["item"]], 1))
    np.testing.assert_array_equal(train.dense_NC[:, 0], c["age"].astype(np.float32))
    np.testing.assert_array_equal(train.label_Nt[:, 1], c["buy"])
    np.testing.assert_array_equal(train.multi["tags"].values, c["tags"])
    np.testing.assert_array_equal(train.multi["tags"].lengths_N, c["lengths"])
    np.testing.assert_array_equal(train.group_N, c["group"])
    np.testing.assert_array_equal(train.domain_N, c["domain"])
    refused("the val split has no rows", lambda: gather(EveryColumn((5, 0, 5)), "val"))
    data = EveryColumn()
    c, x = data.columns("val"), design_matrix(gather(data, "val"))
    # kind 6, item 401, domain 2, age 4 bins and missing, the constant 1 bin and missing, 2 standardized, tags 90.
    assert x.shape == (500, 6 + 401 + 2 + 5 + 2 + 2 + 90)
    row = int(np.flatnonzero((c["lengths"] == 2) & ~np.isnan(c["age"]))[0])
    dense = x[[row]].toarray()[0]
    age = c["age"][row]
    want = np.zeros(508)
    want[[c["kind"][row], 6 + c["item"][row], 407 + c["domain"][row]]] = 1
    want[409 + int(age > 30) + int(age > 40) + int(age > 50)] = 1
    want[414] = 1
    want[416:418] = (age - 40) / 10, 5  # the second is 5, by mean 0 and deviation 1
    for tag in c["tags"][c["lengths"][:row].sum() :][:2]:
        want[418 + tag] += 0.5
    np.testing.assert_allclose(dense, want, atol=1e-6)
    missing = int(np.flatnonzero(np.isnan(c["age"]))[0])
    assert x[[missing]].toarray()[0][[413, 416]].tolist() == [1, 0]


def test_columns_for_boosting():
    data = EveryColumn()
    train, c = gather(data, "train"), data.columns("train")
    columns = Columns(train)
    frequent = columns.several.by_column["tags"]
    assert len(frequent) == 64
    assert 7 in frequent
    kept = np.arange(1500) != 3
    x = columns.fit_transform(train, kept, c["click"][kept].astype(int), 0)
    # 2 numbers; kind and the domain as categories; the item's rate and frequency; number of tags and 64 of them.
    assert (x.shape, np.flatnonzero(columns.mask(71)).tolist()) == ((1499, 2 + 2 + 2 + 1 + 64), [2, 3])
    np.testing.assert_array_equal(x[:, 2], c["kind"][kept])
    counts = np.bincount(c["item"][kept], minlength=401)
    np.testing.assert_allclose(x[:, 5], np.log1p(counts[c["item"][kept]]), rtol=1e-6)
    np.testing.assert_array_equal(x[:, 6], c["lengths"][kept])
    np.testing.assert_array_equal(x[0, 7:], [tag in c["tags"][: c["lengths"][0]] for tag in frequent])
    # The rate of an item in training leaves out the row's own fold: a click does not raise its own column. The overall
    # rates of the folds differ by less than 0.05.
    single = counts[c["item"][kept]] == 1
    assert np.ptp(x[single, 4]) < 0.05 < np.ptp(x[:, 4])
    later, v = columns.transform(gather(data, "val")), data.columns("val")
    assert later.shape == (500, 71)
    item = v["item"][0]
    clicks, mean = c["click"][kept][c["item"][kept] == item], c["click"][kept].mean()
    assert later[0, 4] == pytest.approx((clicks.sum() + 10 * mean) / (len(clicks) + 10), abs=1e-6)


@pytest.mark.parametrize("kind", [HistGradientBoosting, HistGradientBoostingUntuned, LogisticRegression])
def test_estimators_learn_and_report_as_the_module_does(kind):
    data, options = EveryColumn(), FAST if kind is HistGradientBoosting else {}
    model = kind(strengths=(1e-6, 0.1)) if kind is LogisticRegression else kind(**options)
    assert isinstance(model, Estimator)
    reads: list[str] = []
    for split in ("train", "val", "test"):
        loader = getattr(data, f"{split}_dataloader")
        setattr(data, f"{split}_dataloader", lambda s=split, own=loader: (reads.append(s), own())[1])
    model.fit(data, 0)
    assert "test" not in reads
    metrics = model.evaluate(data, "test")
    assert set(metrics) == {"auc", "gauc"} | {
        f"{m}_{t}" for m in ("auc", "pr_auc", "log_loss", "ece", "gauc") for t in ("click", "buy")
    }
    arrays = gather(data, "test")
    z, y = model.logits(arrays), arrays.label_Nt
    known = ~np.isnan(y[:, 1])
    assert metrics["auc_buy"] == pytest.approx(roc_auc_score(y[known, 1], z[known, 1]), abs=1e-6)  # kept in float32
    assert metrics["log_loss_click"] == pytest.approx(log_loss(y[:, 0], 1 / (1 + np.exp(-z[:, 0]))), abs=1e-6)
    # The labels' own probabilities have AUC of about 0.85 and 0.88.
    assert metrics["auc_click"] > 0.68
    assert metrics["auc_buy"] > 0.75
    assert pickle.loads(pickle.dumps(model)).evaluate(data, "test") == metrics
    if kind is HistGradientBoostingUntuned:
        return
    again = kind(strengths=(1e-6, 0.1)) if kind is LogisticRegression else kind(**options)
    found = ("iterations", "val_quality")
    settings = {t: {k: v for k, v in own.items() if k not in found} for t, own in model.chosen.items()}
    again.fit(data, 0, settings)
    assert again.evaluate(data, "test") == metrics
    on_validation = model.evaluate(data, "val")  # what is tuned is the best there
    for task, chosen in model.chosen.items():
        assert chosen["val_quality"] == pytest.approx(on_validation[f"auc_{task}"], abs=1e-6)
        if kind is HistGradientBoosting:
            assert 1 <= chosen["iterations"] <= 15
            assert chosen["learning_rate"] in (0.05, 0.1)
    assert kind is HistGradientBoosting or model.chosen["click"]["C"] == 0.1


def test_a_search_that_has_no_time_takes_one_setting_of_each_task():
    data = EveryColumn()
    # Of two tasks, each: 6 of leaves and columns, 2 penalties, 3 on all rows; C: 3. At 0 s there is time for the first.
    for model, total, tried in ((HistGradientBoosting(**FAST), 22, 3), (LogisticRegression(), 12, 2)):
        search = Search(minutes=1e-9)
        settings = model.tune(data, 0, search)
        assert (search.total, len(search.tried)) == (total, tried)
        model.fit(data, 1, settings)
        assert model.evaluate(data, "test")["auc_buy"] > 0.7
    assert HistGradientBoosting(**FAST).tunes
    assert not HistGradientBoostingUntuned().tunes


def test_a_search_that_was_broken_off_ends_as_a_whole_one():
    data, kept = EveryColumn(), {}

    def keep(tried):
        kept.update(tried)
        if len(tried) == 4:
            raise KeyboardInterrupt

    model = HistGradientBoosting(max_iter=4, search_rows=300)
    with pytest.raises(KeyboardInterrupt):
        model.tune(data, 3, Search(keep=keep))
    resumed, whole = Search(tried=kept), Search()
    assert model.tune(data, 3, resumed) == model.tune(data, 3, whole)
    assert len(whole.tried) == whole.total == 22
    assert {name: setting["quality"] for name, setting in resumed.tried.items()} == {
        name: setting["quality"] for name, setting in whole.tried.items()
    }


def test_a_task_with_one_class_in_training_is_its_rate():
    data = EveryColumn(one_class=True)
    for model in (LogisticRegression(), HistGradientBoostingUntuned()):
        model.fit(data, 0)
        assert model.chosen["buy"] == {"constant": 0.0}
        metrics = model.evaluate(data, "test")
        assert metrics["auc_buy"] == 0.5
        assert metrics["auc_click"] > 0.68


def test_lightgbm_tries_the_squared_loss_on_amounts_too():
    def losses(kind):
        return [own.get("objective") for own in LightGBM().candidates(SimpleNamespace(kind=kind_of(Target(kind))))]

    assert losses("revenue") == losses("tweedie") == [None, "regression"] * 6
    assert losses("binary") == losses("regression") == [None] * 6


LEAST = {"auc_bought": 0.9, "r2_price": 0.8, "r2_watched": 0.3, "r2_visits": 0.1, "r2_stars": 0.6, "auc_colour": 0.99}
LEAST |= {"r2_spent": 0.3, "normalized_gini_cost": 0.6, "r2_delay": 0.75}


def check_every_kind(model, data):
    model.fit(data, 0)
    metrics = model.evaluate(data, "test")
    assert {name: metrics[name] for name, least in LEAST.items() if metrics[name] < least} == {}
    # A mean over tasks is of one unit.
    assert metrics["auc"] == pytest.approx((metrics["auc_bought"] + metrics["auc_colour"]) / 2)
    assert "score" not in metrics
    assert model.logits(gather(data, "test")).shape == (60, 1 + 1 + 1 + 1 + 3 + 3 + 3 + 1 + 3)


@pytest.mark.parametrize("kind", [HistGradientBoosting, LogisticRegression])
def test_scikit_learn_predicts_tasks_of_every_kind(kind, tmp_path, monkeypatch):
    for searched in ("TREES", "PENALTIES"):  # the searches are tried above
        monkeypatch.setattr(boosting, searched, getattr(boosting, searched)[:1])
    fastest = max(boosting.WHOLE, key=lambda own: (own["by_category"], own["learning_rate"]))
    monkeypatch.setattr(boosting, "WHOLE", (fastest,))
    check_every_kind(kind(**FAST) if kind is HistGradientBoosting else kind(), every_kind(tmp_path))


@pytest.mark.parametrize("kind", [LightGBM, CatBoost])
def test_other_libraries_predict_tasks_of_every_kind_and_take_every_column(kind, tmp_path):
    pytest.importorskip(kind.package)
    model = kind(max_iter=60)
    model.settings = kind.settings[:1]
    check_every_kind(model, every_kind(tmp_path))
    # Missing numbers, a domain, several values a row, and rows without a label.
    data, model, again = EveryColumn(), kind(max_iter=60), kind(max_iter=60)
    for own in (model, again):
        own.fit(data, 0)
    metrics = model.evaluate(data, "test")
    assert metrics["auc_click"] > 0.68
    assert metrics["auc_buy"] > 0.75
    assert again.evaluate(data, "test") == metrics
