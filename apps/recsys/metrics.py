"""torchmetrics metrics of click models and of rankings, with equal results on one process and on many.

A module returns ``MultiTaskMetrics`` or ``RankingMetrics`` from ``build_metrics``. ``apps.recsys.binary_metrics``
defines the metrics of a task, and how ties, bins and missing classes are treated. Ranks are pessimistic: an item with
the target's score ranks before it, so a constant scorer ranks last.
"""

from __future__ import annotations

import math
from collections.abc import Mapping, Sequence

import numpy as np
import torch
from torch import Tensor

from apps.recsys.binary_metrics import COLD_ITEM, COLD_USER, NO_GROUP, TaskMetrics, histogram_metrics
from apps.recsys.encoding.features import Target
from apps.recsys.kinds import Metrics, Outputs
from apps.train.step.synced import SyncedMetric, joined

# Logits beyond it share the outermost bins of the streaming form: their probability is within 1.2e-7 of 0 or 1.
_LIMIT = 16.0


# ---- tasks


class MultiTaskMetrics(SyncedMetric):
    """AUC, PR-AUC, log loss and calibration error of each binary task, and AUC by user; the metrics of other tasks.

    ``compute`` returns ``auc_<task>``, ``pr_auc_<task>``, ``log_loss_<task>``, ``ece_<task>``, where users are known
    ``gauc_<task>``, and ``auc`` (and ``gauc``), the mean over the tasks that have one. Tasks that are not binary have
    those of ``ValueMetrics``, such as ``rmse_<task>``, and ``r2`` is the mean over those that have one. Where
    the tasks' main metrics differ, ``quality`` is their mean. ``loss`` is the sum of the means of ``add_losses``.

    Predictions are kept in float32 on the CPU until the end, 8 bytes per row and task, and are gathered by every rank.
    Where some users or items have no row in training, there are ``<part>_rows`` of the parts "warm", "cold_user" and
    "cold_item", and the main metrics of each, such as ``cold_user_auc`` and ``cold_user_auc_<task>``.

    For more rows than that allows, ``score_bins`` keeps only counts: scores within a bin are ties then, which changes
    an AUC by at most half the share of pairs that fall into one bin; log loss and means stay exact.

    Args:
        task_names: names of the tasks, in the order of the columns.
        grouped: whether to keep the users that ``update`` is given.
        score_bins: number of bins of equal width of the logit in -16..16; None: exact metrics.
        outputs: kinds of the tasks; None: all are binary.

    Attributes:
        by_task: the metrics of each task, after ``compute``.
        by_part: the rows of each part of the users and items, and the metrics of their tasks; empty if none is cold.

    Raises:
        ValueError: a value out of its range, or ``score_bins`` with ``grouped`` or with a task that is not binary.
    """

    higher_is_better = True
    has_loss = True

    def __init__(
        self,
        task_names: Sequence[str],
        grouped: bool = False,
        score_bins: int | None = None,
        outputs: Outputs | None = None,
    ) -> None:
        super().__init__()
        names = tuple(task_names)
        self.outputs = Outputs((Target(),) * len(names)) if outputs is None else outputs
        if score_bins is not None and score_bins < 2:
            raise ValueError(f"score_bins={score_bins} must be at least 2")
        if score_bins is not None and not self.outputs.all_binary:
            raise ValueError(
                f"score_bins={score_bins}: tasks that are not binary need the exact form (score_bins=None)"
            )
        self.task_names, self.grouped, self.score_bins = names, grouped, score_bins
        self.by_task: dict[str, Metrics] = {}
        self.by_part: dict[str, tuple[int, dict[str, Metrics]]] = {}
        self.add_state("part_sums", torch.zeros(len(names) + 1), "sum")
        self.add_state("part_rows", torch.zeros(len(names) + 1, dtype=torch.int64), "sum")
        if score_bins is None:
            self.add_state("scores", [], "cat")
            self.add_state("labels", [], "cat")
            self.add_state("cold", [], "cat")
            if grouped:
                self.add_state("groups", [], "cat")
        else:
            self.add_state("counts", torch.zeros(len(names), score_bins, 2, dtype=torch.int64), "sum")
            self.add_state("prediction_sums", torch.zeros(len(names), score_bins, dtype=torch.float64), "sum")
            self.add_state("loss_sums", torch.zeros(len(names), dtype=torch.float64), "sum")
            self.add_state("invalid", torch.zeros(len(names), dtype=torch.int64), "sum")

    def _empty(self) -> Mapping[str, Tensor]:
        if self.score_bins is not None:
            return {}
        empty = {
            "scores": torch.zeros(0, self.outputs.width),
            "labels": torch.zeros(0, len(self.task_names)),
            "cold": torch.zeros(0, dtype=torch.uint8),
        }
        return {**empty, "groups": torch.zeros(0, dtype=torch.int64)} if self.grouped else empty

    def add_losses(self, loss_p: Tensor, rows_p: Tensor) -> None:
        """Add a batch's parts of the loss, the weighted losses of the tasks and the rest, and the rows of each mean."""
        self.part_sums += loss_p * rows_p
        self.part_rows += rows_p

    def update(
        self, outputs: Tensor, targets: Tensor, groups: Tensor | None = None, cold: Tensor | None = None
    ) -> None:
        """Add a batch.

        Args:
            outputs: (B, Z), the tasks' outputs, a logit each where all are binary.
            targets: (B, t), labels as ``TableBatch`` has them; NaN if an example has none.
            groups: int64 (B,), the user of each example; None if users are not known.
            cold: uint8 (B,), flags of what has no row in training, as ``TableBatch`` has them; None: nothing.

        Raises:
            ValueError: shapes that do not fit each other.
        """
        if self.score_bins is not None:
            self._count(outputs.detach().float(), targets.detach())
            return
        self.scores.append(outputs.detach().to("cpu", torch.float32))
        self.labels.append(targets.detach().to("cpu", torch.float32))
        of_warm = torch.zeros(len(outputs), dtype=torch.uint8)
        self.cold.append(of_warm if cold is None else cold.detach().to("cpu", torch.uint8))
        if self.grouped:
            of_none = torch.full((len(outputs),), NO_GROUP)
            self.groups.append(of_none if groups is None else groups.detach().to("cpu", torch.int64))

    def _count(self, z_Bt: Tensor, y_Bt: Tensor) -> None:
        M, t = self.score_bins or 0, len(self.task_names)
        has_label_Bt = ~y_Bt.isnan()
        _check_labels(y_Bt[has_label_Bt])
        self.invalid += (has_label_Bt & z_Bt.isnan()).sum(0)
        kept_Bt = has_label_Bt & ~z_Bt.isnan()
        bin_Bt = ((z_Bt.nan_to_num() + _LIMIT) * (M / (2 * _LIMIT))).long().clamp(0, M - 1)
        cell_Bt = bin_Bt + M * torch.arange(t, device=z_Bt.device)
        z, y, cell = z_Bt[kept_Bt].double(), y_Bt[kept_Bt].long(), cell_Bt[kept_Bt]
        self.counts += torch.bincount(2 * cell + y, minlength=2 * t * M).view(t, M, 2)
        self.prediction_sums += torch.bincount(cell, weights=z.sigmoid(), minlength=t * M).view(t, M)
        loss = torch.nn.functional.softplus(torch.where(y > 0, -z, z))
        self.loss_sums += torch.bincount(cell // M, weights=loss, minlength=t)

    def compute(self) -> dict[str, Tensor]:
        """Return the metrics of all examples so far, float64 scalars."""
        of_tasks = self._exact() if self.score_bins is None else self._binned()
        self.by_task = dict(zip(self.task_names, of_tasks, strict=True))
        values: dict[str, float] = {}
        by_metric: dict[str, list[float]] = {}
        for task, of_task in self.by_task.items():
            for name, value in of_task.values().items():
                values[f"{name}_{task}"] = value
                by_metric.setdefault(name, []).append(value)
        means: dict[str, float] = {name: _mean(by_metric[name]) for name in ("auc", "gauc", "r2") if name in by_metric}
        if self.part_rows.any():
            means["loss"] = float((self.part_sums / self.part_rows.clamp_min(1)).sum())
        if self.outputs.main_metric is None:
            kinds = zip(self.task_names, self.outputs.kinds, strict=True)
            means["quality"] = _mean([values.get(f"{kind.main_metric}_{task}", math.nan) for task, kind in kinds])
        for part, (num_rows, of_part) in self.by_part.items():
            values[f"{part}_rows"] = num_rows
            names = [kind.main_metric for kind in self.outputs.kinds]
            main = [of_task.values().get(name, math.nan) for name, of_task in zip(names, of_part.values(), strict=True)]
            by_metric = {name: [] for name in names}
            for task, name, value in zip(of_part, names, main, strict=True):
                values[f"{part}_{name}_{task}"] = value
                by_metric[name].append(value)
            values |= {f"{part}_{name}": _mean(of_tasks) for name, of_tasks in by_metric.items()}
        return {k: torch.tensor(v, dtype=torch.float64) for k, v in (means | values).items()}

    def _exact(self) -> Sequence[Metrics]:
        states = {name: joined(getattr(self, name), empty).numpy() for name, empty in self._empty().items()}
        groups_N = states.get("groups")
        if groups_N is not None and not (groups_N != NO_GROUP).any():
            groups_N = None
        cold_N = states["cold"]
        flags = {"warm": cold_N == 0, "cold_user": cold_N & COLD_USER > 0, "cold_item": cold_N & COLD_ITEM > 0}
        self.by_part = {}
        for part, is_in_N in flags.items() if cold_N.any() else ():
            if is_in_N.any():
                own = self._of_rows(states["scores"][is_in_N], states["labels"][is_in_N], None)
                self.by_part[part] = int(is_in_N.sum()), dict(zip(self.task_names, own, strict=True))
        return self._of_rows(states["scores"], states["labels"], groups_N)

    def _of_rows(self, scores_NZ: np.ndarray, label_Nt: np.ndarray, groups_N: np.ndarray | None) -> list[Metrics]:
        scores = self.outputs.split(torch.from_numpy(scores_NZ))
        parts = zip(self.outputs.kinds, scores, label_Nt.T, strict=True)
        return [kind.metrics(own.numpy(), label_N, groups_N) for kind, own, label_N in parts]

    def _binned(self) -> Sequence[Metrics]:
        of_tasks: list[Metrics] = []
        for counts_MC, sums_M, loss, invalid in zip(
            self.counts, self.prediction_sums, self.loss_sums, self.invalid.tolist(), strict=True
        ):
            if invalid:
                of_tasks.append(TaskMetrics(int(counts_MC.sum()) + invalid, math.nan, invalid=invalid))
            else:
                of_tasks.append(histogram_metrics(counts_MC.cpu().numpy(), sums_M.cpu().double().numpy(), float(loss)))
        return of_tasks


def _mean(values: Sequence[float]) -> float:
    known = [v for v in values if not math.isnan(v)]
    return sum(known) / len(known) if known else math.nan


def _check_labels(labels: Tensor) -> None:
    wrong = (labels != 0) & (labels != 1)
    if bool(wrong.any()):
        raise ValueError(f"label {float(labels[wrong][0]):g} is neither 0 nor 1 (NaN: none)")


# ---- rankings

CUTOFF = 10
"""Number of best items that a next-item model's hit rate and NDCG judge."""


def target_ranks(scores_BI: Tensor, target_B: Tensor) -> Tensor:
    """Return the rank of each row's target among all items, int64 (B,), 1 the best; pessimistic on ties and NaN.

    Args:
        scores_BI: (B, I), a score for every item; -inf where an item is not a candidate (padding, seen before).
        target_B: int64 (B,), the item that should come first.

    Raises:
        ValueError: a target that is not an item, or shapes that do not fit.
    """
    num_items = scores_BI.shape[1]
    return num_items - (scores_BI < scores_BI.gather(1, target_B[:, None])).sum(1)


class RankingMetrics(SyncedMetric):
    """Hit rate and NDCG at k, and the mean reciprocal rank, of one target a row among *all* items.

    torchmetrics' retrieval metrics keep every score of every item until the end, and favor the target in a tie.

    With one relevant item the ideal DCG is 1, so NDCG@k is ``1 / log2(1 + rank)`` within the first k, else 0. Sampled
    candidates are not offered: they change the order of models (Krichene and Rendle, KDD 2020).

    ``compute`` returns ``hr_<k>``, ``ndcg_<k>`` and ``mrr``: means over the rows, kept as sums; NaN without rows.

    Args:
        ks: the cut-offs.

    Raises:
        ValueError: a cut-off below 1, or none.
    """

    higher_is_better = True

    def __init__(self, ks: Sequence[int] = (10, 20)) -> None:
        super().__init__()
        self.ks = tuple(ks)
        self.add_state("hits", torch.zeros(len(self.ks), dtype=torch.int64), "sum")
        self.add_state("gains", torch.zeros(len(self.ks), dtype=torch.float64), "sum")
        self.add_state("reciprocal_sum", torch.zeros((), dtype=torch.float64), "sum")
        self.add_state("count", torch.zeros((), dtype=torch.int64), "sum")

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: (B, I) scores of all items and int64 (B,) targets; see ``target_ranks``."""
        self.add(target_ranks(outputs.detach(), targets))

    def add(self, rank_B: Tensor) -> None:
        """Add the ranks of the targets of a batch, int64 (B,), 1 the best."""
        rank_B = rank_B.to(self.count.device)
        gain_B = 1.0 / torch.log2(1.0 + rank_B.double())
        within_Bk = rank_B[:, None] <= torch.tensor(self.ks, device=rank_B.device)
        self.hits += within_Bk.sum(0)
        self.gains += (gain_B[:, None] * within_Bk).sum(0)
        self.reciprocal_sum += (1.0 / rank_B.double()).sum()
        self.count += len(rank_B)

    def compute(self) -> dict[str, Tensor]:
        n = self.count.double()
        rates = {f"hr_{k}": self.hits[i] / n for i, k in enumerate(self.ks)}
        gains = {f"ndcg_{k}": self.gains[i] / n for i, k in enumerate(self.ks)}
        return {**rates, **gains, "mrr": self.reciprocal_sum / n}
