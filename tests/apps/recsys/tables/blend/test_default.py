"""The default of ``moesaic init`` as a system of a comparison."""

import numpy as np
from every_kind import every_kind

from apps.equal_cost.comparison import Search
from apps.recsys.tables.blend import trees as trees_module
from apps.recsys.tables.blend.default import DefaultBlend, size_of
from apps.recsys.tables.module import MultiTaskRecommender
from apps.recsys.tables.recipe import Size
from apps.recsys.tables.rows.arrays import gather


def test_it_predicts_the_weighted_mean_of_its_network_and_trees(tmp_path, monkeypatch):
    monkeypatch.setattr(trees_module, "WORK", 3e6)
    data = every_kind(tmp_path)
    data.prepare_data()
    data.setup("fit")
    size, batch_size = size_of(data.features, len(data.rows("train"))), data.batch_size
    assert size == Size(len(data.rows("train")), False, 2, True, are_numbers=False)
    model = DefaultBlend(MultiTaskRecommender)
    assert model.tune(data, 0, Search(minutes=1e-6)) == {"network": {"epochs": 1}}  # no time: one epoch
    model.fit(data, 0, {"network": {"epochs": 2}})
    assert data.batch_size == batch_size
    data.setup("test")
    rows = data.rows("test")[:]
    own, trees = model.model(rows)[:, 0].sigmoid().detach(), model.blend.trees["bought"]
    weight = model.blend.weights["bought"]
    x = model.blend.columns.of(gather(data, "test"))
    expected = weight * own.double().numpy() + (1 - weight) / (1 + np.exp(-trees.decision(x)))
    predicted = model.predicted(data, "test", gather(data, "test"))[:, 0]
    np.testing.assert_allclose(1 / (1 + np.exp(-predicted)), expected, rtol=1e-5)
    assert model.evaluate(data, "test")["auc_bought"] > 0.9
