"""What ``LinearClassifier`` is compared with."""

from __future__ import annotations

from collections.abc import Mapping

import core
from apps.equal_cost.comparison import Baseline, Comparison, RoutedLayers, dense_twins
from apps.nets.place import Place


class LinearComparison(Comparison):
    def routed_layers(self) -> RoutedLayers | None:
        moe = self.module.moe
        return None if moe is None else RoutedLayers(moe, 64, Place(type(self.module).__name__))

    def baselines(self) -> Mapping[str, Baseline]:
        return dense_twins(self, core.DenseFFN())


COMPARISON = LinearComparison
