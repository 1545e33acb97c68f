"""The weight of a blend by hand, and how much work its trees may be."""

from types import SimpleNamespace

import numpy as np
import pytest

from apps.recsys.encoding.features import CategoricalFeature, ContinuousFeature, Features, Target
from apps.recsys.kinds import kind_of
from apps.recsys.tables.blend.trees import BlendTrees, best_weight, num_columns

BINARY = kind_of(Target())
TERNARY = kind_of(Target("multiclass", classes=("a", "b", "c"), shares=(0.2, 0.3, 0.5)))


def test_the_weight_has_the_least_loss():
    # Errors of 1 and -3 standard deviations: w - 3 (1 - w) = 0 at w = 0.75.
    price = kind_of(Target("regression", mean=10.0, std=2.0))
    y = np.array([8.0, 10.0, 14.0])
    z = (y - 10) / 2
    assert best_weight(price, z + 1, z - 3, y) == (0.0, 0.75)
    # 13 of 20 labels are positive: 0.8 w + 0.2 (1 - w) = 0.65 at w = 0.75.
    y, logit = np.repeat([1.0, 0.0], [13, 7]), np.log(0.8 / 0.2)
    loss, weight = best_weight(BINARY, np.full(20, logit), np.full(20, -logit), y)
    assert weight == 0.75
    assert loss == pytest.approx(-(0.65 * np.log(0.65) + 0.35 * np.log(0.35)), abs=1e-12)
    # Shares of 0.2, 0.3, 0.5 are 0.6 of (1/3, 1/2, 1/6) and 0.4 of (0, 0, 1).
    y = np.repeat([0.0, 1.0, 2.0], [2, 3, 5])
    one, other = np.log([1 / 3, 1 / 2, 1 / 6]), np.array([-80.0, -80.0, 0.0])
    assert best_weight(TERNARY, np.tile(one, (10, 1)), np.tile(other, (10, 1)), y)[1] == 0.6
    # Of equal predictions the network's is taken.
    assert best_weight(BINARY, np.zeros(2), np.zeros(2), np.array([0.0, 1.0]))[1] == 1.0


def test_the_work_of_the_trees_depends_on_the_table_only():
    features = Features((CategoricalFeature("city", 5),), (ContinuousFeature("age", 0.0, 1.0, (), 0.0),), tasks=("a",))
    assert num_columns(features) == 3  # and the domain, where there is one

    def settings(rows, kind=BINARY, share=1.0):
        task = SimpleNamespace(kind=kind, y_N=np.zeros(rows), train=SimpleNamespace(features=features))
        return len(BlendTrees(share).candidates(task))

    # 1.5e9 / (3 columns x 200 rounds) = 2.5e6 rows for a setting; three classes are three trees a round.
    assert [settings(n) for n in (1000, 416_000, 500_000, 2_500_000, 9_000_000)] == [6, 6, 5, 1, 1]
    assert (settings(500_000, TERNARY), settings(500_000, share=0.5)) == (1, 2)
    # At least 100 rounds: 5e6 rows of one binary task.
    assert BlendTrees.most_rows(features, [BINARY]) == 5_000_000
    assert BlendTrees.most_rows(features, [BINARY, TERNARY]) == 1_500_000_000 // (3 * 100 * 2 * 3)
