"""Kinds of tasks: losses and predictions by hand, their optimum, ensembles, and metrics of predicted values."""

import math

import numpy as np
import pytest
import torch
from sklearn import metrics as peer
from sklearn.metrics import mean_tweedie_deviance
from torch.testing import assert_close

from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Outputs, kind_of
from apps.recsys.value_metrics import (
    amount_metrics,
    class_metrics,
    class_values,
    gini,
    number_metrics,
    number_values,
    quantile_metrics,
)

PRICE = Target("regression", mean=10.0, std=4.0)
WATCHED = Target("regression", "weighted_logistic", mean=10.0, std=4.0)
VISITS = Target("count", mean=2.0, std=1.0)
STARS = Target("ordinal", levels=(1.0, 2.0, 5.0), shares=(0.25, 0.5, 0.25))
COLOUR = Target("multiclass", classes=("blue", "red", "tan"), shares=(0.5, 0.25, 0.25))
# Half of the amounts are 0, the others have logarithms 1 and 3.
SPENT = Target("revenue", mean=5.7, std=7.5, shares=(0.5, 0.5), least=0.0, log_mean=2.0, log_std=1.0)
COST = Target("tweedie", mean=2.0, std=1.0, least=0.0)
DELAY = Target("quantile", mean=10.0, std=4.0, least=-5.0)
ALL = (Target(), PRICE, WATCHED, VISITS, STARS, COLOUR, SPENT, COST, DELAY)


def outputs(*values):
    return torch.tensor([values], dtype=torch.float64)


def loss(target, z, y):
    return float(kind_of(target).loss(z, torch.tensor([y], dtype=torch.float64)))


def test_numbers_are_predicted_in_deviations_from_the_mean_and_not_where_they_cannot_be():
    # z = 1/2 is 10 + 4/2 = 12; the label 18 is two deviations up: (0.5 - 2)^2, or its absolute value.
    assert (float(kind_of(PRICE).value(outputs(0.5))), loss(PRICE, outputs(0.5), 18.0)) == (12, 2.25)
    assert loss(Target("regression", "absolute", 10.0, 4.0), outputs(0.5), 18.0) == 1.5
    never = Target("regression", mean=10.0, std=4.0, least=0.0)
    assert float(kind_of(never).value(outputs(-3.0))) == 0
    assert float(kind_of(PRICE).value(outputs(-3.0))) == -2, "a checkpoint that does not know the least label"


def test_counts_have_poisson_s_loss_and_classes_that_of_a_softmax():
    # value 2 e^z = 4 at z = log 2; e^z - y z / mean = 2 - 3 log 2 / 2. Poisson's is value - y log value + log y!.
    z = outputs(math.log(2))
    assert float(kind_of(VISITS).value(z)) == pytest.approx(4)
    assert loss(VISITS, z, 3.0) == pytest.approx(2 - 1.5 * math.log(2))
    of_poisson = torch.nn.PoissonNLLLoss(log_input=False, reduction="none", eps=0.0)
    for y in (0.0, 3.0):
        whole = float(of_poisson(torch.tensor(4.0), torch.tensor(y)) - of_poisson(torch.tensor(2.0), torch.tensor(y)))
        assert loss(VISITS, z, y) - loss(VISITS, outputs(0.0), y) == pytest.approx(whole / 2, rel=1e-6)
    z = outputs(0.0, math.log(2), 0.0)  # 1/4, 1/2, 1/4
    assert loss(COLOUR, z, 2.0) == pytest.approx(math.log(4))
    columns = kind_of(COLOUR).columns("colour", z)
    assert (columns["value_colour"], columns["probability_colour"].tolist()) == (["red"], pytest.approx([0.5]))


def test_watch_times_are_the_odds_of_a_weighted_logistic_and_tweedie_s_loss_the_half_deviance():
    # Weights 1 of the negative and 20 / 10 of the positive: softplus(z) + 2 softplus(-z), least where e^z = 2.
    z = torch.tensor([[math.log(2)]], dtype=torch.float64, requires_grad=True)
    kind = kind_of(WATCHED)
    cost = kind.loss(z, torch.tensor([20.0], dtype=torch.float64))
    assert float(cost) == pytest.approx(math.log(3) + 2 * math.log(1.5))
    cost.backward()
    assert (float(z.grad), float(kind.value(z.detach()))) == (pytest.approx(0, abs=1e-12), pytest.approx(20))
    for y in (0.0, 3.0):
        z = outputs(0.7)
        value = float(kind_of(COST).value(z))
        apart = mean_tweedie_deviance([y], [value], power=1.5) - mean_tweedie_deviance([y], [2.0], power=1.5)
        assert loss(COST, z, y) - loss(COST, outputs(0.0), y) == pytest.approx(apart / 2 / math.sqrt(2))


