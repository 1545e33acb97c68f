"""What ``TwoTowerRetriever`` is compared with: dense towers of equal cost."""

from __future__ import annotations

from collections.abc import Mapping

from apps.equal_cost.comparison import Baseline, Comparison, RoutedLayers, dense_twins


class RetrievalComparison(Comparison):
    """A ``TwoTowerRetriever`` as a comparison sees it."""

    def baselines(self) -> Mapping[str, Baseline]:
        """Return two dense towers of equal active FLOPs and of equal parameters."""
        return dense_twins(self, self.module.tower.dense_ffn)

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        return RoutedLayers(self.module.moe, self.module.tower.width, self.module.place, {"tokens_per_sequence": 1})


COMPARISON = RetrievalComparison
