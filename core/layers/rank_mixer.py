"""``RankMixerLayer``: an example as tokens that exchange parts of themselves, each with a network of its own."""

from __future__ import annotations

import math
from typing import Any, cast

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from .. import kernels
from ..dispatch import split_pairs
from ..experts import Experts
from ..experts.products import autocast_together, init_linear_
from ..routing.multi_gate import GateRouters
from ..routing.router import Router
from .multi_gate import Examples, MultiGateLayer


class FeatureTokens(nn.Module):
    """Cuts an example's vector into P parts of equal width, the last one filled with zeros, and maps each to a token by
    a linear layer of its own (RankMixer, arXiv 2507.15551, section 3.2).

    Parameters: ``weight`` (P, ceil(D / P), H) and ``bias`` (P, H).
    """

    def __init__(self, dim: int, num_tokens: int, token_dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_tokens, math.ceil(dim / num_tokens), token_dim))
        self.bias = nn.Parameter(torch.empty(num_tokens, token_dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_linear_(self.weight, self.bias)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Map (T, D) to (T, P, H)."""
        kernels.check_devices(x_TD, type(self).__name__, self._parameters)
        x_TD, weight, bias = autocast_together(x_TD, self.weight, self.bias)
        P, width, _ = weight.shape
        parts_PTW = F.pad(x_TD, (0, P * width - x_TD.shape[1])).unflatten(1, (P, width)).transpose(0, 1)
        return torch.baddbmm(bias[:, None], parts_PTW, weight).transpose(0, 1)


def mix_tokens(x_TPH: Tensor) -> Tensor:
    """Return P tokens, the h-th of which joins the h-th of P heads of every token: (T, P, H) to (T, P, H), without a
    parameter (RankMixer, equations 3 to 5)."""
    P = x_TPH.shape[1]
    return x_TPH.unflatten(2, (P, -1)).transpose(1, 2).flatten(2)


class RankMixerLayer(MultiGateLayer):
    """Blocks of token mixing and of networks for each token: see ``core.RankMixer``. All tasks get the same output.

    With routers an entry of the tape, ``<layer>.level0.token0.tasks``, has the experts of one token in one block.

    Args:
        tokens: makes the tokens of an example.
        experts: for each block, those of the first token, then those of the second, and so on.
        routers: the routers of the first block's tokens, then of the second's; none if each token has one network.
        num_tasks: t.
        pairs_per_token: experts of a token on average, for ``active_params``.
        options: ``balance`` and ``dim``, as in ``MultiGateLayer``.
    """

    router: GateRouters
    experts: nn.ModuleList  # type: ignore[assignment]

    def __init__(
        self,
        tokens: FeatureTokens,
        experts: list[Experts],
        routers: list[Router],
        num_tasks: int,
        pairs_per_token: float,
        **options: Any,
    ) -> None:
        super().__init__(num_tasks, **options)
        self.tokens, self.experts, self.router = tokens, nn.ModuleList(experts), GateRouters(routers)
        self.num_tokens, width = tokens.bias.shape
        self.pairs_per_token = pairs_per_token
        self.mixing_norms, self.ffn_norms = (nn.ModuleList([nn.LayerNorm(width) for _ in experts]) for _ in range(2))

    def _compute(self, examples: Examples) -> Tensor:
        x_TPH = self.tokens(examples.x_TD)
        for level, part in enumerate(self.experts):
            experts = cast(Experts, part)
            x_TPH = self.mixing_norms[level](mix_tokens(x_TPH) + x_TPH)
            if len(self.router):
                y_TPH = self._routed(level, experts, x_TPH, examples)
            else:
                y_TPH = experts(x_TPH.transpose(0, 1), "each", (1,) * self.num_tokens, examples.real_T)
            x_TPH = self.ffn_norms[level](x_TPH + y_TPH)
        return x_TPH.mean(1).expand(self.num_tasks, -1, -1)

    def _routed(self, level: int, experts: Experts, x_TPH: Tensor, examples: Examples) -> Tensor:
        """Return the sum of each token's chosen experts, (T, P, H), all of a block in one dispatch."""
        T, P, _ = x_TPH.shape
        E = experts.num_experts // P
        token_N, ids_N, gates_N = [], [], []
        for i in range(P):
            end, router = f"level{level}.token{i}.tasks", self.router[level * P + i]
            seen_BSH = x_TPH[:, i].unflatten(0, examples.x_BSD.shape[:2])
            routing = router(seen_BSH, examples.context)
            self.record_pass(routing, examples.context, end=end, router=router)
            ids = routing.expert_ids_N
            ids_N.append(torch.where(ids == E, P * E, ids + i * E))
            token_N.append(routing.token_index_N * P + i)
            gates_N.append(routing.gates_N)
        at_N, expert_N = torch.cat(token_N), torch.cat(ids_N)
        pairs = split_pairs(at_N, expert_N, kernels.count_experts(expert_N, P * E))
        y_NH = self.dispatcher.combine(experts(self.dispatcher.dispatch(x_TPH.flatten(0, 1), pairs)))
        sum_dtype = kernels.accumulate_dtype(y_NH.dtype)
        weighted_NH = torch.cat(gates_N).to(sum_dtype)[:, None] * y_NH.to(sum_dtype)
        y_VH = weighted_NH.new_zeros(T * P, y_NH.shape[1]).index_add(0, at_N, weighted_NH)
        return y_VH.to(y_NH.dtype).unflatten(0, (T, P))

    def routers(self) -> dict[str, Router]:
        names = [f"level{level}.token{i}.tasks" for level in range(len(self.experts)) for i in range(self.num_tokens)]
        return {name: self.router[i] for i, name in enumerate(names)} if len(self.router) else {}

    def names_entry(self, end: str) -> bool:
        return end in self.routers()

    def active_expert_params(self) -> int:
        """Return the parameters of the experts that one example touches on average, one or more of each token."""
        per_token = sum(cast(Experts, part).num_experts for part in self.experts) / len(self.experts) / self.num_tokens
        return round(self.all_expert_params() * min(self.pairs_per_token / per_token, 1.0))