def test_levels_have_probabilities_that_sum_to_one_and_a_finite_loss():
    # P(above 1) = sigmoid(0) = 1/2; the step softplus(log(e^log 3 - 1)) = log 3: P(above 2) = sigmoid(-log 3) = 1/4.
    kind = kind_of(STARS)
    z = outputs(0.0, math.log(2))
    assert kind.log_probabilities(z).exp().tolist() == [pytest.approx([0.5, 0.25, 0.25])]
    assert float(kind.value(z)) == pytest.approx(0.5 * 1 + 0.25 * 2 + 0.25 * 5)
    assert loss(STARS, z, 1.0) == pytest.approx(math.log(4))
    assert_close(kind.outputs_of(kind.log_probabilities(z).exp()), z)
    for z in (outputs(60.0, -30.0), outputs(-60.0, -30.0), outputs(0.0, 80.0)):
        z = z.float().requires_grad_()
        cost = kind_of(STARS).loss(z, torch.tensor([1.0]))
        cost.backward()
        assert cost.isfinite()
        assert z.grad.isfinite().all()


def test_revenue_is_a_zero_inflated_lognormal_up_to_the_largest_of_the_training():
    # z = (logit 1/2, 0, 0): p = 1/2, mu = 2, sigma = 1; the mean is e^2.5 / 2.
    kind, z = kind_of(SPENT), outputs(0.0, 0.0, 0.0)
    columns = kind.columns("spent", z)
    assert columns["value_spent"].tolist() == pytest.approx([math.exp(2.5) / 2])
    assert columns["probability_spent"].tolist() == [0.5]
    # 3/4 of all amounts lie below the median of the positive ones, and 0.9 below their quantile at 0.8.
    assert float(kind.quantile(z, 0.75)) == pytest.approx(math.exp(2))
    assert columns["quantile_10_spent"].tolist() == columns["quantile_50_spent"].tolist() == [0.0]
    assert columns["quantile_90_spent"].tolist() == pytest.approx([math.exp(2 + 0.8416)], rel=1e-3)
    assert kind.schemas("spent").keys() == columns.keys()
    of_zero, of_e3 = loss(SPENT, z, 0.0), loss(SPENT, z, math.exp(3))
    assert of_zero == pytest.approx(math.log(2))
    assert of_e3 == pytest.approx(math.log(2) + 0.5 + 0.5 * math.log(2 * math.pi))
    for value in (0.5, 40.0):  # as trees predict it
        assert float(kind.value(torch.from_numpy(kind.outputs_of(np.array([value]))))) == pytest.approx(value, rel=1e-6)
    largest = {"least": 0.0, "most": 20.0}
    assert float(kind_of(Target("tweedie", mean=2.0, std=1.0, **largest)).value(outputs(9.0))) == 20
    spent = Target("revenue", mean=5.7, std=7.5, shares=(0.5, 0.5), log_mean=2.0, log_std=1.0, **largest)
    assert float(kind_of(spent).value(outputs(0.0, 9.0, 0.0))) == 10
    assert float(kind_of(spent).quantile(outputs(0.0, 9.0, 0.0), 0.9)) == 20


def test_quantiles_do_not_cross_and_have_the_pinball_loss():
    # softplus(log(e - 1)) = 1: the quantiles lie at -1, 0 and 1 deviations, 6, 10 and 14.
    z = outputs(0.0, math.log(math.e - 1), math.log(math.e - 1))
    kind = kind_of(DELAY)
    columns = kind.columns("delay", z)
    assert [float(columns[f"{name}_delay"]) for name in ("quantile_10", "value", "quantile_90")] == [
        pytest.approx(6), pytest.approx(10), pytest.approx(14)]  # fmt: skip
    # 18 is 2 deviations up: 0.1 * 3 + 0.5 * 2 + 0.9 * 1.
    assert loss(DELAY, z, 18.0) == pytest.approx(2.2)
    assert float(kind_of(Target("quantile", mean=1.0, std=4.0, least=0.0)).quantiles(z)[0, 0]) == 0


@pytest.mark.parametrize("share", [0.1, 5e-5])
def test_a_revenue_that_a_tree_predicts_is_kept_and_has_a_chance_that_rises_with_it(share):
    kind = kind_of(Target("revenue", shares=(1 - share, share), least=0.0, most=100.0, log_mean=3.0, log_std=1.0))
    predicted = np.array([0.5, 9.0, 20.0, 100.0, 130.0])
    made = kind.columns("spent", torch.from_numpy(kind.outputs_of(predicted)))
    assert made["value_spent"].tolist() == pytest.approx([0.5, 9, 20, 100, 100], rel=1e-6)
    chances = [share + (1 - share) * part for part in (0.005, 0.09, 0.2, 1, 1)]
    assert made["probability_spent"].tolist() == pytest.approx(chances, rel=1e-6)


