"""Metrics of binary predictions, as functions of arrays: AUC, PR-AUC, log loss, calibration, AUC by user.

Choices:

- Ties count half in an AUC, as in scikit-learn. Scores are compared as logits: the sigmoid of a float32 is 1 from 17 on
  and would make ties of scores that differ.
- The bins of the calibration error hold about equal numbers of examples (``binning="mass"``). Where 6 % are positive,
  bins of equal width leave nearly all examples in the first one or two. Equal scores fall into one bin, so the order of
  the rows does not matter and a constant prediction has the error |prediction - share of positives|.
- What a split cannot tell is NaN: the AUC and PR-AUC of a task with one class, everything of a task without labels.
"""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

import numpy as np

Binning = Literal["mass", "width"]
NO_GROUP = int(np.iinfo(np.int64).min)
"""Stands for the group of an example that has none."""


@dataclass(frozen=True)
class ScoreGroups:
    """The examples of one task by distinct score, ascending: all that the metrics need of them.

    Attributes:
        positives_G: int64, positive examples of each score.
        counts_G: int64, examples.
        prediction_sum_G: float64, sum of their probabilities.
    """

    positives_G: np.ndarray
    counts_G: np.ndarray
    prediction_sum_G: np.ndarray

    @classmethod
    def of(cls, scores_N: np.ndarray, labels_N: np.ndarray, predictions_N: np.ndarray | None = None) -> ScoreGroups:
        """``labels_N`` are 0 or 1, ``predictions_N`` probabilities in the order of the scores; None: the scores."""
        order = np.argsort(scores_N, kind="stable")
        sorted_N = scores_N[order]
        starts_G = np.flatnonzero(np.r_[True, sorted_N[1:] != sorted_N[:-1]]) if len(order) else np.zeros(0, np.int64)
        predictions_N = scores_N if predictions_N is None else predictions_N
        return cls(
            _sums(labels_N[order].astype(np.int64), starts_G),
            np.diff(np.r_[starts_G, len(order)]),
            _sums(predictions_N[order].astype(np.float64), starts_G),
        )

    def auc(self) -> float:
        negatives_G = self.counts_G - self.positives_G
        P, N = int(self.positives_G.sum()), int(negatives_G.sum())
        if not P or not N:
            return math.nan
        below_G = np.cumsum(negatives_G) - negatives_G
        # Twice the number of won pairs, in whole numbers.
        return float(np.sum(self.positives_G * (2 * below_G + negatives_G))) / (2.0 * P * N)

    def pr_auc(self) -> float:
        P = int(self.positives_G.sum())
        if not P or P == int(self.counts_G.sum()):
            return math.nan
        found_G = np.cumsum(self.positives_G[::-1])
        precision_G = found_G / np.cumsum(self.counts_G[::-1])
        return float(np.sum(self.positives_G[::-1] * precision_G) / P)

    def calibration(self, num_bins: int = 15, binning: Binning = "mass") -> Calibration:
        n = int(self.counts_G.sum())
        if binning == "mass":
            middle_G = np.cumsum(self.counts_G) - self.counts_G / 2
            bin_G = np.minimum((num_bins * middle_G / max(n, 1)).astype(np.int64), num_bins - 1)
        else:  # ((b - 1) / num_bins, b / num_bins], as in arXiv 1706.04599
            edges = np.linspace(0.0, 1.0, num_bins + 1)[1:-1]
            bin_G = np.searchsorted(edges, self.prediction_sum_G / self.counts_G, side="left")
        counts, positives, predicted = (
            np.bincount(bin_G, weights=values, minlength=num_bins)
            for values in (self.counts_G, self.positives_G, self.prediction_sum_G)
        )
        kept = counts > 0
        counts = counts[kept]
        return Calibration(predicted[kept] / counts, positives[kept] / counts, counts.astype(np.int64))


def _sums(values: np.ndarray, starts: np.ndarray) -> np.ndarray:
    return np.add.reduceat(values, starts) if len(starts) else values[:0]


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
        """Expected calibration error: mean over the examples of |prediction - share of positives| of their bin."""
        n = self.counts.sum()
        return float(np.sum(self.counts * np.abs(self.prediction - self.positives)) / n) if n else math.nan


def auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Area under the ROC curve: the share of (positive, negative) pairs in order, ties half. NaN labels are left out.

    Returns:
        The area; NaN where there is one class, or a score is NaN.
    """
    scores_N, labels_N = _labelled(scores_N, labels_N)
    return math.nan if np.isnan(scores_N).any() else ScoreGroups.of(scores_N, labels_N).auc()


def pr_auc(scores_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Average precision: the mean over the positives of the precision at their score. Otherwise as ``auc``."""
    scores_N, labels_N = _labelled(scores_N, labels_N)
    return math.nan if np.isnan(scores_N).any() else ScoreGroups.of(scores_N, labels_N).pr_auc()


def calibration(
    probabilities_N: np.ndarray, labels_N: np.ndarray, num_bins: int = 15, binning: Binning = "mass"
) -> Calibration:
    """Bins of a prediction; ``.error`` is the ECE (arXiv 1706.04599, equation 3). NaN labels are left out.

    Args:
        probabilities_N: predictions in 0..1.
        labels_N: 0, 1 or NaN.
        num_bins: bins at most.
        binning: "mass", about equal numbers of examples; "width", equal intervals of the prediction.
    """
    return ScoreGroups.of(*_labelled(probabilities_N, labels_N)).calibration(num_bins, binning)


def log_loss(logits_N: np.ndarray, labels_N: np.ndarray) -> float:
    """Mean negative log likelihood in nats. NaN labels are left out; NaN without any."""
    z_N, y_N = _labelled(logits_N, labels_N)
    return float(_negative_log_likelihood(z_N, y_N).mean()) if len(y_N) else math.nan


