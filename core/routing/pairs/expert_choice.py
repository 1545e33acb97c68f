"""Expert choice (arXiv 2202.09368): the experts choose their tokens, each the same number of them."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor

from ...contract import Evidence, Routing, RoutingContext, span
from ...fields import Positive
from ...kernels.eager import capacity as capacity_of, count_experts, outside_autocast, whole_ratio
from ..gates import LinearGate
from ..router import LinearGateConfig, Router, Tokens
from ..selection import Capacity


class ExpertChoiceRouter(Router):
    """Each expert takes its best tokens of each group. Built by ``ExpertChoice``."""

    def __init__(self, dim: int, num_experts: int, config: ExpertChoice, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config, self.capacity = num_experts, config, capacity
        self.terms = config.terms
        self.gate = LinearGate(dim, num_experts, config.init_scale)
        # Integers, made here: under ``torch.compile(dynamic=True)`` a float cannot be read digit by digit.
        self.ratio = whole_ratio(config.capacity_factor)

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Return ``groups * E * C`` pairs, group by group and expert by expert, the best token first."""
        with outside_autocast(x.device):
            tokens = Tokens.of(x, context)
            logits_TE = tokens.logits(self.gate)
            return choose_tokens(
                logits_TE,
                self.ratio,
                group=self.capacity.group,
                num_sequences=tokens.num_sequences,
                length=tokens.length,
                valid_T=tokens.valid_T,
            )


def choose_tokens(
    logits_TE: Tensor,
    ratio: tuple[int, int],
    *,
    group: str | int,
    num_sequences: int,
    length: int,
    valid_T: Tensor | None,
) -> Routing:
    """Let every expert take its ``ceil(factor * n / E)`` best of the n non-padding tokens of each group.

    Of equal scores the earlier token is taken. The scores are the softmax over the experts, and are the gates too.

    Args:
        logits_TE: float32 (T, E), T = ``num_sequences * length``.
        ratio: the capacity factor as a ratio of integers, ``whole_ratio(factor)``.
        group: "sequence", "batch", or a number of neighboring tokens.
        num_sequences: B.
        length: S.
        valid_T: bool (T,), False for padding.
    """
    T, E = logits_TE.shape
    device = logits_TE.device
    scores_TE = logits_TE.softmax(-1)
    real_T = torch.ones(T, dtype=torch.bool, device=device) if valid_T is None else valid_T
    if group == "sequence":
        G, size = num_sequences, length
    elif group == "batch":
        G, size = 1, T
    else:
        size = int(group)
        G = -(-T // size)
    # Padding fills up a last, shorter group.
    missing = G * size - T
    real_GS = F.pad(real_T, (0, missing)).reshape(G, size)
    scores_GSE = F.pad(scores_TE, (0, 0, 0, missing)).reshape(G, size, E)
    # No expert takes more than all tokens; comparing integers asks nothing of the token count.
    whole = ratio[0] >= ratio[1] * E
    C: Any = size if whole else capacity_of(ratio, 1, size, E)
    count_G = real_GS.sum(1)
    capacity_G = count_G if whole else capacity_of(ratio, 1, count_G, E)
    # Below every score: padding comes last, and there are enough real tokens before it.
    ranked_GSE = scores_GSE.detach().masked_fill(~real_GS[:, :, None], -1.0)
    best_first_GSE = ranked_GSE.argsort(dim=1, descending=True, stable=True)
    # An index and not a slice: torch.export cannot prove that C is at most the length.
    chosen_GEC = best_first_GSE.index_select(1, torch.arange(C, device=device)).transpose(1, 2)
    gates_GEC = scores_GSE.transpose(1, 2).gather(2, chosen_GEC)
    taken_GEC = torch.arange(C, device=device) < torch.as_tensor(capacity_G)[:, None, None]
    expert_ids_GEC = torch.where(taken_GEC, torch.arange(E, device=device)[:, None], E)
    token_GEC = chosen_GEC + torch.arange(G, device=device)[:, None, None] * size
    expert_ids_N = expert_ids_GEC.flatten()
    tokens_E = count_experts(expert_ids_N, E)
    return Routing(
        # A place that is not taken points to a token of the batch all the same.
        token_index_N=token_GEC.flatten().clamp_max(T - 1),
        expert_ids_N=expert_ids_N,
        gates_N=gates_GEC.masked_fill(~taken_GEC, 0.0).flatten(),
        tokens_per_expert_E=tokens_E,
        chosen_per_expert_E=tokens_E,
        num_tokens=T,
        valid_T=valid_T,
        num_sequences=num_sequences,
        most_per_expert=chosen_GEC.shape[0] * chosen_GEC.shape[2],
        evidence=Evidence(scores_TE, logits_TE),
    )


@dataclass(frozen=True)
class ExpertChoice(LinearGateConfig):
    """Each expert takes the ``ceil(capacity_factor * n / E)`` of a group's n non-padding tokens that score highest with
    it (arXiv 2202.09368, section 3.2, without its limit of experts per token).

    A token is computed by 0 to E experts, ``capacity_factor`` on average. The load is even by construction, so no
    balance loss applies but ``router_z_loss``. A token's experts depend on all tokens of its group, so it is not for
    causal decoders. The group is the sequence if ``MoEConfig.group`` does not say.

    The softmax over one expert is 1 for every token. With ``num_experts=1`` the router therefore gets no gradient: the
    layer is the expert itself if ``capacity_factor`` is 1 or more, and raises an error below 1, when the expert would
    take the earliest tokens whatever they are.

    Attributes:
        capacity_factor: experts that compute a token, on average. It takes the place of ``MoEConfig.capacity_factor``.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2202.09368"
    router_class = ExpertChoiceRouter
    terms = frozenset({"router_z_loss"})
    is_causal = False
    default_group = "sequence"
    layer_options = frozenset({"backend"})

    capacity_factor: Positive = 2.0
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        if num_experts == 1 and self.capacity_factor < 1:
            raise ValueError(
                f"capacity_factor={self.capacity_factor} with num_experts=1 would take the earliest tokens: "
                "the softmax over one expert is 1 for every token, and its router gets no gradient"
            )

    def pairs_per_token(self, num_experts: int) -> float:
        return min(self.capacity_factor, float(num_experts))

    def rows_per_token(self, num_experts: int, tokens_per_group: int | None) -> float:
        if tokens_per_group is None or self.capacity_factor >= num_experts:
            return self.pairs_per_token(num_experts)
        places = capacity_of(whole_ratio(self.capacity_factor), 1, tokens_per_group, num_experts)
        return num_experts * int(places) / tokens_per_group
