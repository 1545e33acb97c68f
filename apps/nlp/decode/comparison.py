"""What a module that writes texts is compared with: dense models of equal cost."""

from __future__ import annotations

from collections.abc import Mapping, Sequence

import core
from apps.equal_cost.comparison import Baseline, Comparison, ExampleValues, RoutedLayers, dense_twins
from apps.nets.depths import TokenGate
from apps.train.step.module import TaskOutput
from apps.train.step.pieces import ratio_values


class WritingComparison(Comparison):
    """A ``WritingModule`` as a comparison sees it."""

    @property
    def moe_block_names(self) -> tuple[str, ...]:
        """Return the names of the MoE layers instead of FFNs: a comparison leaves attention and gates of blocks."""
        layers = core.moe_layers(self.module)
        return tuple(n for n, layer in layers.items() if not isinstance(layer, core.AttentionMoE | TokenGate))

    def routed_layers(self) -> RoutedLayers | None:
        if self.module.moe is None:
            return None
        sharing = len(self.module.model.moe_blocks) if getattr(self.module.model, "shares_experts", False) else 1
        return RoutedLayers(self.module.moe, self.module.transformer.shape.dim, self.module.place, num_sharing=sharing)

    def baselines(self) -> Mapping[str, Baseline]:
        """Dense models of equal active FLOPs and of equal parameters; only the FFNs instead of experts are wider."""
        return dense_twins(self, self.module.transformer.dense_ffn)

    def example_values(self, outs: Sequence[TaskOutput]) -> ExampleValues:
        """Return the nats per token of the right text, weighted by its tokens, as a ratio's influence is."""
        return ExampleValues("nats_per_token", ratio_values(*self.module.nats_and_tokens(outs)), higher_is_better=False)