def _negative_log_likelihood(z_N: np.ndarray, y_N: np.ndarray) -> np.ndarray:
    return np.logaddexp(0.0, np.where(y_N > 0, -z_N, z_N).astype(np.float64))


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
    """``sum_u n_u AUC_u / sum_u n_u`` over the users u with both classes (arXiv 1706.06978, section 6.3).

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
    positives_R = _sums(y_N, run_starts)
    negatives_R = np.diff(np.r_[run_starts, len(y_N)]) - positives_R
    below_R = np.cumsum(negatives_R) - negatives_R
    below_R -= np.repeat(below_R[first_run_U], np.diff(np.r_[first_run_U, len(run_starts)]))
    won_U = _sums(positives_R * (2 * below_R + negatives_R), first_run_U)
    P_U, N_U = _sums(positives_R, first_run_U), _sums(negatives_R, first_run_U)
    both_U = (P_U > 0) & (N_U > 0)
    value = math.nan
    if both_U.any():
        auc_U = won_U[both_U] / (2.0 * P_U[both_U] * N_U[both_U])
        value = float(np.average(auc_U, weights=(P_U + N_U)[both_U]))
    return GroupedAUC(value, int(both_U.sum()), int((~both_U).sum()))


def _labelled(values_N: np.ndarray, labels_N: np.ndarray) -> tuple[np.ndarray, np.ndarray]:
    labels_N = np.asarray(labels_N, dtype=np.float64)
    kept_N = ~np.isnan(labels_N)
    labels_N = labels_N[kept_N]
    wrong_N = (labels_N != 0) & (labels_N != 1)
    if wrong_N.any():
        raise ValueError(f"label {labels_N[wrong_N][0]:g} is neither 0 nor 1 (NaN: none)")
    return np.asarray(values_N)[kept_N], labels_N


@dataclass(frozen=True)
class TaskMetrics:
    """What a split says of one task.

    Attributes:
        num_examples: with a label.
        base_rate: share of the positive ones.
        mean_prediction: mean probability.
        constant: all predictions are equal.
        invalid: predictions that are NaN; the metrics are NaN if there are any.
        auc, pr_auc, log_loss, ece: see the functions of this module.
        calibration: the bins of ``ece``.
        gauc: by user; None where no users are known.
    """

    num_examples: int
    base_rate: float
    mean_prediction: float
    constant: bool
    invalid: int
    auc: float
    pr_auc: float
    log_loss: float
    ece: float
    calibration: Calibration
    gauc: GroupedAUC | None = None

    def values(self) -> dict[str, float]:
        """The metrics by name."""
        found = {name: float(getattr(self, name)) for name in ("auc", "pr_auc", "log_loss", "ece")}
        return found if self.gauc is None else {**found, "gauc": self.gauc.value}


def task_metrics(
    scores_N: np.ndarray,
    labels_N: np.ndarray,
    groups_N: np.ndarray | None = None,
    outputs: Literal["logits", "probabilities"] = "logits",
    ece_bins: int = 15,
    ece_binning: Binning = "mass",
) -> TaskMetrics:
    """Return all metrics of one task; see ``MultiTaskMetrics``."""
    if groups_N is not None:
        groups_N = groups_N[~np.isnan(labels_N)]
    scores_N, labels_N = _labelled(scores_N, labels_N)
    n, invalid = len(scores_N), int(np.isnan(scores_N).sum())
    if not n or invalid:
        return unknown(n, float(labels_N.mean()) if n else math.nan, invalid)
    if outputs == "logits":
        z_N = scores_N.astype(np.float64)
        p_N = np.exp(-np.logaddexp(0.0, -z_N))
        losses_N = _negative_log_likelihood(z_N, labels_N)
    else:
        p_N = scores_N.astype(np.float64)
        eps = float(np.finfo(np.float32).eps)  # as scikit-learn does, or one sure mistake makes the mean infinite
        likelihood_N = np.where(labels_N > 0, p_N, 1 - p_N)
        losses_N = -np.log(np.clip(likelihood_N, eps, 1 - eps))
    by_score = ScoreGroups.of(scores_N, labels_N, p_N)
    by_user = None
    if groups_N is not None:
        named_N = groups_N != NO_GROUP
        by_user = grouped_auc(scores_N[named_N], labels_N[named_N], groups_N[named_N])
    constant = len(by_score.counts_G) == 1
    return metrics_of(by_score, float(losses_N.mean()), constant, ece_bins, ece_binning, by_user)


def metrics_of(
    by_score: ScoreGroups,
    loss: float,
    constant: bool,
    ece_bins: int,
    ece_binning: Binning,
    gauc: GroupedAUC | None = None,
) -> TaskMetrics:
    n, bins = int(by_score.counts_G.sum()), by_score.calibration(ece_bins, ece_binning)
    return TaskMetrics(
        num_examples=n,
        base_rate=float(by_score.positives_G.sum() / n),
        mean_prediction=float(by_score.prediction_sum_G.sum() / n),
        constant=constant,
        invalid=0,
        auc=by_score.auc(),
        pr_auc=by_score.pr_auc(),
        log_loss=loss,
        ece=bins.error,
        calibration=bins,
        gauc=gauc,
    )


def unknown(n: int, base_rate: float, invalid: int) -> TaskMetrics:
    none = np.zeros(0)
    bins = Calibration(none, none, none.astype(np.int64))
    return TaskMetrics(n, base_rate, math.nan, False, invalid, math.nan, math.nan, math.nan, math.nan, bins)
