"""Columns of vectors: what is read and refused, and what the network makes of them."""

from __future__ import annotations

import re

import numpy as np
import pyarrow as pa
import pyarrow.parquet as pq
import pytest
import torch
from torch.testing import assert_close

from apps.recsys.encoding.features import VectorFeature
from apps.recsys.encoding.numbers import to_vectors, vector_scale
from apps.recsys.schema import SplitConfig, TableConfig, TaskConfig
from apps.recsys.tables.columns.bottoms import SingleTask
from apps.recsys.tables.columns.vectors import VectorArch
from apps.recsys.tables.data import TableData
from apps.recsys.tables.estimators import HistGradientBoostingUntuned, LogisticRegression
from apps.recsys.tables.model import InteractionConfig
from apps.recsys.tables.module import MultiTaskRecommender


def column(*values, kind=None):
    return [("the training table", pa.chunked_array([pa.array(list(values), kind)]))]


def test_a_missing_vector_is_nan():
    vectors = to_vectors(column(None, [3.0, 4.0], [0.0, 0.0]), "title")
    np.testing.assert_array_equal(vectors, np.array([[np.nan, np.nan], [3, 4], [0, 0]], np.float32))
    assert vector_scale(vectors) == 2.5  # the root of (9 + 16 + 0 + 0) / 4
    fixed = to_vectors(column([1.0, 2.0], None, kind=pa.list_(pa.float32(), 2)), "title")
    np.testing.assert_array_equal(fixed, np.array([[1, 2], [np.nan, np.nan]], np.float32))
    assert vector_scale(np.full((2, 3), np.nan, np.float32)) == 1


@pytest.mark.parametrize(
    ("values", "match"),
    [
        ((["a"],), "'title' of the training table holds lists of string, not of numbers"),
        ((1.5,), "'title' of the training table holds values of type double, not lists of numbers"),
        (("1 2",), "holds values of type string, not lists of numbers: a vector is a list, which"),
        (([1.0, 2.0], [1.0]), "the vector in row 1 has 1 numbers, and must have 2, as the others have"),
        (([1.0, None],), "the vector in row 0 holds a number that is missing or not finite"),
        (([1.0], [np.inf]), "the vector in row 1 holds a number that is missing or not finite"),
        (([],), "lists of null, not of numbers"),
    ],
)
def test_refused(values, match):
    with pytest.raises(ValueError, match=re.escape(match)):
        to_vectors(column(*values), "title")


def test_repeated_text_is_refused_by_its_own_type():
    (part,) = column("1 2", "1 2")
    with pytest.raises(ValueError, match="holds values of type string, not lists of numbers"):
        to_vectors([(part[0], part[1].dictionary_encode())], "title")


def test_a_vector_is_mapped_as_it_is_scaled():
    arch = VectorArch((VectorFeature("a", 2, scale=2.0), VectorFeature("b", 1)), dim=3, copies=2)
    x_BV = torch.tensor([[2.0, 4.0, 5.0], [torch.nan, torch.nan, 1.0]])
    with torch.no_grad():
        arch.missing[0].fill_(7.0)
        y_KBH = arch(x_BV)
    assert y_KBH.shape == (2, 2, 6)
    for k in range(2):
        assert_close(y_KBH[k, 0, :3], torch.tensor([1.0, 2.0]) @ arch.weight[0][k])
        assert_close(y_KBH[k, 0, 3:], 5 * arch.weight[1][k, 0])
        assert_close(y_KBH[k, 1, :3], torch.full((3,), 7.0))


def table(tmp_path):
    """The label is the sign of one direction of the vector; every tenth row has none."""
    rng = np.random.default_rng(0)
    vectors = rng.normal(size=(300, 4)).astype(np.float32)
    rows = {
        "image": [None if i % 10 == 0 else v.tolist() for i, v in enumerate(vectors)],
        "shop": [f"shop{i % 3}" for i in range(300)],
        "bought": (vectors @ np.array([1.0, -1.0, 0.5, 0.0]) > 0).astype(int),
        "seen": rng.integers(0, 2, 300),
    }
    pq.write_table(pa.table(rows), tmp_path / "table.parquet")
    tasks = {"bought": TaskConfig("bought"), "seen": TaskConfig("seen")}
    config = TableConfig(("shop",), vectors=("image",), tasks=tasks, split=SplitConfig(val=0.2, test=0.2))
    return TableData("table", str(tmp_path), str(tmp_path / "cache"), train_file="table.parquet", table=config)


def test_networks_and_estimators_read_them(tmp_path):
    data = table(tmp_path)
    assert data.features.vectors[0].size == 4
    batch = data.rows("test")[:]
    assert batch.vector_BV.shape == (60, 4)
    for options in ({}, {"interaction": InteractionConfig("dot")}, {"shared": SingleTask()}):
        model = MultiTaskRecommender(data.features, **options).eval()
        before = model(batch)
        assert before.shape == (60, 2)
        moved = model(type(batch)(**{**vars(batch), "vector_BV": batch.vector_BV + 1}))
        is_there = ~batch.vector_BV[:, 0].isnan()
        assert ((before != moved).any(1) == is_there).all()  # a missing vector is the same whatever is added
    for estimator in (HistGradientBoostingUntuned(), LogisticRegression()):
        estimator.fit(data, 0)
        assert estimator.evaluate(data, "test")["auc_bought"] > 0.85


def test_predictions_of_rows_need_vectors_of_the_same_length(tmp_path):
    from lightning import Trainer

    data = table(tmp_path)
    model = MultiTaskRecommender(data.features)
    Trainer(
        max_steps=1, accelerator="cpu", logger=False, enable_checkpointing=False, enable_progress_bar=False,
        enable_model_summary=False,
    ).fit(model, data)  # fmt: skip
    shops = ["shop0", "shop1"]
    by_array = model.predict({"image": np.ones((2, 4), np.float32), "shop": shops})
    by_lists = model.predict({"image": [[1.0] * 4] * 2, "shop": shops})
    assert_close(by_array["probability_bought"], by_lists["probability_bought"])
    with pytest.raises(ValueError, match=r"the rows to predict: the vector in row 0 has 3 numbers, and must have 4"):
        model.predict({"image": np.ones((2, 3)), "shop": shops})
