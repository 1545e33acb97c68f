"""``average_experts`` makes one expert of a layer's, whose parameters are the mean of theirs."""

from __future__ import annotations

import copy

import torch
from torch import Tensor, nn

from ..contract import RoutingContext
from ..experts import Experts, check_merges
from ..layers import MoE, SharedGate


class OneExpert(nn.Module):
    """A layer of one expert for every token, with the shared experts and the output's bias of the layer before.

    Args:
        expert: experts, of which there is one.
        shared_experts, shared_gate, output_bias: as in ``MoE``; None: there is none.
    """

    def __init__(
        self,
        expert: Experts,
        shared_experts: Experts | None = None,
        shared_gate: SharedGate | None = None,
        output_bias: nn.Parameter | None = None,
    ) -> None:
        super().__init__()
        self.expert, self.shared_experts, self.shared_gate = expert, shared_experts, shared_gate
        self.output_bias = output_bias

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Return (..., D) tokens after the expert, (..., D_out); the context, which a MoE layer gets, is not read."""
        y: Tensor = self.expert(x, "dense")
        if self.shared_experts is not None:
            shared = self.shared_experts(x, "dense")
            y = y + shared if self.shared_gate is None else self.shared_gate.combine(self.shared_gate(x), y, shared)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)


@torch.no_grad()
def average_experts(layer: MoE) -> OneExpert:
    """Return the dense layer of one expert whose parameters are the mean of all experts' (AdaMix, arXiv 2205.12410).

    The parameters are copies. For ``Random(evaluation="merged")`` it is the layer's evaluation, at the cost of one
    expert; of experts that were not trained at random, a mean may be no good expert.

    Args:
        layer: a layer whose experts compute rows and can be merged.

    Raises:
        ValueError: another module, experts that cannot be merged, or that are split over ranks.

    Example::

        block.mlp = core.average_experts(block.mlp)
    """
    if not isinstance(layer, MoE):
        raise ValueError(f"a {type(layer).__name__} has no experts to average: core.MoE and its subclasses do")
    check_merges(layer.experts)
    if layer.experts.num_local_experts != layer.num_experts:
        here = f"{layer.experts.num_local_experts} of {layer.num_experts}"
        raise ValueError(f"{here} experts are here: they are averaged before they are split over ranks")
    expert, shared = copy.deepcopy(layer.experts), copy.deepcopy((layer.shared_experts, layer.shared_gate))
    for module in expert.modules():
        for name, stacked in list(module._parameters.items()):
            if stacked is not None:
                mean = stacked.mean(0, keepdim=True)
                setattr(module, name, nn.Parameter(mean, requires_grad=stacked.requires_grad))
    expert.num_experts = 1
    return OneExpert(expert, *shared, copy.deepcopy(layer.output_bias)).train(layer.training)
