"""Metrics of a retrieval, of the rank that each target has among all items."""

from __future__ import annotations

from torch import Tensor

from apps.recsys.metrics import RankingMetrics


class RetrievalMetrics(RankingMetrics):
    """Recall at each k, NDCG at the first k, and the mean reciprocal rank.

    ``compute`` returns ``recall_<k>``, ``ndcg_<first k>`` and ``mrr``. Recall at k is the share of the pairs whose item
    is among the user's k best candidates.
    """

    def update(self, outputs: Tensor, targets: Tensor) -> None:
        """Add a batch: the ranks, int64 (B,), and the targets, which are not looked at."""
        self.add(outputs)

    def compute(self) -> dict[str, Tensor]:
        values = super().compute()
        first = f"ndcg_{self.ks[0]}"
        return {**{f"recall_{k}": values[f"hr_{k}"] for k in self.ks}, first: values[first], "mrr": values["mrr"]}