def test_metrics_of_amounts_by_hand():
    # By prediction 3, 2, 1, 0 the amounts are 6, 0, 2, 0: shares 3/4, 3/4, 1, 1 of the rows' 1/4, 1/2, 3/4, 1.
    of = amount_metrics(np.array([0.0, 1.0, 2.0, 3.0]), np.array([0.0, 2.0, 0.0, 6.0]))
    area = 0.25 * (0.375 + 0.75 + 0.875 + 1.0)
    assert of["gini"] == pytest.approx(2 * area - 1)
    best = 0.25 * (0.375 + 0.875 + 1.0 + 1.0)
    assert of["normalized_gini"] == pytest.approx((2 * area - 1) / (2 * best - 1))
    assert of["decile_error"] == pytest.approx((0 + 1 + 2 + 3) / 4 / 2)  # four groups of a row, the mean label is 2
    # Of ten rows, the five predictions of 1 have a mean label of 1, whatever their order, and those of 3 one of 3.
    label, value = np.array([0.0, 0, 0, 0, 5, 1, 1, 1, 6, 6]), np.repeat([1.0, 3.0], 5)
    assert amount_metrics(value, label)["decile_error"] == amount_metrics(np.full(10, 2.0), label)["decile_error"] == 0
    assert gini(np.ones(4), np.array([0.0, 2.0, 0.0, 6.0])) == pytest.approx(0)
    own = quantile_metrics(np.array([[0.0, 1.0, 2.0], [0.0, 1.0, 2.0]]), np.array([1.0, 4.0]))
    assert (own["coverage_80"], own["pinball"]) == (0.5, pytest.approx((0.1 + 0 + 0.1 + 0.4 + 1.5 + 1.8) / 6))


@pytest.mark.parametrize("target", [Target(), PRICE, WATCHED, VISITS, STARS, COLOUR, SPENT, COST])
def test_the_start_is_the_best_constant(target):
    """The gradient of the mean loss is 0 at the start, over labels that have the training's statistics."""
    labels = {
        "binary": [1.0, 0.0, 0.0, 0.0],
        "regression": [6.0, 14.0, 10.0 - 4.0, 10.0 + 4.0],  # mean 10, deviation 4
        "count": [1.0, 3.0, 2.0, 2.0],
        "ordinal": [0.0, 1.0, 1.0, 2.0],
        "multiclass": [0.0, 0.0, 1.0, 2.0],
        "revenue": [0.0, 0.0, math.exp(1), math.exp(3)],
        "tweedie": [0.0, 2.0, 2.0, 4.0],
    }[target.kind]
    kind = kind_of(target)
    z = torch.tensor(kind.start(0.25), dtype=torch.float64, requires_grad=True)
    mean = kind.loss(z.expand(4, -1), torch.tensor(labels, dtype=torch.float64)).mean()
    mean.backward()
    assert_close(z.grad, torch.zeros_like(z), atol=1e-9, rtol=0)
    assert float(mean) == pytest.approx(kind.initial_loss(0.25))


def test_a_teacher_is_learned_where_the_divergence_is_least():
    several = Outputs(ALL)
    generator = torch.Generator().manual_seed(0)
    given = torch.randn(4, several.width, generator=generator, dtype=torch.float64)
    z = given.clone().requires_grad_()
    distance = several.divergences(z, given, 1.0)
    assert_close(distance, torch.zeros(4, len(ALL), dtype=torch.float64), atol=1e-12, rtol=0)
    distance.sum().backward()
    assert_close(z.grad, torch.zeros_like(z), atol=1e-12, rtol=0)
    assert (several.divergences(given + 0.3 * torch.randn(given.shape, generator=generator), given, 1.0) > 0).all()


def test_outputs_stand_side_by_side_and_ensembles_predict_the_mean():
    several = Outputs(ALL)
    assert several.width == 1 + 1 + 1 + 1 + 2 + 3 + 3 + 1 + 3
    z_BZ, label_Bt = torch.randn(2, 16), torch.tensor([[1.0, 9.0, 3.0, 2.0, 2.0, 0.0, 7.0, 0.0, -2.0], [math.nan] * 9])
    of_each = several.losses(z_BZ, label_Bt)
    assert of_each.shape == (2, 9)
    assert_close(of_each[0, 4], kind_of(STARS).loss(z_BZ[:1, 4:6], torch.tensor([2.0]))[0])
    assert of_each.isfinite().all()
    several = Outputs(ALL)
    z_MBZ = torch.randn(3, 5, several.width, generator=torch.Generator().manual_seed(0), dtype=torch.float64)
    mean = several.mean(z_MBZ)
    for kind, own, of_members in zip(several.kinds, several.split(mean), several.split(z_MBZ), strict=True):
        if kind.target.kind == "multiclass":
            assert_close(own.softmax(-1), of_members.softmax(-1).mean(0))
        else:
            values = torch.stack([kind.value(z_Bw) for z_Bw in of_members])
            assert_close(kind.value(own), values.mean(0))


