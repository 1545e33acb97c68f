"""A recommender whose predictions are a blend, from its training to its files."""

import re
import shutil

import lightgbm
import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from every_kind import every_kind
from made_table import MadeTable
from quiet_trainer import quiet_trainer
from refusals import refused

import apps
from apps.recsys.kinds import Ordinal
from apps.recsys.schema import TableConfig, TaskConfig
from apps.recsys.tables.blend import trees as trees_module
from apps.recsys.tables.blend.blend import KEY, Blend
from apps.recsys.tables.blend.text import booster_of
from apps.recsys.tables.blend.training import blended
from apps.recsys.tables.data import TableData
from apps.recsys.tables.module import MultiTaskRecommender
from apps.train.checkpoint.checkpoints import BestAndLast

SMALL = {"embedding": {"dim": 2}, "head": {"hidden_dims": [4]}, "report": None}


@pytest.fixture(scope="module")
def run(tmp_path_factory):
    """A run of two epochs, its folder and its data; the trees have one setting and 100 rounds."""
    folder = tmp_path_factory.mktemp("blend")
    data, work = every_kind(folder), trees_module.WORK
    trees_module.WORK = 3e6
    trainer = quiet_trainer(
        folder, max_epochs=2, callbacks=[BestAndLast(str(folder / "checkpoints"))], enable_checkpointing=True
    )
    trainer.fit(MultiTaskRecommender(blend="lightgbm", optimizer={"lr": 0.01}, **SMALL), data)
    trees_module.WORK = work
    return folder, data


def expected(name, kind, z_Bw, booster, weight, x):
    """Return the prediction of a task by hand, float64 (B,), of a network's outputs and LightGBM's prediction."""
    own, trees, target = z_Bw.double(), booster.predict(x), kind.target
    if target.kind == "multiclass":
        return (weight * own.softmax(-1).numpy() + (1 - weight) * trees).max(-1)
    if isinstance(kind, Ordinal):
        trees = trees @ np.array(target.levels)
    if target.kind in ("count", "tweedie", "revenue") or target.loss == "weighted_logistic":
        trees = np.minimum(trees, target.most)
    return weight * kind.value(own).numpy() + (1 - weight) * trees


def test_each_kind_of_task_is_predicted_as_by_hand(run):
    folder, data = run
    path = folder / "checkpoints" / "best.ckpt"
    record = torch.load(path, weights_only=True)[KEY]
    model, network = apps.load(folder), MultiTaskRecommender.load_from_checkpoint(path, blend=None).eval()
    batch = data.rows("test")[:]
    with torch.no_grad():
        z = network(batch)
        predicted = model.outputs.columns(model.features.tasks, model(batch).double())
    x = np.column_stack((batch.dense_BC, batch.single_FB.t())).astype(np.float64)
    seen = 0
    for place, (name, kind, own) in enumerate(
        zip(model.features.tasks, model.outputs.kinds, model.outputs.split(z), strict=True)
    ):
        weight = record["weights"][name]
        assert (weight < 1) == (name in record["files"])
        if weight < 1:
            booster = lightgbm.Booster(model_file=str(path.with_name(f"best.{place}.trees.txt")))
            column = "value" if kind.column == "value" else "probability"
            want = expected(name, kind, own, booster, weight, x)
            np.testing.assert_allclose(predicted[f"{column}_{name}"], want, rtol=2e-6, atol=1e-6, err_msg=name)
            seen += 1
    assert seen >= 7
    # A test, a file and a service give the same.
    with torch.no_grad():
        assert torch.equal(model.task_loss(batch).outputs, model(batch))
    of_file = model.predict(str(folder / "table.parquet"))
    row = int(batch.index_B[5])
    shop = model.encoding.vocabularies["shop"].texts()[int(batch.single_FB[0, 5]) - 1]
    (answer,) = model.task.answers(
        [{"x": batch.dense_BC[5, 0].item(), "noise": batch.dense_BC[5, 1].item(), "shop": shop}]
    )
    for column in ("probability_bought", "value_price", "value_spent", "quantile_90_delay"):
        assert of_file[column][row] == pytest.approx(float(predicted[column][5]), rel=1e-5)
        assert answer[column] == pytest.approx(float(predicted[column][5]), rel=1e-5)
    assert re.fullmatch(r"0\.\d\d network \+ \d\.\d\d trees \(\d+ rounds\)", model.metric_signatures["r2_price"])


