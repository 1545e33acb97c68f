"""``AttentionMoE``: a layer whose experts are attention heads, which routes once and uses the routing twice."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ..contract import Routing, RoutingContext
from ..contract.checks import check_tensor
from ..dispatch import split_pairs
from ..experts.attention import AttentionHeads
from ..kernels import Linear
from .moe import MoE

Attend = Callable[[Tensor, Tensor, Tensor], Tensor]
"""Maps queries (B, S, P, h, d) of P chosen experts a token, and keys and values (B, S, h, d), to attended values like
the queries."""


class AttentionMoE(MoE):
    """Attention whose heads are chosen token by token (MoA, arXiv 2210.05144; JetMoE, arXiv 2404.07413).

        y_t = sum over its experts of g_e(t) softmax(q_e(t) K^T / sqrt(d)) V w_out_e,    q_e(t) = x_t w_q_e

    Keys and values are projected once for all experts. The router decides once: the chosen experts make queries of a
    token, each attends over the token's own sequence, and the same experts map the attention output back. A token that
    no expert computes comes out zero. ``MoEConfig`` builds the layer from ``AttentionExperts``.

    Args:
        router, experts, balance, dispatcher, expert_output_masking, pairs_per_token, dim: as in ``MoE``; with gates on
            the input, the gates scale the token that makes the queries.
        shared_experts, shared_gate: None.

    Attributes:
        causal: a token attends to itself and those before it; ``MoEConfig.build(causal=True)`` sets it.
        kv: the projection to keys and values, in this order.
    """

    experts: AttentionHeads
    own_terms = frozenset()

    def __init__(self, *args: Any, dim: int, **options: Any) -> None:
        super().__init__(*args, dim=dim, **options)
        self.causal = False
        self.kv = Linear(dim, 2 * self.experts.heads_per_expert * self.experts.head_dim, bias=False)

    def forward(
        self,
        x: Tensor,
        context: RoutingContext | None = None,
        *,
        mask: Tensor | None = None,
        attend: Attend | None = None,
        seen: Tensor | None = None,
    ) -> Tensor:
        """Run the layer.

        Args:
            x: (..., S, D), at least two dimensions; (S, D) is one sequence.
            context: as in ``MoE.forward``. No token attends to padding, which comes out zero.
            mask: bool (S, S) or (B, S, S), True where a query (the first S) may see a key; None: all.
            attend: computes the attention instead of the layer, which then heeds neither ``mask`` nor ``causal`` nor
                the padding: for positions in queries and keys, or keys of earlier tokens that are kept.
            seen: shaped as ``x``, the source of keys and values, finite also for padding tokens; None: ``x``.

        Returns:
            (..., S, D_out).

        Raises:
            ValueError: as ``MoE.forward``, ``mask`` has another shape or is not bool, or ``seen`` has another shape.
        """
        x_BSD = self._sequences(x, context)
        B, S, _ = x_BSD.shape
        _check_mask(mask, B, S)
        if seen is not None and seen.shape != x.shape:
            raise ValueError(f"seen has shape {tuple(seen.shape)}, the tokens {tuple(x.shape)}")
        routing = self.router(x_BSD, context)
        self.record_pass(routing, context)
        valid_BS = None if context is None else context.valid_BS
        if valid_BS is not None:
            # Padding may hold NaN, which would reach the keys' weights and, times 0, the attended values.
            x_BSD = x_BSD.masked_fill(~valid_BS[..., None], 0.0)

        q_NC = self._queries(x_BSD.flatten(0, 1), routing)
        P, place_N = _places(routing, self.num_experts)
        h, d = self.experts.heads_per_expert, self.experts.head_dim
        if place_N is not None:
            q_NC = q_NC.new_zeros(B * S * P, h * d).index_add(0, place_N, q_NC)
        seen_BSD = x_BSD if seen is None else seen.reshape(x_BSD.shape)
        k_BShd, v_BShd = self.kv(seen_BSD).unflatten(-1, (2, h, d)).unbind(2)
        q_BSPhd = q_NC.view(B, S, P, h, d)
        if attend is None:
            y_BSPhd = attention(q_BSPhd, k_BShd, v_BShd, valid_BS, mask, self.causal)
        else:
            y_BSPhd = attend(q_BSPhd, k_BShd, v_BShd)
        y_NC = y_BSPhd.reshape(B * S * P, h * d)
        if place_N is not None:
            y_NC = y_NC.index_select(0, place_N)
        y_TD = self._outputs(y_NC, routing)
        return y_TD.reshape(*x.shape[:-1], y_TD.shape[-1])

    def _queries(self, x_TD: Tensor, routing: Routing) -> Tensor:
        """Return the query of each pair, (N, h * d); zero where it is not computed."""
        pairs = split_pairs(routing.token_index_N, routing.expert_ids_N, routing.tokens_per_expert_E)
        if self.router.gates_on == "input":
            rows = self.dispatcher.dispatch(x_TD, replace(pairs, gates_N=routing.gates_N)).weighted_input()
        else:
            rows = self.dispatcher.dispatch(x_TD, pairs)
        return self.dispatcher.combine(self.experts(rows, "queries"))

    def _outputs(self, y_NC: Tensor, routing: Routing) -> Tensor:
        """Return the tokens' sums over their pairs' attention outputs, mapped back and weighted: (T, D_out)."""
        N = routing.expert_ids_N.shape[0]
        rows = self.dispatcher.dispatch(y_NC, replace(routing, input_index_N=torch.arange(N, device=y_NC.device)))
        if self.router.gates_on == "input":
            rows = replace(rows, gates_R=torch.ones_like(rows.gates_R))
        if self.training and self.expert_output_masking:
            rows = replace(rows, gates_R=F.dropout(rows.gates_R, self.expert_output_masking))
        return self.dispatcher.combine(self.experts(rows, "outputs"))


def _places(routing: Routing, num_experts: int) -> tuple[int, Tensor | None]:
    """Return how many queries a token has room for, P, and the place of each pair among T * P, int64 (N,).

    It is None if the pairs are in this order already. If tokens take unequal numbers of experts, each has room for
    all: a host that counted would wait for the device.
    """
    if routing.top_k is not None:
        return routing.top_k, None
    # A pair that is not computed has the id E: its zero query may be added anywhere.
    expert_N = routing.expert_ids_N.clamp_max(num_experts - 1)
    return num_experts, routing.token_index_N * num_experts + expert_N


def attention(
    q_BSPhd: Tensor, k_BShd: Tensor, v_BShd: Tensor, valid_BS: Tensor | None, mask: Tensor | None, causal: bool
) -> Tensor:
    """Return ``softmax(q k^T / sqrt(d)) v`` of P queries a token, as ``Attend`` does.

    Args:
        q_BSPhd, k_BShd, v_BShd: as in ``Attend``.
        valid_BS: bool, False for keys that no query sees; None: all may be seen. If none is left to a query, it
            attends to all alike.
        mask: bool (S, S) or (B, S, S), True where a query may see a key.
        causal: a query sees the keys up to its own position.
    """
    S, P, h, d = q_BSPhd.shape[1:]
    q = q_BSPhd.permute(0, 3, 2, 1, 4).flatten(1, 2)
    k, v = (x_BShd.transpose(1, 2).repeat_interleave(P, 1) for x_BShd in (k_BShd, v_BShd))
    seen = None if mask is None else mask.reshape(-1, 1, S, S)
    if valid_BS is not None:
        seen = valid_BS[:, None, None] if seen is None else seen & valid_BS[:, None, None]
    if causal and seen is not None:
        seen = seen & torch.ones(S, S, dtype=torch.bool, device=q.device).tril()
    bias = None
    if seen is not None:
        # Not -inf: a sequence of only padding would become NaN.
        bias = torch.zeros(seen.shape, dtype=q.dtype, device=q.device).masked_fill(~seen, torch.finfo(q.dtype).min)
        bias = bias.expand(-1, -1, S, -1)
    y = F.scaled_dot_product_attention(q, k, v, attn_mask=bias, is_causal=causal and bias is None, scale=d**-0.5)
    return y.unflatten(1, (h, P)).permute(0, 3, 2, 1, 4)


def _check_mask(mask: Tensor | None, B: int, S: int) -> None:
    if mask is None:
        return
    check_tensor("mask", mask)
    if mask.dtype != torch.bool:
        raise ValueError(f"mask is {mask.dtype}: it must be bool, True where a query may see a key")
    if tuple(mask.shape) not in ((S, S), (B, S, S)):
        raise ValueError(f"mask has shape {tuple(mask.shape)}, for {B} sequences of {S} tokens: (S, S) or (B, S, S)")
