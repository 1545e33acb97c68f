"""A layer whose logits can be read off its input, and a model of two layers that may be checkpointed."""

from __future__ import annotations

from collections.abc import Callable

import torch
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

from core import FFN, Balance, MoE, MoEConfig, TokenChoice

BACKENDS = ["eager", "cpu", "grouped", "triton"]
EVERY_TERM = Balance(load_balancing_loss=1.0, router_z_loss=0.1, importance=1.0)


def identity_gate(layer: MoE) -> MoE:
    """Make the logits the first E entries of a token."""
    with torch.no_grad():
        layer.router.gate.weight.copy_(torch.eye(*layer.router.gate.weight.shape))
    return layer


class Net(nn.Module):
    """Two residual MoE blocks, checkpointed as ``mode`` says; ``router`` has options of their routers."""

    def __init__(self, mode: str = "none", backend: str = "auto", **router) -> None:
        super().__init__()
        config = MoEConfig(4, TokenChoice(2, **router), FFN(12), balance=EVERY_TERM, backend=backend)
        self.stem = nn.Linear(8, 8)
        self.blocks = nn.ModuleList([config.build(8), config.build(8)])
        self.mode = mode

    def forward(self, x: Tensor) -> Tensor:
        x = self.stem(x)
        for block in self.blocks:
            run: Callable[[Tensor], Tensor] = block
            if self.mode != "none":
                x = x + checkpoint(run, x, use_reentrant=self.mode == "reentrant")
            else:
                x = x + run(x)
        return x