NAN = math.nan


def test_errors_of_numbers():
    # Errors 1, 0, -2 over the labels 1, 2, 6 of mean 3: squares 5 of 4 + 1 + 9 = 14; the unlabeled row counts nowhere.
    made = number_metrics(np.array([0.0, 2.0, 8.0, 99.0]), np.array([1.0, 2.0, 6.0, NAN]))
    values = made.values()
    assert (made.num_examples, made.mean_label, made.mean_prediction) == (3, 3, pytest.approx(10 / 3))
    assert values["r2"] == pytest.approx(1 - 5 / 14)
    assert (values["rmse"], values["mae"]) == (pytest.approx(math.sqrt(5 / 3)), 1)
    assert values["spearman"] == pytest.approx(1)
    # 30 predictions of 0 and 30 of 1: two bins, whatever the 15 that there may be.
    made = number_metrics(np.repeat([0.0, 1.0], 30), np.repeat([0.5, 2.0], 30)).bins
    assert (made.counts.tolist(), made.prediction.tolist(), made.label.tolist()) == ([30, 30], [0, 1], [0.5, 2])


def test_metrics_of_values_are_those_of_scikit_learn_and_the_means_of_examples():
    from scipy.stats import pearsonr, spearmanr

    rng = np.random.default_rng(0)
    label = rng.integers(0, 6, 200).astype(np.float64)
    value = np.round(label + rng.normal(size=200), 1)
    values = number_metrics(value, label).values()
    assert values["r2"] == pytest.approx(peer.r2_score(label, value))
    assert values["mae"] == pytest.approx(peer.mean_absolute_error(label, value))
    assert values["spearman"] == pytest.approx(spearmanr(value, label).statistic)
    assert values["pcc"] == pytest.approx(pearsonr(value, label).statistic)
    z_NC, place = rng.normal(size=(200, 6)), label
    p_NC = np.exp(z_NC) / np.exp(z_NC).sum(1, keepdims=True)
    of_classes = class_metrics(z_NC, place).values()
    assert of_classes["auc"] == pytest.approx(peer.roc_auc_score(place, p_NC, multi_class="ovr"))
    assert of_classes["log_loss"] == pytest.approx(peer.log_loss(place, p_NC))
    assert of_classes["accuracy"] == pytest.approx(peer.accuracy_score(place, p_NC.argmax(1)))
    rng = np.random.default_rng(1)
    label, value = np.append(rng.normal(size=50), NAN), rng.normal(size=51)
    assert number_values(value, label).mean() == pytest.approx(number_metrics(value, label).values()["r2"])
    place, z_NC = np.append(rng.integers(0, 3, 50).astype(float), NAN), rng.normal(size=(51, 4))
    assert class_values(z_NC, place).mean() == pytest.approx(class_metrics(z_NC, place).values()["auc"])
    # The variance of the labels is 1: 1 - 1 and 1 - 0 are stretched about their mean of a half by 4 / 2.
    values = number_values(np.array([1.0, 2, 5, 5]), np.array([0, 2, NAN, NAN]))
    assert values.tolist() == [-0.5, 1.5, 0.5, 0.5]


def test_what_cannot_be_told_is_nan():
    equal = number_metrics(np.array([1.0, 2.0]), np.array([3.0, 3.0])).values()
    assert math.isnan(equal["r2"])
    assert math.isnan(equal["pcc"])
    assert equal["mae"] == 1.5
    constant = number_metrics(np.array([2.0, 2.0]), np.array([1.0, 3.0]))
    assert constant.constant
    assert constant.values()["r2"] == 0
    assert math.isnan(constant.values()["spearman"])
    invalid = number_metrics(np.array([NAN, 2.0]), np.array([1.0, 3.0]))
    assert invalid.invalid == 1
    assert all(map(math.isnan, invalid.values().values()))
    assert number_metrics(np.array([1.0]), np.array([NAN])).num_examples == 0
    # The mean of equal labels may be rounded.
    label, value = np.full(7, 0.1), np.arange(7.0)
    assert label.mean() != 0.1
    values = number_metrics(value, label).values()
    assert [name for name in ("r2", "spearman", "pcc") if not math.isnan(values[name])] == []
    assert math.isnan(number_metrics(label, value).values()["pcc"])
    assert np.isnan(number_values(value, label)).all()
