"""Metrics of predicted numbers and classes, as functions of arrays.

scipy and scikit-learn compute the correlations and areas. A metric that the split cannot determine is NaN: correlations
and ``r2`` of equal labels, correlations of equal predictions, everything of a task without labels.
"""

from __future__ import annotations

import math
from collections.abc import Mapping
from dataclasses import dataclass, field

import numpy as np

from apps.recsys.binary_metrics import auc, auc_values

_BINS = 15


@dataclass(frozen=True)
class Bins:
    """Mean predictions and labels in bins of about equal numbers of examples, by ascending prediction.

    Attributes:
        prediction, label: means of each bin.
        counts: examples of each bin.
    """

    prediction: np.ndarray
    label: np.ndarray
    counts: np.ndarray


@dataclass(frozen=True)
class ValueMetrics:
    """The metrics of a task of numbers or classes over a split.

    Attributes:
        num_examples: number of examples with a label.
        mean_label, mean_prediction: means over them; NaN for classes.
        constant: whether all predictions are equal.
        invalid: number of predictions that are NaN; the metrics are NaN if there are any.
        by_name: the metrics: "r2", "rmse", "mae", "spearman" and "pcc" of numbers, and "accuracy" and "log_loss" in
            addition for levels; "auc", "accuracy" and "log_loss" of classes.
        bins: calibration of numbers; None for classes.
    """

    num_examples: int
    mean_label: float = math.nan
    mean_prediction: float = math.nan
    constant: bool = False
    invalid: int = 0
    by_name: Mapping[str, float] = field(default_factory=dict)
    bins: Bins | None = None

    def values(self) -> dict[str, float]:
        """Return the metrics by name."""
        return dict(self.by_name)


QUANTILES = (0.1, 0.5, 0.9)
"""Levels of the quantiles that "quantile" and "revenue" predict."""

TWEEDIE_POWER = 1.5
"""Power of the mean in a Tweedie distribution's variance: between a count's, 1, and a gamma distribution's, 2."""

AMOUNTS = ("gini", "normalized_gini", "decile_error", "tweedie_deviance")
"""Metrics of amounts that are not negative."""

NUMBERS, LEVELS = ("r2", "rmse", "mae", "spearman", "pcc"), ("accuracy", "log_loss")
CLASSES = ("auc", "accuracy", "log_loss")


def number_metrics(
    value_N: np.ndarray,
    label_N: np.ndarray,
    log_p_NL: np.ndarray | None = None,
    place_N: np.ndarray | None = None,
    *,
    further: tuple[str, ...] = (),
    chance_N: np.ndarray | None = None,
    quantile_N3: np.ndarray | None = None,
) -> ValueMetrics:
    """Return the metrics of predicted numbers.

    ``r2`` is ``1 - sum (y - value)^2 / sum (y - mean y)^2``, "spearman" the correlation of ranks with ties at their
    mean rank, "pcc" Pearson's correlation.

    Args:
        value_N: predictions.
        label_N: the numbers; NaN for none.
        log_p_NL: logarithms of the levels' probabilities; None: the numbers are not levels.
        place_N: place of each label among the levels.
        further: names of metrics in addition: those of ``AMOUNTS``, "auc_positive", "pinball", "coverage_80".
        chance_N: score of a positive label, for "auc_positive".
        quantile_N3: the quantiles at 0.1, 0.5 and 0.9, for "pinball" and "coverage_80".
    """
    from scipy.stats import rankdata

    names = (*(NUMBERS if log_p_NL is None else (*NUMBERS, *LEVELS)), *further)
    is_labeled_N = ~np.isnan(label_N)
    y_n, v_n = label_N[is_labeled_N].astype(np.float64), value_N[is_labeled_N].astype(np.float64)
    invalid = int((~np.isfinite(v_n)).sum())
    if not len(y_n) or invalid:
        mean = float(y_n.mean()) if len(y_n) else math.nan
        return ValueMetrics(len(y_n), mean, invalid=invalid, by_name=dict.fromkeys(names, math.nan))
    error_n = y_n - v_n
    spread = float(np.square(y_n - y_n.mean()).sum()) if np.ptp(y_n) else 0.0  # the mean of equal labels is rounded
    by_name = {
        "r2": 1 - float(np.square(error_n).sum()) / spread if spread else math.nan,
        "rmse": math.sqrt(float(np.square(error_n).mean())),
        "mae": float(np.abs(error_n).mean()),
        "spearman": correlation(rankdata(v_n), rankdata(y_n)),
        "pcc": correlation(v_n, y_n),
    }
    if log_p_NL is not None and place_N is not None:
        by_name |= _of_probabilities(log_p_NL[is_labeled_N], place_N[is_labeled_N].astype(np.int64))
    if "gini" in further:
        by_name |= amount_metrics(v_n, y_n)
    if chance_N is not None:
        by_name["auc_positive"] = auc(chance_N[is_labeled_N], y_n > 0)
    if quantile_N3 is not None:
        by_name |= quantile_metrics(quantile_N3[is_labeled_N].astype(np.float64), y_n)
    constant = bool((v_n == v_n[0]).all())
    return ValueMetrics(len(y_n), float(y_n.mean()), float(v_n.mean()), constant, 0, by_name, bins(v_n, y_n))


