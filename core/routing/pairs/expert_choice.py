"""Expert choice (arXiv 2202.09368): the experts choose their tokens, each the same number of them."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract import Evidence, Routing, RoutingContext, span
from ...fields import Count, Positive
from ...kernels.eager import capacity as capacity_of, check_devices, count_experts, outside_autocast, whole_ratio
from ..gates import LinearGate
from ..router import LinearGateConfig, Router, Tokens
from ..selection import Capacity

THRESHOLD_DECAY = 0.95
"""Decay of the moving average of the thresholds, per step, as in DiffMoE."""


class CapacityPredictor(nn.Module):
    """Foretells from a token which experts take it: ``W2 silu(W1 x)`` (DiffMoE, arXiv 2503.14487)."""

    def __init__(self, dim: int, hidden_dim: int, num_experts: int, init_scale: float) -> None:
        super().__init__()
        self.hidden = LinearGate(dim, hidden_dim, 1.0)
        self.output = LinearGate(hidden_dim, num_experts, init_scale)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return logits (T, E) of float32 (T, D) tokens."""
        return self.output(F.silu(self.hidden(x_TD)))  # type: ignore[no-any-return]


class ExpertChoiceRouter(Router):
    """Each expert takes its best tokens of each group. Built by ``ExpertChoice``.

    Attributes:
        predictor: with ``predictor_dim``, module that foretells the choice; else None.
        threshold: float32 (E,) buffer, the predicted probability from which an expert takes a token in evaluation.
    """

    predictor: CapacityPredictor | None
    threshold: Tensor

    def __init__(self, dim: int, num_experts: int, config: ExpertChoice, capacity: Capacity) -> None:
        super().__init__()
        self.num_experts, self.config, self.capacity = num_experts, config, capacity
        self.extra_weights = config.extra_weights
        self.terms = config.terms | frozenset(self.extra_weights)
        self.predictor = None
        if config.predictor_dim is not None:
            self.predictor = CapacityPredictor(dim, config.predictor_dim, num_experts, config.init_scale)
            self.register_buffer("threshold", torch.full((num_experts,), 0.5))
            self.num_counts = num_experts + 1
        self.gate = LinearGate(dim, num_experts, config.init_scale)
        # Integers, made here: under ``torch.compile(dynamic=True)`` a float cannot be read digit by digit.
        self.ratio = whole_ratio(config.capacity_factor)

    @span("moe.router")
    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        """Return ``groups * E * C`` pairs, group by group and expert by expert, the best token first."""
        with outside_autocast(x.device):
            tokens = Tokens.of(x, context)
            logits_TE = tokens.logits(self.gate)
            if self.predictor is not None and not self.training:
                check_devices(logits_TE, type(self).__name__, self._buffers)
                taken_TE = self.predictor(tokens.x_TD).sigmoid() >= self.threshold
                return pairs_of(taken_TE & tokens.real_T[:, None], logits_TE, tokens)
            routing = choose_tokens(
                logits_TE,
                self.ratio,
                group=self.capacity.group,
                num_sequences=tokens.num_sequences,
                length=tokens.length,
                valid_T=tokens.valid_T,
            )
            return routing if self.predictor is None else self._foretold(routing, tokens, self.predictor)

    def _foretold(self, routing: Routing, tokens: Tokens, predictor: CapacityPredictor) -> Routing:
        """Return the choice with the predictor's loss, and the thresholds at which it would take as many tokens."""
        T, E = len(tokens.x_TD), self.num_experts
        # Detached: the predictor follows the choice and does not change what it predicts from.
        logits_TE = predictor(tokens.x_TD.detach())
        taken_TE = torch.zeros(T, E + 1, device=logits_TE.device, dtype=logits_TE.dtype)
        taken_TE = taken_TE.index_put((routing.token_index_N, routing.expert_ids_N), taken_TE.new_ones(()))[:, :E]
        loss_T = F.binary_cross_entropy_with_logits(logits_TE, taken_TE, reduction="none").mean(-1)
        falling_TE = logits_TE.detach().sigmoid().masked_fill(~tokens.real_T[:, None], 0.0).sort(0, descending=True)[0]
        last_1E = (routing.tokens_per_expert_E - 1).clamp(0, max(T - 1, 0))[None]
        at_last_E = falling_TE.gather(0, last_1E)[0] if T else falling_TE.new_zeros(E)
        counts = torch.cat((at_last_E, tokens.real_T.any().to(at_last_E.dtype).reshape(1))).float()
        extra = {"capacity_predictor": loss_T}
        return replace(routing, evidence=replace(routing.evidence, extra=extra, counts=counts))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.predictor is not None:
            self.threshold.fill_(0.5)

    @torch.no_grad()
    def after_counts(self, counts: Tensor) -> None:
        passes = counts[-1]
        moved_E = self.threshold.lerp(counts[:-1] / passes.clamp_min(1), 1 - THRESHOLD_DECAY)
        # In place: a compiled layer and a captured graph see the same buffer.
        self.threshold.copy_(torch.where(passes > 0, moved_E, self.threshold))

    def _apply(self, fn: Any, recurse: bool = True) -> ExpertChoiceRouter:
        before = self.threshold if self.predictor is not None else None
        super()._apply(fn, recurse)
        if before is not None and self.threshold.dtype != before.dtype:
            # In bfloat16 the small steps of an average would vanish: keep the dtype, and the value unrounded.
            self.threshold = before.to(self.threshold.device)
        return self


