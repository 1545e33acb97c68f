"""Metrics: against scikit-learn, by hand, and the same on two ranks as on one."""

import copy
import math
import pickle

import numpy as np
import pytest
import torch
from refusals import refused
from sklearn import metrics as sk
from sklearn.calibration import calibration_curve
from two_ranks import on_two_ranks

from apps.recsys import binary_metrics
from apps.recsys.metrics import MultiTaskMetrics, RankingMetrics, target_ranks


def draw(n: int, seed: int = 0, ties: bool = True) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Logits, labels and users; ``ties`` rounds the logits to 40 or so values."""
    rng = np.random.default_rng(seed)
    z = rng.normal(-1, 1.5, n).astype(np.float32)
    if ties:
        z = np.round(4 * z) / 4
    y = (rng.random(n) < 1 / (1 + np.exp(-0.7 * z))).astype(np.float32)
    return z, y, rng.integers(0, max(n // 8, 1), n)


def test_values_by_example_have_the_mean_and_the_spread_of_the_auc():
    by_hand = binary_metrics.auc_values(np.array([0.1, 0.4, 0.3, 0.9]), np.array([0.0, 0.0, 1.0, 1.0]))
    # AUC 3/4. Of the negatives 0.1 is below both positives and 0.4 below one; of the positives 0.3 is above one.
    np.testing.assert_allclose(by_hand, [1.25, 0.25, 0.25, 1.25], rtol=1e-12)
    z, y, _ = draw(300)
    y[:40] = np.nan
    values = binary_metrics.auc_values(z, y)
    known = y == y
    assert values.mean() == pytest.approx(binary_metrics.auc(z, y), rel=1e-12)
    np.testing.assert_allclose(values[~known], values.mean(), rtol=1e-12)
    # DeLong's variance: that of each class's shares, over the size of the class.
    pos, neg = z[y == 1], z[y == 0]
    order = (pos[:, None] > neg) + 0.5 * (pos[:, None] == neg)
    delong = order.mean(1).var() / len(pos) + order.mean(0).var() / len(neg)
    assert values.var() / len(z) == pytest.approx(delong, rel=1e-9)
    assert np.isnan(binary_metrics.auc_values(z[:3], np.ones(3))).all()


def sigmoid(z: np.ndarray) -> np.ndarray:
    return 1 / (1 + np.exp(-z.astype(np.float64)))


@pytest.mark.parametrize("ties", [True, False])
@pytest.mark.parametrize("n", [2, 7, 100, 3000])
def test_equal_to_scikit_learn(n, ties):
    z, y, _ = draw(n, ties=ties)
    y[:2] = (0, 1)
    metrics = binary_metrics.task_metrics(z, y)
    assert metrics.auc == pytest.approx(sk.roc_auc_score(y, z), abs=1e-12)
    assert metrics.pr_auc == pytest.approx(sk.average_precision_score(y, z), abs=1e-12)
    assert metrics.log_loss == pytest.approx(sk.log_loss(y, sigmoid(z)), abs=1e-12)
    assert metrics.mean_prediction == pytest.approx(sigmoid(z).mean(), abs=1e-12)
    assert metrics.base_rate == pytest.approx(y.mean())


def test_calibration_bins_and_auc_by_user_are_scikit_learns():
    # 3000 different scores in 15 bins of 200: quantiles fall between two scores.
    z, y, _ = draw(3000, ties=False)
    bins = binary_metrics.calibration(sigmoid(z), y)
    positives, prediction = calibration_curve(y, sigmoid(z), n_bins=15, strategy="quantile")
    np.testing.assert_allclose(bins.positives, positives, atol=1e-12)
    np.testing.assert_allclose(bins.prediction, prediction, atol=1e-12)
    assert bins.counts.tolist() == [200] * 15
    assert bins.error == pytest.approx(float(np.mean(np.abs(positives - prediction))), abs=1e-12)
    z, y, users = draw(400)
    aucs, weights, left_out = [], [], 0
    for user in np.unique(users):
        own = users == user
        if y[own].min() == y[own].max():
            left_out += 1
        else:
            aucs.append(sk.roc_auc_score(y[own], z[own]))
            weights.append(own.sum())
    gauc = binary_metrics.grouped_auc(z, y, users)
    assert left_out > 0
    assert (gauc.num_groups, gauc.left_out) == (len(aucs), left_out)
    assert gauc.value == pytest.approx(np.average(aucs, weights=weights), abs=1e-12)


def test_auc_by_hand_ties_count_half_and_large_logits_are_none():
    # Positives 0.9, 0.5; negatives 0.5, 0.1. Pairs: (0.9, 0.5) 1, (0.9, 0.1) 1, (0.5, 0.5) 1/2, (0.5, 0.1) 1: 3.5 / 4
    assert binary_metrics.auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])) == 3.5 / 4
    # Scores 0.9: 1 of 1 positive; 0.5: 2 of 3. AP = 1/2 * 1 + 1/2 * 2/3
    assert binary_metrics.pr_auc(np.array([0.9, 0.5, 0.5, 0.1]), np.array([1, 1, 0, 0])) == pytest.approx(5 / 6)
    # In float32 both sigmoids are 1.
    z, y = np.array([20.0, 30.0], dtype=np.float32), np.array([0, 1])
    assert sk.roc_auc_score(y, torch.tensor(z).sigmoid().numpy()) == 0.5
    assert binary_metrics.task_metrics(z, y).auc == 1.0
    assert binary_metrics.task_metrics(np.array([np.inf, -np.inf]), y).log_loss == math.inf
    assert binary_metrics.task_metrics(np.array([-np.inf, np.inf]), y).log_loss == 0.0


def test_calibration_error_by_hand_with_one_bin_for_a_constant():
    # Two bins of two. First: predictions 0.1, 0.2 (mean 0.15), positives 1 of 2: 0.35. Second: 0.6, 0.8, both: 0.3.
    p, y = np.array([0.8, 0.1, 0.6, 0.2]), np.array([1, 0, 1, 1])
    assert binary_metrics.calibration(p, y, num_bins=2).error == pytest.approx((2 * 0.35 + 2 * 0.3) / 4)
    # As often as their weights say: the first prediction stands for two examples, the second for none.
    weights = np.array([2, 0, 1, 1])
    twice = binary_metrics.calibration(np.array([0.8, 0.8, 0.6, 0.2]), np.array([1, 1, 1, 1]), num_bins=2)
    assert binary_metrics.calibration(p, y, weights, 2).error == twice.error
    y = np.r_[np.ones(3), np.zeros(9)]
    for order in (np.arange(12), np.arange(12)[::-1], np.random.default_rng(0).permutation(12)):
        bins = binary_metrics.calibration(np.full(12, 0.4), y[order], num_bins=5)
        assert (bins.counts.tolist(), bins.error) == ([12], pytest.approx(0.4 - 3 / 12))
    assert binary_metrics.auc(np.full(12, 0.4), y) == 0.5


def test_missing_labels_are_left_out_others_are_0_or_1_and_one_class_is_nan():
    z, y, users = draw(50)
    y[:10] = np.nan
    whole, part = binary_metrics.task_metrics(z, y, users), binary_metrics.task_metrics(z[10:], y[10:], users[10:])
    assert (whole.values(), whole.num_examples) == (part.values(), 40)
    one = binary_metrics.task_metrics(z, np.zeros(50))
    assert math.isnan(one.auc)
    assert math.isnan(one.pr_auc)
    assert one.log_loss == pytest.approx(-np.log(1 - sigmoid(z)).mean())
    assert one.ece == pytest.approx(sigmoid(z).mean())
    none = binary_metrics.task_metrics(z, np.full(50, np.nan), users)
    assert none.num_examples == 0
    assert all(math.isnan(v) for v in none.values().values())
    z[3] = np.nan
    broken = binary_metrics.task_metrics(z, np.ones(50))
    assert broken.invalid == 1
    assert math.isnan(broken.log_loss)
    refused(r"label 0\.5 is neither 0 nor 1", lambda: binary_metrics.task_metrics(np.zeros(3), np.array([0, 0.5, 1])))
    binned = MultiTaskMetrics(["a"], score_bins=4)
    refused("label 2 is neither 0 nor 1", lambda: binned.update(torch.zeros(1, 1), torch.tensor([[2.0]])))


def batches(n: int = 600, size: int = 128, seed: int = 0) -> list[tuple[torch.Tensor, torch.Tensor, torch.Tensor]]:
    parts = [draw(n, seed + task) for task in range(2)]
    z = torch.tensor(np.stack([p[0] for p in parts], 1))
    y = torch.tensor(np.stack([p[1] for p in parts], 1))
    users = torch.tensor(parts[0][2])
    return list(zip(z.split(size), y.split(size), users.split(size), strict=True))


def test_tasks_are_judged_apart_and_averaged():
    metric = MultiTaskMetrics(["click", "buy"], grouped=True)
    for batch in batches():
        metric.update(*batch)
    values = {k: float(v) for k, v in metric.compute().items()}
    (z, y, users) = (torch.cat(x).numpy() for x in zip(*batches(), strict=True))
    assert set(values) == {"auc", "gauc"} | {
        f"{m}_{t}" for m in ("auc", "pr_auc", "log_loss", "ece", "gauc") for t in ("click", "buy")
    }
    assert values["auc_click"] == pytest.approx(sk.roc_auc_score(y[:, 0], z[:, 0]), abs=1e-12)
    assert values["auc_buy"] == pytest.approx(sk.roc_auc_score(y[:, 1], z[:, 1]), abs=1e-12)
    assert values["auc"] == pytest.approx((values["auc_click"] + values["auc_buy"]) / 2)
    assert values["gauc_buy"] == binary_metrics.grouped_auc(z[:, 1], y[:, 1], users).value
    assert metric.by_task["buy"].gauc.left_out == binary_metrics.grouped_auc(z[:, 1], y[:, 1], users).left_out
    metric.reset()
    metric.update(torch.zeros(2, 2), torch.tensor([[0.0, 1.0], [1.0, 1.0]]))
    values = metric.compute()
    assert values["auc"] == 0.5  # of the one task that has both classes
    assert torch.isnan(values["auc_buy"])
    assert "gauc" not in values


def test_streaming_counts_are_exact_where_each_score_has_its_bin():
    # Logits are multiples of 1/4; 128 bins of 1/4 between -16 and 16 hold one each.
    exact, binned = MultiTaskMetrics(["a", "b"]), MultiTaskMetrics(["a", "b"], score_bins=128)
    for z, y, _ in batches():
        y[:5, 1] = torch.nan
        for metric in (exact, binned):
            metric.update(z, y)
    want, approximate = exact.compute(), binned.compute()
    assert want.keys() == approximate.keys()
    for name in want:
        assert float(approximate[name]) == pytest.approx(float(want[name]), abs=1e-12)
    assert binned.by_task["b"].num_examples == 575
    # Invalid predictions are counted.
    metric = MultiTaskMetrics(["a"], score_bins=16)
    metric.update(torch.tensor([[-1.4], [torch.nan], [2.2]]), torch.tensor([[0.0], [1.0], [1.0]]))
    assert torch.isnan(metric.compute()["auc_a"])
    assert metric.by_task["a"].invalid == 1


def test_a_metric_can_be_copied_pickled_and_cast():
    metric = MultiTaskMetrics(["a", "b"], grouped=True)
    metric.update(*batches()[0])
    want = metric.compute()
    for twin in (copy.deepcopy(metric), pickle.loads(pickle.dumps(metric)), torch.nn.ModuleDict({"m": metric})["m"]):
        assert twin.compute() == want
    ranks = torch.nn.ModuleDict({"m": RankingMetrics()}).bfloat16()["m"]
    ranks.update(torch.tensor([[3.0, 2.0, 1.0]]).expand(1000, 3), torch.full((1000,), 2))
    assert float(ranks.compute()["mrr"]) == pytest.approx(1 / 3, abs=1e-12)  # not a sum in bfloat16


def test_ranking_by_hand_without_items_that_are_no_candidates():
    # Ranks: row 0: target 0.9 is first. Row 1: target 0.2 is below 0.7 and 0.5: third. Row 2: all equal: last, fourth.
    scores = torch.tensor([[0.1, 0.9, 0.3, 0.2], [0.7, 0.2, 0.5, 0.1], [0.4, 0.4, 0.4, 0.4]])
    target = torch.tensor([1, 1, 0])
    assert target_ranks(scores, target).tolist() == [1, 3, 4]
    metric = RankingMetrics(ks=(1, 3))
    metric.update(scores[:2], target[:2])
    metric.update(scores[2:], target[2:])
    values = {k: float(v) for k, v in metric.compute().items()}
    assert values == pytest.approx(
        {
            "hr_1": 1 / 3,
            "hr_3": 2 / 3,
            "ndcg_1": 1 / 3,
            "ndcg_3": (1 + 1 / 2) / 3,  # 1 / log2(1 + 3) = 1/2
            "mrr": (1 + 1 / 3 + 1 / 4) / 3,
        }
    )
    scores = torch.tensor([[5.0, 1.0, 4.0, 0.0]])
    assert target_ranks(scores, torch.tensor([1])).tolist() == [3]
    scores[0, 0] = -torch.inf
    assert target_ranks(scores, torch.tensor([1])).tolist() == [2]


def test_a_scorer_that_knows_nothing_does_not_look_good():
    for scores in (torch.zeros(8, 100), torch.full((8, 100), torch.nan), torch.full((8, 100), -torch.inf)):
        metric = RankingMetrics()
        metric.update(scores, torch.arange(8))
        values = metric.compute()
        assert values["hr_10"] == values["ndcg_20"] == 0
        assert float(values["mrr"]) == pytest.approx(1 / 100)
    scores = torch.zeros(1, 100)
    scores[0, 5] = torch.nan  # a NaN stands before the target too
    assert target_ranks(scores, torch.tensor([5])).tolist() == [100]


def _rank(rank: int) -> dict[str, dict[str, float]]:
    by_name = {}
    for name, metric in _metrics().items():
        parts = batches()
        # Rank 0 has three batches, rank 1 two; of the metric "alone" rank 1 has none.
        own = parts if name == "alone" and rank == 0 else [] if name == "alone" else parts[rank::2]
        for z, y, users in own:
            metric.update(*((_scores(z), users % 2) if name == "ranking" else (z, y, users)))
        if not own:
            metric._update_count = 1  # without: a warning that nothing was updated
        by_name[name] = {k: float(v) for k, v in metric.compute().items()}
    return by_name


def _metrics() -> dict:
    return {
        "exact": MultiTaskMetrics(["a", "b"], grouped=True),
        "alone": MultiTaskMetrics(["a", "b"], grouped=True),
        "binned": MultiTaskMetrics(["a", "b"], score_bins=64),
        "ranking": RankingMetrics(ks=(1, 2)),
    }


def _scores(z: torch.Tensor) -> torch.Tensor:
    return torch.cat([z, z.flip(1), z + 1], 1)


def test_two_ranks_are_one(tmp_path):
    first, second = on_two_ranks(_rank, tmp_path, ["apps.recsys.metrics"])
    assert first == second
    for name, metric in _metrics().items():
        for z, y, users in batches():
            metric.update(*((_scores(z), users % 2) if name == "ranking" else (z, y, users)))
        want = {k: float(v) for k, v in metric.compute().items()}
        assert first[name] == pytest.approx(want, abs=1e-12), name  # sums in another order


def test_rows_of_cold_users_and_items_are_reported_apart():
    z, y, user = draw(200)
    cold = torch.zeros(200, dtype=torch.uint8)
    cold[:50], cold[30:90] = 1, 2
    cold[30:50] = 3  # both the user and the item
    metrics = MultiTaskMetrics(("click",), grouped=True)
    z_Bt, y_Bt = torch.from_numpy(z)[:, None], torch.from_numpy(y)[:, None]
    metrics.update(z_Bt[:120], y_Bt[:120], torch.from_numpy(user)[:120], cold[:120])
    metrics.update(z_Bt[120:], y_Bt[120:], torch.from_numpy(user)[120:])  # a batch without flags is warm
    values = metrics.compute()
    for part, rows in (("cold_user", slice(0, 50)), ("cold_item", slice(30, 90)), ("warm", slice(90, 200))):
        assert values[f"{part}_rows"] == rows.stop - rows.start
        assert values[f"{part}_auc_click"] == values[f"{part}_auc"] == pytest.approx(sk.roc_auc_score(y[rows], z[rows]))
    assert values["auc_click"] == pytest.approx(sk.roc_auc_score(y, z))
    metrics.reset()
    metrics.update(z_Bt, y_Bt, None, torch.zeros(200, dtype=torch.uint8))
    assert not [name for name in metrics.compute() if "cold" in name or "warm" in name]
    assert metrics.by_part == {}
