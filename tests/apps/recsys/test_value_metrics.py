"""Metrics of predicted numbers and classes: by hand, and those of scikit-learn and scipy."""

from __future__ import annotations

import math

import numpy as np
import pytest
from sklearn import metrics as peer

from apps.recsys.value_metrics import class_metrics, class_values, number_metrics, number_values

NAN = math.nan


def test_errors_of_numbers():
    # Errors 1, 0, -2 over the labels 1, 2, 6 of mean 3: squares 5 of 4 + 1 + 9 = 14; the unlabeled row counts nowhere.
    made = number_metrics(np.array([0.0, 2.0, 8.0, 99.0]), np.array([1.0, 2.0, 6.0, NAN]))
    values = made.values()
    assert made.num_examples == 3
    assert made.mean_label == 3
    assert made.mean_prediction == pytest.approx(10 / 3)
    assert values["r2"] == pytest.approx(1 - 5 / 14)
    assert values["rmse"] == pytest.approx(math.sqrt(5 / 3))
    assert values["mae"] == 1
    assert values["spearman"] == pytest.approx(1)


def test_they_are_those_of_scikit_learn_and_scipy():
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


def test_values_by_example_have_the_metric_as_mean():
    rng = np.random.default_rng(1)
    label, value = np.append(rng.normal(size=50), NAN), rng.normal(size=51)
    assert number_values(value, label).mean() == pytest.approx(number_metrics(value, label).values()["r2"])
    place, z_NC = np.append(rng.integers(0, 3, 50).astype(float), NAN), rng.normal(size=(51, 4))
    assert class_values(z_NC, place).mean() == pytest.approx(class_metrics(z_NC, place).values()["auc"])


def test_examples_without_a_label_leave_the_interval_of_the_r2_as_it_is():
    # The variance of the labels is 1: 1 - 1 and 1 - 0 are stretched about their mean of a half by 4 / 2.
    values = number_values(np.array([1.0, 2, 5, 5]), np.array([0, 2, NAN, NAN]))
    assert values.tolist() == [-0.5, 1.5, 0.5, 0.5]


def test_the_r2_of_equal_labels_is_nan_also_where_their_mean_is_rounded():
    label, value = np.full(7, 0.1), np.arange(7.0)
    assert label.mean() != 0.1
    values = number_metrics(value, label).values()
    assert [name for name in ("r2", "spearman", "pcc") if not math.isnan(values[name])] == []
    assert math.isnan(number_metrics(label, value).values()["pcc"])
    assert np.isnan(number_values(value, label)).all()


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


def test_bins_keep_equal_predictions_together():
    # 30 predictions of 0 and 30 of 1: two bins, whatever the 15 that there may be.
    made = number_metrics(np.repeat([0.0, 1.0], 30), np.repeat([0.5, 2.0], 30)).bins
    assert made.counts.tolist() == [30, 30]
    assert made.prediction.tolist() == [0, 1]
    assert made.label.tolist() == [0.5, 2]