def amount_metrics(value_N: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """Return the metrics of amounts that are not negative.

    "gini" is twice the area between the share of all amounts that the rows with the highest predictions have and the
    share of rows; "normalized_gini" is that over the gini of perfect predictions. "decile_error" is the mean over ten
    groups of equal size, by prediction, of the distance of mean prediction and mean label, over the mean label; rows of
    equal predictions share their labels. "tweedie_deviance" is of power 1.5.
    """
    from sklearn.metrics import mean_tweedie_deviance

    total = float(label_N.sum())
    if not total:
        return dict.fromkeys(AMOUNTS, math.nan)
    _, tie_N, counts = np.unique(value_N, return_inverse=True, return_counts=True)
    label_of_tie_N = (np.bincount(tie_N, label_N) / counts)[tie_N]  # else the order of the rows would count
    tenths = [part for part in np.array_split(np.argsort(value_N), 10) if len(part)]
    apart = [abs(float(value_N[part].mean() - label_of_tie_N[part].mean())) for part in tenths]
    own, best = gini(value_N, label_N), gini(label_N, label_N)
    return {
        "gini": own,
        "normalized_gini": own / best if best else math.nan,
        "decile_error": float(np.mean(apart)) / float(label_N.mean()),
        "tweedie_deviance": float(mean_tweedie_deviance(label_N, np.maximum(value_N, 1e-9), power=TWEEDIE_POWER)),
    }


def gini(value_N: np.ndarray, label_N: np.ndarray) -> float:
    """Return the gini of predictions, which is 0 where all are equal; rows of equal predictions share their amounts."""
    _, group_N, counts = np.unique(-value_N, return_inverse=True, return_counts=True)
    amounts = np.bincount(group_N, label_N)
    rows, shares = np.cumsum(counts) / len(value_N), np.cumsum(amounts) / label_N.sum()
    area = np.trapezoid(np.r_[0.0, shares], np.r_[0.0, rows])
    return float(2 * area - 1)


def quantile_metrics(quantile_N3: np.ndarray, label_N: np.ndarray) -> dict[str, float]:
    """Return the mean pinball loss of the quantiles at 0.1, 0.5 and 0.9, and the share of labels between the outer."""
    error_N3 = label_N[:, None] - quantile_N3
    level = np.array(QUANTILES)
    within_N = (quantile_N3[:, 0] <= label_N) & (label_N <= quantile_N3[:, 2])
    return {
        "pinball": float(np.maximum(level * error_N3, (level - 1) * error_N3).mean()),
        "coverage_80": float(within_N.mean()),
    }


def class_metrics(z_NC: np.ndarray, place_N: np.ndarray) -> ValueMetrics:
    """Return the metrics of predicted classes.

    "auc" is the mean over the classes that are there of the AUC of one class against the others.

    Args:
        z_NC: logits.
        place_N: place of each label's class; NaN for none.
    """
    is_labeled_N = ~np.isnan(place_N)
    z_nC, y_n = z_NC[is_labeled_N].astype(np.float64), place_N[is_labeled_N].astype(np.int64)
    invalid = int(np.isnan(z_nC).any(1).sum())
    if not len(y_n) or invalid:
        return ValueMetrics(len(y_n), invalid=invalid, by_name=dict.fromkeys(CLASSES, math.nan))
    log_p_nC = _log_softmax(z_nC)
    areas = [auc(log_p_nC[:, c], y_n == c) for c in np.unique(y_n)]
    by_name = {"auc": float(np.mean(areas)), **_of_probabilities(log_p_nC, y_n)}
    return ValueMetrics(len(y_n), constant=bool((z_nC == z_nC[0]).all()), by_name=by_name)


def number_values(value_N: np.ndarray, label_N: np.ndarray) -> np.ndarray:
    """Return values (N,) whose mean is the ``r2`` of predicted numbers.

    The value of an example is ``1 - (y - value)^2 / variance of y``, stretched about the ``r2`` by the number of
    examples over that of labels, so that the spread is that of the ``r2``. One without a label has the ``r2`` itself.
    """
    y_n = label_N[~np.isnan(label_N)]
    if not len(y_n) or not np.ptp(y_n):
        return np.full(len(label_N), math.nan)
    values_N = 1 - np.square(label_N - value_N) / y_n.var()
    r2 = np.nanmean(values_N)
    return np.where(np.isnan(label_N), r2, r2 + (values_N - r2) * (len(label_N) / len(y_n)))


def class_values(z_NC: np.ndarray, place_N: np.ndarray) -> np.ndarray:
    """Return values (N,) whose mean is the "auc" of predicted classes; see ``auc_values``."""
    log_p_NC = _log_softmax(z_NC.astype(np.float64))
    classes = np.unique(place_N[~np.isnan(place_N)]).astype(np.int64)
    if not len(classes):
        return np.full(len(place_N), math.nan)
    is_class = (np.where(np.isnan(place_N), np.nan, place_N == c) for c in classes)
    return np.mean([auc_values(log_p_NC[:, c], y_N) for c, y_N in zip(classes, is_class, strict=True)], axis=0)


def bins(value_N: np.ndarray, label_N: np.ndarray) -> Bins:
    """Return the means of predictions and labels in at most 15 bins; equal predictions share one."""
    values, group_N, counts = np.unique(value_N, return_inverse=True, return_counts=True)
    middle = np.cumsum(counts) - counts / 2
    bin_N = np.minimum((_BINS * middle / len(value_N)).astype(np.int64), _BINS - 1)[group_N]
    own, predicted, labels = (np.bincount(bin_N, weights, _BINS) for weights in (None, value_N, label_N))
    kept = own > 0
    return Bins(predicted[kept] / own[kept], labels[kept] / own[kept], own[kept].astype(np.int64))


def correlation(a_N: np.ndarray, b_N: np.ndarray) -> float:
    """Return Pearson's correlation; NaN if one side is constant."""
    if not np.ptp(a_N) or not np.ptp(b_N):
        return math.nan
    a_N, b_N = a_N - a_N.mean(), b_N - b_N.mean()
    return float(a_N @ b_N) / (math.sqrt(float(a_N @ a_N)) * math.sqrt(float(b_N @ b_N)))


def _of_probabilities(log_p_NC: np.ndarray, place_N: np.ndarray) -> dict[str, float]:
    own_N = log_p_NC[np.arange(len(place_N)), place_N]
    return {"accuracy": float((log_p_NC.argmax(1) == place_N).mean()), "log_loss": float(-own_N.mean())}


def _log_softmax(z_NC: np.ndarray) -> np.ndarray:
    z_NC = z_NC - z_NC.max(1, keepdims=True)
    return z_NC - np.log(np.exp(z_NC).sum(1, keepdims=True))