def test_the_trees_stay_with_their_checkpoint(run, tmp_path):
    folder, data = run
    path = folder / "checkpoints" / "best.ckpt"
    model = apps.load(path)
    batch = data.rows("val")[:50]
    with torch.no_grad():
        z = model(batch)
    model.save_pretrained(tmp_path / "saved")
    with torch.no_grad():
        assert torch.equal(apps.load(tmp_path / "saved")(batch), z)
    assert model.twin().blend is None
    alone = tmp_path / "model.ckpt"
    shutil.copy(path, alone)
    refused(r"model.ckpt needs the trees in it, so copy them together", apps.load, alone)
    files = sorted(path.parent.glob("*.trees.txt"))
    for file in files:
        shutil.copy(file, tmp_path)
    with torch.no_grad():
        assert torch.equal(apps.load(alone)(batch), z)
    changed = tmp_path / files[0].name
    text = changed.read_text()
    changed.write_text(text.replace("leaf_value=", "leaf_value=1", 1))
    refused("has other trees than those that were trained with .*model.ckpt", apps.load, alone)
    changed.write_text(text.replace("leaf_value=1", "leaf_value=2", 1).replace("leaf_value=0", "leaf_value=1", 1))
    refused("has other trees", apps.load, alone)
    contents = torch.load(path, weights_only=True)
    torch.save({**contents, KEY: {**contents[KEY], "stem": "../best"}}, alone)
    refused("model.ckpt is damaged: its entry 'blend'", apps.load, alone)
    torch.save({name: value for name, value in contents.items() if name != KEY}, alone)
    assert apps.load(alone).trees is None


def test_lists_domains_and_missing_values_are_read_as_in_training(tmp_path, monkeypatch):
    monkeypatch.setattr(trees_module, "WORK", 3e6)
    rng = np.random.default_rng(0)
    tags, age, shop = rng.integers(0, 4, (200, 2)), rng.normal(40, 10, 200), rng.integers(0, 2, 200)
    columns = {
        "tags": [f"t{a}|t{b}" for a, b in tags], "age": np.where(shop == 1, age, np.nan), "shop": shop,
        "click": (tags == 1).any(1) ^ (rng.random(200) < 0.1),
        "stars": np.where(rng.random(200) < 0.5, 1.0 + tags[:, 0], np.nan),
    }  # fmt: skip
    pq.write_table(pa.table(columns), tmp_path / "table.parquet")
    tasks = {"click": TaskConfig("click"), "stars": TaskConfig("stars", kind="ordinal")}
    config = TableConfig(multi_valued=("tags",), continuous=("age",), tasks=tasks, domain="shop")
    data = TableData("table", str(tmp_path), str(tmp_path), train_file="table.parquet", table=config)
    model = MultiTaskRecommender(data.features, **SMALL)
    blend = blended(model, data, "model")
    assert blend.weights["click"] < 1  # an untrained network
    assert blend.several.by_column["tags"].tolist() == [0, 1, 2, 3, 4]  # row 0 is of unseen ones
    blend.write(tmp_path)
    again = Blend.read(blend.record(), tmp_path / "model.ckpt", data.features)
    batch = data.rows("test")[:]
    with torch.no_grad():
        z = model(batch)
    assert torch.equal(again.mixed(model.outputs, z, batch), blend.mixed(model.outputs, z, batch))
    # A row alone, and rows in another order, are predicted as among the others.
    order = torch.tensor([3, 0, 2])
    some = data.rows("test").__getitems__(order)
    np.testing.assert_array_equal(
        blend.mixed(model.outputs, z[order], some), blend.mixed(model.outputs, z, batch)[order]
    )


def test_a_text_that_is_no_sound_trees_is_not_given_to_lightgbm(run):
    text = (run[0] / "checkpoints" / "best.1.trees.txt").read_text()
    assert booster_of(text, 3, 1).num_feature() == 3
    refused("max_feature_idx is 2, and the model's is 3", booster_of, text, 4, 1)
    refused("num_class is 1, and the model's is 2", booster_of, text, 3, 2)
    refused("it has 0 trees", booster_of, text.partition("Tree=0")[0], 3, 1)
    wrong = {
        r"split_feature=\d+": "split_feature=3",  # of three columns
        r"left_child=-?\d+": "left_child=0",  # a node is its own child
        r"right_child=-?\d+": "right_child=-99",
        r"decision_type=\d+": "decision_type=1",  # a set that is not there
        r"num_leaves=\d+": "num_leaves=1000000000",
        r"num_cat=\d+": "num_cat=77",
        r"threshold=": "threshold=0 ",
        r"num_cat=": "num_cat=0\nnum_cat=",
        r"num_cat=\d": "Tree=1",
    }
    for pattern, other in wrong.items():
        refused(r"tree 0 is damaged", booster_of, re.sub(pattern, other, text, count=1), 3, 1)
    refused("Check failed", booster_of, re.sub(r"leaf_value=\S+", "leaf_value=", text, count=1), 3, 1)


def test_a_comparison_has_no_trees_and_data_without_rows_are_rejected(run, tmp_path):
    folder, data = run
    model = MultiTaskRecommender(data.features, blend="lightgbm", **SMALL)
    model.reports = False
    assert model.configure_callbacks() == []
    refused("blend='catboost'", MultiTaskRecommender, data.features, blend="catboost")
    model = MultiTaskRecommender(blend="lightgbm", **SMALL)
    refused("needs a TableData of labeled rows", quiet_trainer(tmp_path, max_epochs=1).fit, model, MadeTable())