def pairs_of(taken_TE: Tensor, logits_TE: Tensor, tokens: Tokens) -> Routing:
    """Return the pairs of tokens with the experts that take them, with the softmax over all experts as gates.

    Args:
        taken_TE: bool (T, E); False for padding.
        logits_TE: float32 (T, E).
        tokens: the tokens.
    """
    T, E = logits_TE.shape
    scores_TE, expert_E = logits_TE.softmax(-1), torch.arange(E, device=logits_TE.device)
    tokens_E = taken_TE.sum(0)
    return Routing(
        token_index_N=torch.arange(T, device=logits_TE.device).repeat_interleave(E),
        expert_ids_N=torch.where(taken_TE, expert_E, E).flatten(),
        gates_N=scores_TE.masked_fill(~taken_TE, 0.0).flatten(),
        tokens_per_expert_E=tokens_E,
        chosen_per_expert_E=tokens_E,
        num_tokens=T,
        top_k=E,
        valid_T=tokens.valid_T,
        num_sequences=tokens.num_sequences,
        evidence=Evidence(scores_TE, logits_TE),
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

    With ``predictor_dim`` it is DiffMoE (arXiv 2503.14487): the group is the batch, and an MLP learns which experts
    take a token, by binary cross-entropy and without a gradient to the token. In evaluation an expert takes the tokens
    whose predicted probability reaches its threshold, a moving average of the one at which it would have taken as many
    in training: no token depends on another one.

    Attributes:
        capacity_factor: experts that compute a token, on average. It takes the place of ``MoEConfig.capacity_factor``.
        init_scale: variance of the gate's initial weights times D.
        predictor_dim: hidden dim of the predictor; None: there is none, and tokens compete in evaluation too.
    """

    paper = "2202.09368"
    router_class = ExpertChoiceRouter
    terms = frozenset({"router_z_loss"})
    is_causal = False
    layer_options = frozenset({"backend"})

    capacity_factor: Positive = 2.0
    init_scale: Positive = 0.1
    predictor_dim: Count | None = None

    @property
    def default_group(self) -> str:
        return "sequence" if self.predictor_dim is None else "batch"

    @property
    def depends_on(self) -> str:
        return "sequence" if self.predictor_dim is None else "token"

    @property
    def can_grow(self) -> bool:
        return self.predictor_dim is None

    @property
    def extra_weights(self) -> dict[str, float]:
        # Nothing else learns from this loss: its weight is no matter of balance.
        return {} if self.predictor_dim is None else {"capacity_predictor": 1.0}

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

    def num_params(self, dim: int, num_experts: int) -> int:
        return super().num_params(dim, num_experts) + (self.predictor_dim or 0) * (dim + num_experts)

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return super().flops_per_token(dim, num_experts) + 2 * (self.predictor_dim or 0) * (dim + num_experts)
