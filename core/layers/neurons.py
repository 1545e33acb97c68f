"""``NeuronMoE``: the layer of experts of one neuron each (PEER, arXiv 2407.04153)."""

from __future__ import annotations

from torch import Tensor

from ..contract import Routing, RoutingContext
from ..dispatch import LocalDispatcher
from .moe import MoE


class NeuronMoE(MoE):
    """Mixture of one-neuron experts, ``y_t = sum over its pairs of g act(x_t . u_e) v_e``. Built from ``PEER``.

    Pairs stay in the order of the tokens and nothing is dispatched: sorting a hundred pairs per token by a million
    experts, for matmuls of single rows, would cost more than the matmuls. If rows have to move after all (gates on
    the input, masked outputs, a dispatcher to other ranks, pairs that are not token-major) it is ``MoE``.
    """

    own_terms = frozenset()
    splits_experts = False

    def _compute(self, x_BSD: Tensor, routing: Routing, context: RoutingContext | None) -> Tensor:
        T, K = routing.num_tokens, routing.top_k
        moves = self.router.gates_on == "input" or routing.input_index_N is not None
        moves = moves or (self.training and self.expert_output_masking > 0)
        if K is None or moves or type(self.dispatcher) is not LocalDispatcher:
            return super()._compute(x_BSD, routing, context)
        ids_TK, gates_TK = (t.view(T, K) for t in (routing.expert_ids_N, routing.gates_N))
        y_TD: Tensor = self.experts(x_BSD.flatten(0, 1), "picked", ids_TK, gates_TK)
        return y_TD.unflatten(0, x_BSD.shape[:2])
