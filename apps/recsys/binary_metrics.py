"""Metrics of binary predictions, as functions of arrays: AUC, PR-AUC, log loss, calibration, AUC by user.

scikit-learn computes the areas; this module adds the metrics that it lacks. Choices:

- Ties count half in an AUC. Scores are compared as logits: the sigmoid of a float32 is 1 from 17 on and would make ties
  of scores that differ.
- The 15 bins of the calibration error hold about equal numbers of examples. Where 6 % are positive, bins of equal width
  leave nearly all examples in the first one or two. Equal scores fall into one bin, so the order of the rows does not
  matter and a constant prediction has the error |prediction - share of positives|.
- A metric that the split cannot determine is NaN: the AUC and PR-AUC of a task with one class, everything of a task
  without labels.

``weights_N`` are numbers of examples: a histogram of scores is evaluated as its examples are.
"""

from __future__ import annotations

import math
from collections.abc import Callable
from dataclasses import dataclass

import numpy as np

NO_GROUP = int(np.iinfo(np.int64).min)
"""Stands for the group of an example that has none."""

COLD_USER, COLD_ITEM = 1, 2
"""Flags of an example whose user, and whose item, has no row in training; their sum stands for both."""


def auc(scores_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """Return the area under the ROC curve: the share of (positive, negative) pairs in order, ties half.

    Examples whose label is NaN are left out. NaN: there is one class, or a score is NaN.
    """
    from sklearn.metrics import roc_auc_score

    return _of_ranks(roc_auc_score, scores_N, labels_N, weights_N)


def auc_values(scores_N: np.ndarray, labels_N: np.ndarray) -> np.ndarray:
    """Return values (N,) whose mean is the AUC, and whose spread equals the spread of the AUC over other examples.

    The value of a positive is the share of negatives below it, and the value of a negative the share of positives above
    it, each ties half, stretched about the AUC by N over the size of its class (DeLong et al., Biometrics 1988). An
    example whose label is NaN has the AUC itself. All are NaN if there is one class.

    Example::

        auc_values(np.array([0.1, 0.4, 0.3, 0.9]), np.array([0, 0, 1, 1]))
        # AUC 3/4; positives 1/2 and 1, negatives 1 and 1/2: 3/4 + 2 (own - 3/4) = [1.25, 0.25, 0.25, 1.25]
    """
    from scipy.stats import rankdata

    values_N = np.full(len(scores_N), math.nan)
    is_labeled_N = ~np.isnan(labels_N)
    # Since scipy 1.18 ranks have the scores' dtype, in which their differences would be rounded.
    y_n, z_n = labels_N[is_labeled_N] > 0, scores_N[is_labeled_N].astype(np.float64)
    num_pos, num_neg = int(y_n.sum()), int((~y_n).sum())
    if not num_pos or not num_neg or np.isnan(z_n).any():
        return values_N
    rank_n, own_n = rankdata(z_n), np.empty(len(z_n))
    own_n[y_n] = (rank_n[y_n] - rankdata(z_n[y_n])) / num_neg
    own_n[~y_n] = 1 - (rank_n[~y_n] - rankdata(z_n[~y_n])) / num_pos
    area = float(own_n[y_n].mean())
    values_N[:] = area
    values_N[is_labeled_N] += (own_n - area) * len(scores_N) / np.where(y_n, num_pos, num_neg)
    return values_N


def pr_auc(scores_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray | None = None) -> float:
    """Return the average precision: the mean over the positives of the precision at their score. Else as ``auc``."""
    from sklearn.metrics import average_precision_score

    return _of_ranks(average_precision_score, scores_N, labels_N, weights_N)


def _of_ranks(
    metric: Callable[..., float], scores_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray | None
) -> float:
    scores_N, labels_N, weights_N = _labeled(scores_N, labels_N, weights_N)
    if len(np.unique(labels_N)) < 2 or np.isnan(scores_N).any():
        return math.nan
    # scikit-learn rejects infinite scores; their ranks are as good.
    return float(metric(labels_N, np.unique(scores_N, return_inverse=True)[1], sample_weight=weights_N))


def log_loss(logits_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Return the mean negative log likelihood in nats. NaN labels are left out; NaN without any."""
    z_N, y_N, _ = _labeled(logits_N, labels_N)
    # scikit-learn's takes probabilities and clips them: a sure mistake would cost 16 nats instead of its logit.
    return float(np.logaddexp(0.0, np.where(y_N > 0, -z_N, z_N).astype(np.float64)).mean()) if len(y_N) else math.nan


@dataclass(frozen=True)
class Calibration:
    """Predicted and observed shares of positives in bins of the prediction; bins without examples are left out.

    Attributes:
        prediction: mean prediction of each bin, ascending.
        positives: share of positive examples.
        counts: examples.
    """

    prediction: np.ndarray
    positives: np.ndarray
    counts: np.ndarray

    @property
    def error(self) -> float:
        """The expected calibration error: the mean over the examples of |prediction - positives| of their bin."""
        n = self.counts.sum()
        return float(np.sum(self.counts * np.abs(self.prediction - self.positives)) / n) if n else math.nan


def calibration(
    probabilities_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray | None = None, num_bins: int = 15
) -> Calibration:
    """Return bins of a prediction; ``.error`` is the ECE (arXiv 1706.04599, equation 3). NaN labels are left out.

    scikit-learn's ``calibration_curve`` gives no counts, which a mean over the examples needs, and takes no histogram.

    Args:
        probabilities_N: predictions in 0..1.
        labels_N: 0, 1 or NaN.
        weights_N: examples of each prediction; None: one.
        num_bins: maximum number of bins, of about equal numbers of examples.
    """
    p_N, y_N, weights_N = _labeled(probabilities_N, labels_N, weights_N)
    value_G, group_N = np.unique(p_N, return_inverse=True)
    count_G = np.bincount(group_N, weights_N, len(value_G))
    middle_G = np.cumsum(count_G) - count_G / 2
    bin_G = np.minimum((num_bins * middle_G / max(count_G.sum(), 1)).astype(np.int64), num_bins - 1)
    counts, positives, predicted = (
        np.bincount(bin_G[group_N], weights_N * factor, num_bins) for factor in (1.0, y_N, p_N)
    )
    kept = counts > 0
    counts = counts[kept]
    return Calibration(predicted[kept] / counts, positives[kept] / counts, counts.astype(np.int64))


@dataclass(frozen=True)
class GroupedAUC:
    """AUC within users.

    Attributes:
        value: mean over the users of their AUC, weighted by their examples; NaN without any user.
        num_groups: users in it.
        left_out: users with examples of one class, whose AUC does not exist.
    """

    value: float
    num_groups: int
    left_out: int


def grouped_auc(scores_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray) -> GroupedAUC:
    """Return ``sum_u n_u AUC_u / sum_u n_u`` over the users u with both classes (arXiv 1706.06978, section 6.3).

    No library has it; one call of scikit-learn's a user would take minutes for the users of one test split.

    Args:
        scores_N: of any scale; ties count half.
        labels_N: 0, 1, or NaN for an example to leave out.
        groups_N: int64, the user of each example.
    """
    kept_N = ~np.isnan(labels_N)
    scores_N, labels_N, groups_N = scores_N[kept_N], labels_N[kept_N], groups_N[kept_N]
    if not len(groups_N):
        return GroupedAUC(math.nan, 0, 0)
    order = np.lexsort((scores_N, groups_N))
    s_N, g_N, y_N = scores_N[order], groups_N[order], labels_N[order].astype(np.int64)
    new_group_N = np.r_[True, g_N[1:] != g_N[:-1]]
    run_starts = np.flatnonzero(new_group_N | np.r_[True, s_N[1:] != s_N[:-1]])  # a run: one user, one score
    first_run_U = np.flatnonzero(new_group_N[run_starts])
    positives_R = np.add.reduceat(y_N, run_starts)
    negatives_R = np.diff(np.r_[run_starts, len(y_N)]) - positives_R
    below_R = np.cumsum(negatives_R) - negatives_R
    below_R -= np.repeat(below_R[first_run_U], np.diff(np.r_[first_run_U, len(run_starts)]))
    # Twice the number of won pairs, in integers.
    won_U = np.add.reduceat(positives_R * (2 * below_R + negatives_R), first_run_U)
    P_U, N_U = np.add.reduceat(positives_R, first_run_U), np.add.reduceat(negatives_R, first_run_U)
    both_U = (P_U > 0) & (N_U > 0)
    value = math.nan
    if both_U.any():
        auc_U = won_U[both_U] / (2.0 * P_U[both_U] * N_U[both_U])
        value = float(np.average(auc_U, weights=(P_U + N_U)[both_U]))
    return GroupedAUC(value, int(both_U.sum()), int((~both_U).sum()))


def _labeled(
    values_N: np.ndarray, labels_N: np.ndarray, weights_N: np.ndarray | None = None
) -> tuple[np.ndarray, np.ndarray, np.ndarray]:
    """Return the values, labels and weights of the examples that have a label.

    Raises:
        ValueError: a label that is neither 0 nor 1.
    """
    labels_N = np.asarray(labels_N, dtype=np.float64)
    kept_N = ~np.isnan(labels_N)
    labels_N = labels_N[kept_N]
    wrong_N = (labels_N != 0) & (labels_N != 1)
    if wrong_N.any():
        raise ValueError(f"label {labels_N[wrong_N][0]:g} is neither 0 nor 1 (NaN: none)")
    weights_N = np.ones(len(labels_N)) if weights_N is None else weights_N[kept_N]
    return np.asarray(values_N)[kept_N], labels_N, weights_N


@dataclass(frozen=True)
class TaskMetrics:
    """The metrics of one task over a split.

    Attributes:
        num_examples: number of examples with a label.
        base_rate: share of the positive ones.
        mean_prediction: mean probability.
        constant: whether all predictions are equal.
        invalid: number of predictions that are NaN; the metrics are NaN if there are any.
        auc, pr_auc, log_loss: results of the functions of this module.
        calibration: bins, whose error is ``ece``.
        gauc: AUC by user; None if no users are known.
    """

    num_examples: int
    base_rate: float
    mean_prediction: float = math.nan
    constant: bool = False
    invalid: int = 0
    auc: float = math.nan
    pr_auc: float = math.nan
    log_loss: float = math.nan
    calibration: Calibration = Calibration(np.zeros(0), np.zeros(0), np.zeros(0, np.int64))
    gauc: GroupedAUC | None = None

    @property
    def ece(self) -> float:
        return self.calibration.error

    def values(self) -> dict[str, float]:
        """Return the metrics by name."""
        values = {name: float(getattr(self, name)) for name in ("auc", "pr_auc", "log_loss", "ece")}
        return values if self.gauc is None else {**values, "gauc": self.gauc.value}


def task_metrics(logits_N: np.ndarray, labels_N: np.ndarray, groups_N: np.ndarray | None = None) -> TaskMetrics:
    """Return all metrics of one task; see ``MultiTaskMetrics``."""
    if groups_N is not None:
        groups_N = groups_N[~np.isnan(labels_N)]
    z_N, y_N, weights_N = _labeled(logits_N, labels_N)
    n, invalid = len(z_N), int(np.isnan(z_N).sum())
    if not n or invalid:
        return TaskMetrics(n, float(y_N.mean()) if n else math.nan, invalid=invalid)
    by_user = None
    if groups_N is not None:
        named_N = groups_N != NO_GROUP
        by_user = grouped_auc(z_N[named_N], y_N[named_N], groups_N[named_N])
    p_N = np.exp(-np.logaddexp(0.0, -z_N.astype(np.float64)))
    return _all_metrics(z_N, p_N, y_N, weights_N, log_loss(z_N, y_N), by_user)


def histogram_metrics(counts_MC: np.ndarray, prediction_sum_M: np.ndarray, loss_sum: float) -> TaskMetrics:
    """Return the metrics of one task from counts by score; scores of one bin are ties.

    Args:
        counts_MC: (M, 2), negative and positive examples of each bin, by ascending score.
        prediction_sum_M: sum of the probabilities in each bin.
        loss_sum: negative log likelihood of all examples.
    """
    bin_N, label_N = np.nonzero(counts_MC)
    if not len(bin_N):
        return TaskMetrics(0, math.nan)
    p_N = prediction_sum_M[bin_N] / counts_MC.sum(1)[bin_N]
    return _all_metrics(bin_N, p_N, label_N, counts_MC[bin_N, label_N], loss_sum / counts_MC.sum())


def _all_metrics(
    scores_N: np.ndarray,
    p_N: np.ndarray,
    y_N: np.ndarray,
    weights_N: np.ndarray,
    loss: float,
    by_user: GroupedAUC | None = None,
) -> TaskMetrics:
    return TaskMetrics(
        num_examples=int(weights_N.sum()),
        base_rate=float(np.average(y_N, weights=weights_N)),
        mean_prediction=float(np.average(p_N, weights=weights_N)),
        constant=bool((scores_N == scores_N[0]).all()),
        auc=auc(scores_N, y_N, weights_N),
        pr_auc=pr_auc(scores_N, y_N, weights_N),
        log_loss=float(loss),
        calibration=calibration(p_N, y_N, weights_N),
        gauc=by_user,
    )
