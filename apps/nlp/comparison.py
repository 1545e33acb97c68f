"""What a text model is compared with, where it may start with published weights."""

from __future__ import annotations

from collections.abc import Mapping
from typing import Any

import core
from apps.equal_cost.comparison import Baseline
from apps.nlp.decode.comparison import WritingComparison


class TextComparison(WritingComparison):
    """A ``TextModule`` as a comparison sees it."""

    def with_moe(self, moe: core.MoEConfig) -> Any:
        if self.module.pretrained is not None:
            raise ValueError(
                f"pretrained={self.module.pretrained!r} has the weights of its own experts alone: no others are "
                "compared"
            )
        return super().with_moe(moe)

    def baselines(self) -> Mapping[str, Baseline]:
        twins = super().baselines()
        if self.module.pretrained is None:
            return twins
        note = f"the weights of pretrained={self.module.pretrained} are of the sparse model alone"
        return {name: Baseline(None, note) for name in twins}
