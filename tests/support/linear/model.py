"""The network."""

from __future__ import annotations

from torch import nn

import core


def linear(ffn: core.MoEConfig | core.DenseFFN | None) -> nn.Module:
    """Map pixels (B, 1, 8, 8) to logits (B, 10), after an FFN or its experts where there are any."""
    return nn.Sequential(nn.Flatten(), *([] if ffn is None else [ffn.build(64)]), nn.Linear(64, 10))
