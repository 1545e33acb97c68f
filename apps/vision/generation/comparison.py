"""What ``ImageGenerator`` is compared with: dense models of equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import torch

from apps.equal_cost.comparison import Baseline, Comparison, ExampleValues, RoutedLayers, dense_twins
from apps.train.step.module import TaskOutput


class GenerationComparison(Comparison):
    """An ``ImageGenerator`` as a comparison sees it."""

    def baselines(self) -> Mapping[str, Baseline]:
        """Return dense models of equal active FLOPs and of equal parameters, whose FFNs replace the experts."""
        return dense_twins(self, self.module.dit.dense_ffn)

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        arguments = {"tokens_per_sequence": self.module.model.patch_embed.num_patches}
        return RoutedLayers(self.module.moe, self.module.dit.dim, self.module.place, arguments)

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the loss of each image."""
        return ExampleValues("loss", torch.cat([out.outputs.double() for out in outs]).cpu(), higher_is_better=False)


COMPARISON = GenerationComparison
