"""A small network with one MoE layer, and a training of it in which a fault can be planted."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core

VOCAB, DIM, LENGTH, CLASSES, PAD = 33, 16, 8, 8, 0


class Patient(nn.Module):
    """Tokens to classes: embedding and place, a linear layer, an MoE layer beside a residual, and the classes.

    Args:
        moe: the layer; None: there is none.
        heed_padding: tell the layer which tokens are padding.
    """

    def __init__(self, moe: core.MoEConfig | None, heed_padding: bool = True) -> None:
        super().__init__()
        self.heed_padding = heed_padding
        self.embed, self.place = nn.Embedding(VOCAB, DIM), nn.Parameter(0.3 * torch.randn(LENGTH, DIM))
        self.mix, self.norm = nn.Linear(DIM, DIM), nn.LayerNorm(DIM)
        self.moe = nn.Identity() if moe is None else moe.build(DIM)
        self.head = nn.Linear(DIM, CLASSES)

    def forward(self, ids: Tensor) -> Tensor:
        x = self.embed(ids) + self.place
        x = self.norm(x + F.gelu(self.mix(x)))
        if isinstance(self.moe, nn.Identity):
            return self.head(x)
        context = core.RoutingContext(valid_BS=ids != PAD) if self.heed_padding else None
        return self.head(x + self.moe(x, context))


def task_loss(net: Any, ids: Tensor) -> Tensor:
    """Return the cross entropy of the classes, which are the ids in another order; padding has none."""
    target = (5 * ids + ids // 3) % CLASSES
    return F.cross_entropy(net(ids).flatten(0, 1), target.masked_fill(ids == PAD, -100).flatten())


def whole_loss(net: Any, ids: Tensor, times: int = 1) -> Tensor:
    """Return the task's loss with the balance losses, added so many times."""
    with core.record(net) as tape:
        loss = task_loss(net, ids)
    return loss + times * core.aux_loss(tape)


def batches(count: int, padded: bool = False, seed: int = 0) -> list[Tensor]:
    """Return batches of 16 sequences of ids; with ``padded`` the last three tokens of each are padding."""
    draw = torch.Generator().manual_seed(seed)
    made = [torch.randint(1, VOCAB, (16, LENGTH), generator=draw) for _ in range(count)]
    if padded:
        for ids in made:
            ids[:, -3:] = PAD
    return made


@dataclass
class Training:
    """A short training by Adam.

    Attributes:
        moe: the layer.
        steps: number of steps.
        lr, router_lr, expert_lr: learning rates; None: ``lr``; 0 leaves the weights out of the optimizer.
        plant: changes the network before the first step.
        loss: what a step minimizes.
        padded, heed_padding: as in ``batches`` and ``Patient``.
    """

    moe: core.MoEConfig
    steps: int = 40
    lr: float = 3e-3
    router_lr: float | None = None
    expert_lr: float | None = None
    plant: Callable[[Patient], None] | None = None
    loss: Callable[[Any, Tensor], Tensor] = whole_loss
    padded: bool = False
    heed_padding: bool = True

    def run(self) -> tuple[Patient, core.TrainingStart]:
        """Return the trained network, and its weights at the start."""
        torch.manual_seed(0)
        net = Patient(self.moe, self.heed_padding)
        if self.plant is not None:
            self.plant(net)
        start = core.TrainingStart(net)
        groups: list[dict[str, Any]] = []
        of_part = {id(p): self.router_lr for p in net.moe.router.parameters()}
        of_part |= {id(p): self.expert_lr for p in net.moe.experts.parameters()}
        for p in net.parameters():
            rate = of_part.get(id(p))
            rate = self.lr if rate is None else rate
            if rate:
                groups.append({"params": [p], "lr": rate})
        optimizer = torch.optim.Adam(groups)
        for ids in batches(self.steps, self.padded, seed=1):
            optimizer.zero_grad()
            with core.record(net) as tape:
                loss = self.loss(net, ids)
            loss.backward()
            optimizer.step()
            core.update_expert_bias(net, tape)
        return net, start

    def findings(self, **options: Any) -> list[core.Finding]:
        """Return the diagnosis of the trained network."""
        net, start = self.run()
        real = (lambda ids: ids != PAD) if self.padded else None
        given = {"loss": self.loss, "start": start, "real": real, **options}
        return core.diagnose(net, batches(8, self.padded, seed=2), **given)
