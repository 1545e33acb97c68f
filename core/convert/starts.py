"""What the experts of a sparse layer begin as, given the feed-forward network whose place it takes.

A start is a config with two methods: ``config`` says which experts the layer has, and ``fill`` writes their weights
and, where the method asks for it, the rows of the gate. ``core.sparsify`` does what all have in common: it scales the
outputs by what the gates of a token sum to, and adds noise.
"""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import ClassVar

import torch
from torch import Tensor

from ..config import MoEConfig
from ..experts import FFN
from ..layers import MoE
from ..registry import OpenConfig
from .feed_forward import FeedForwardPart, copy_weights


@dataclass(frozen=True)
class Start(OpenConfig):
    """Base of the starts. A subclass has a ``name``, ``fill``, and where it needs them ``config`` and ``mean_gate``.

    Attributes:
        keeps_output: the sparse layer begins with the output of the dense network, where the gates allow it.
        even_gates: this holds only where all gates of a token are equal.
    """

    name: ClassVar[str] = ""
    keeps_output: ClassVar[bool] = True
    even_gates: ClassVar[bool] = False

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        """Return the config of the layer: ``moe`` with experts of the network's kind and width.

        Raises:
            ValueError: ``moe.expert`` is set, or another option does not go with this start.
        """
        if moe.expert != FFN():
            raise ValueError(
                f"expert={moe.expert}: with start={self.name!r} experts are as the network, {part.expert}: leave "
                "moe.expert at its default, or give start='random'"
            )
        if moe.granularity > 1:
            raise ValueError(
                f"granularity={moe.granularity} makes experts narrower than the network: not with start={self.name!r}"
            )
        if moe.num_shared_experts and (moe.num_shared_experts > 1 or moe.shared_gate != "mix" or moe.shared_expert):
            raise ValueError(
                f"num_shared_experts={moe.num_shared_experts} with shared_gate={moe.shared_gate!r} adds to the "
                f"network's output: start={self.name!r} takes one shared expert of the same kind by shared_gate='mix'"
            )
        shared = part.expert if moe.num_shared_experts else None
        return replace(moe, expert=part.expert, shared_expert=shared)

    def total_gate(self, layer: MoE) -> float:
        """Return what the gates of a token have to sum to so that the layer's output is the network's."""
        return 1.0

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator) -> None:
        """Write the weights of the routed experts, in place.

        Args:
            part: the network.
            layer: the layer of ``config``, on the network's device and in its dtype.
            generator: of the CPU, for what is drawn.
        """
        raise NotImplementedError


@dataclass(frozen=True)
class CopyStart(Start):
    """Every expert is a copy of the network: sparse upcycling (arXiv 2212.05055)."""

    name = "copy"

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator) -> None:
        for e in range(layer.num_experts):
            copy_weights(layer.experts, e, part.weights)


@dataclass(frozen=True)
class RandomStart(Start):
    """Experts begin as they do in a new layer; their kind may be any."""

    name = "random"
    keeps_output = False

    def config(self, moe: MoEConfig, part: FeedForwardPart) -> MoEConfig:
        return replace(moe, expert=part.expert) if moe.expert == FFN() else moe

    def fill(self, part: FeedForwardPart, layer: MoE, generator: torch.Generator) -> None:
        pass


STARTS: dict[str, Start] = {start.name: start for start in (CopyStart(), RandomStart())}
"""The starts with their default options, by name."""


def start_of(start: str | Start) -> Start:
    """Return the start of a name, or a start as it is.

    Raises:
        ValueError: there is none of this name.
    """
    if isinstance(start, Start):
        return start
    if start not in STARTS:
        raise ValueError(f"start={start!r} is not one of {', '.join(STARTS)}")
    return STARTS[start]


def outputs_of(weights: dict[str, Tensor]) -> list[Tensor]:
    """Return the tensors of an expert in which its output is linear: those of the last product."""
    return [weights[name] for name in ("w_out", "b_out") if name in weights]
