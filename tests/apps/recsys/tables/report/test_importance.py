"""Permutation importance, of a model whose answer is known."""

from __future__ import annotations

from types import SimpleNamespace

import pytest
import torch
from made_table import batch, features, rows_of

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, VectorFeature
from apps.recsys.encoding.table_encoding import Encoding
from apps.recsys.kinds import Outputs
from apps.recsys.tables.report.importance import columns_of, shuffled, shuffled_importances
from apps.recsys.tables.rows.batch import TableBatch


class Known:
    """Predicts both tasks by its column "right" and reads no other."""

    features = Features(
        continuous=tuple(map(ContinuousFeature, ("right", "noise"))),
        tasks=("click", "none"),
        positives=(0.5, 0.5),
    )
    outputs = Outputs(features.target_of_task)
    device = torch.device("cpu")

    def task_loss(self, batch):
        z_B = batch.dense_BC[:, 0]
        return SimpleNamespace(outputs=torch.stack((z_B, z_B), 1), targets=batch.label_Bt)


def test_what_decides_is_worth_all_and_noise_nothing():
    # 1,000 rows whose label is whether "right" is positive: AUC 1, and 0.5 once shuffled. The AUC of two random orders
    # of 500 and 500 has a standard deviation of sqrt(1001 / 12 / 500 / 500) = 0.018, its mean over 5 shuffles 0.008.
    right = torch.linspace(-1, 1, 1000)
    dense = torch.stack((right, torch.rand(1000)), 1)
    label = torch.stack(((right > 0).float(), torch.ones(1000)), 1)  # one class has no AUC
    rows = TableBatch(dense, torch.zeros(0, 1000, dtype=torch.int32), label, torch.arange(1000))
    found = shuffled_importances(Known(), rows, columns_of(Encoding(Known.features)))
    assert [(one.column, one.task, one.metric, one.rows) for one in found] == [
        ("right", "click", "auc", 1000),
        ("noise", "click", "auc", 1000),
    ]
    assert found[0].importance == pytest.approx(0.5, abs=4 * 0.008)
    assert 0 < found[0].ci95 < 0.1
    assert (found[1].importance, found[1].ci95) == (0, 0)


def test_a_column_has_the_values_of_other_rows_and_no_other_changes():
    own, rows = features(num_domains=2), batch(6, num_domains=2)
    order = torch.tensor([1, 2, 3, 4, 5, 0])
    for column in ("city", "film.tags"):
        new = shuffled(rows, own, {column}, order)
        for name in ("city", "film.tags"):
            before = rows_of(rows, own, name)
            assert rows_of(new, own, name) == ([*before[1:], before[0]] if name == column else before)
        assert new.dense_BC.equal(rows.dense_BC) or rows.dense_BC.isnan().any()
        assert new.domain_B.equal(rows.domain_B)
    new = shuffled(rows, own, {"age"}, order)
    assert new.dense_BC[0, 0].isinf(), "row 1's"
    assert new.dense_BC[5, 0].isnan(), "row 0's"
    assert rows_of(new, own, "film.tags") == rows_of(rows, own, "film.tags")
    assert shuffled(rows, own, {""}, order).domain_B.tolist() == rows.domain_B[order].tolist()


def test_vectors_move_as_a_whole():
    own = Features(vectors=(VectorFeature("a", 1), VectorFeature("b", 2)))
    vectors = torch.tensor([[1.0, 2, 3], [4, 5, 6]])
    rows = TableBatch(
        torch.zeros(2, 0), torch.zeros(0, 2, dtype=torch.int32), torch.zeros(2, 0), torch.arange(2), vector_BV=vectors
    )
    assert shuffled(rows, own, {"b"}, torch.tensor([1, 0])).vector_BV.tolist() == [[1, 5, 6], [4, 2, 3]]


def test_the_parts_of_a_time_and_the_domain_are_columns_of_the_table():
    hour, day = CategoricalFeature("ts_hour", 25), ContinuousFeature("ts_days")
    own = Features(categorical=(hour, CategoricalFeature("tab", 3)), continuous=(day,), num_domains=2)
    encoding = Encoding(own, domain="tab", timestamps={"ts": None})
    assert columns_of(encoding) == {"ts": {"ts_hour", "ts_days"}, "tab": {"tab", ""}}
    assert columns_of(Encoding(own)) == {"ts_hour": {"ts_hour"}, "tab": {"tab"}, "ts_days": {"ts_days"}}
