"""Ranks that share experts, in a loop whose number of steps differs from rank to rank."""

from __future__ import annotations

import torch
import torch.distributed as dist
from torch import nn

from ..layers import moe_layers
from .all_to_all import AllToAllDispatcher


class InStep:
    """Keeps ranks that share the experts of a model in step, since all of them call a layer together.

    A rank that has no work left calls the model with padding, until all of them are done. Without sharded experts it
    sends nothing and waits for nobody.

    Args:
        model: any module.

    Example::

        ranks = InStep(model)
        while work:
            ranks.go_on(True)
            work = step(model, work)
        while ranks.go_on(False):
            step(model, padding)
    """

    def __init__(self, model: nn.Module) -> None:
        dispatchers = (layer.dispatcher for layer in moe_layers(model).values())
        divided = (d for d in dispatchers if isinstance(d, AllToAllDispatcher))
        self._groups = list(dict.fromkeys(d.group for d in divided if d.group is not None))
        device = next((p.device for p in model.parameters()), torch.device("cpu"))
        self._flag = torch.zeros((), dtype=torch.int32, device=device)

    def go_on(self, here: bool) -> bool:
        """Return whether any rank takes a further step, which every one of them then takes.

        Args:
            here: whether this rank has work left.
        """
        if not self._groups:
            return here
        self._flag.fill_(here)
        for group in self._groups:
            dist.all_reduce(self._flag, dist.ReduceOp.MAX, group=group)
        return bool(self._flag) if not here else True
