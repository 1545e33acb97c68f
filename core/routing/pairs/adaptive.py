"""Routers whose tokens take more or fewer experts, and one that fits the experts' loads to the kernels' tiles."""

from __future__ import annotations

from dataclasses import dataclass, replace
from typing import Annotated, Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract import Evidence, Routing, RoutingContext, span
from ...contract.checks import at_most_experts
from ...fields import Bounds, Count, NotNegative, Positive, PositiveShare
from ...kernels import topk_gate
from ...kernels.eager import capacity_ranks, check_devices, count_experts, outside_autocast, top_k_ids
from ..balance.terms import CHOICE_TERMS, SCORE_TERMS
from ..gates import LinearGate
from ..router import LinearGateConfig, PairRouter, RouterConfig, Tokens
from ..selection import Choice
from .top_k import TopKConfig, TopKRouter


class ThresholdRouter(PairRouter):
    """The router of ``Threshold``: two experts, or one if the second gate is small."""

    config: Threshold

    def choose(self, tokens: Tokens) -> Choice:
        config = self.config
        logits_TE = tokens.logits(self.gate)
        best = topk_gate(logits_TE, 2, valid_T=tokens.valid_T, backend=self.backend)
        expert_ids_TK, chosen_E, g2_T = best.expert_ids_TK, best.chosen_per_expert_E, best.gates_TK[:, 1].detach()
        policy = config.second_expert_policy if self.training else config.eval_second_expert_policy
        if policy != "always":
            # Both policies are sure to keep a second gate of the threshold or more.
            kept_T = g2_T > config.threshold * torch.rand_like(g2_T) if policy == "random" else g2_T >= config.threshold
            second_T = torch.where(kept_T, expert_ids_TK[:, 1], self.num_experts)
            expert_ids_TK, chosen_E = torch.stack((expert_ids_TK[:, 0], second_T), -1), None
        evidence = Evidence(best.scores_TE, logits_TE, sums=best.sums)
        return Choice(expert_ids_TK, best.gates_TK, evidence, chosen_per_expert_E=chosen_E)


@dataclass(frozen=True)
class Threshold(LinearGateConfig):
    """Top-2 whose second expert has to be worth it (ST-MoE, arXiv 2202.08906): in training it is kept with probability
    ``min(1, g_2 / threshold)``, where ``g_1 + g_2 = 1`` before. The first gate is not raised where the second is left
    out. GShard's ``TokenChoice(top_k=2, second_expert_policy="random")`` is a threshold of 1/2.

    The paper's code samples in evaluation too; here evaluation is deterministic.

    Attributes:
        threshold: value that the second gate, at most 1/2, is compared with.
        second_expert_policy: rule in training, "random", or "threshold": the second is kept where ``g_2 >= threshold``.
        eval_second_expert_policy: rule in evaluation, "threshold" or "always".
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2202.08906"
    router_class = ThresholdRouter
    terms = SCORE_TERMS | CHOICE_TERMS | {"router_z_loss"}

    threshold: PositiveShare = 0.2
    second_expert_policy: Literal["random", "threshold"] = "random"
    eval_second_expert_policy: Literal["threshold", "always"] = "threshold"
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"Threshold takes up to 2 experts, num_experts={num_experts} has no second one")

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the most; how many tokens keep their second expert is learned."""
        return 2.0


class NullExpertsRouter(PairRouter):
    """The router of ``NullExperts``: top-k over experts and null experts."""

    config: NullExperts

    def choose(self, tokens: Tokens) -> Choice:
        E, M = self.num_experts, self.num_experts + self.config.num_null_experts
        logits_TM = tokens.logits(self.gate)
        scores_TM = logits_TM.softmax(-1)
        ids_TK = top_k_ids(logits_TM.detach(), self.config.top_k)
        real_TK = ids_TK < E
        # The softmax is over the chosen experts only; a row without any would be NaN.
        some_T1 = real_TK.any(-1, keepdim=True)
        chosen_TK = logits_TM.gather(-1, ids_TK).masked_fill(~real_TK & some_T1, -torch.inf)
        gates_TK = chosen_TK.softmax(-1).masked_fill(~real_TK, 0.0)
        load_M = count_experts(ids_TK.masked_fill(~tokens.real_T[:, None], M).flatten(), M).to(scores_TM.dtype)
        return Choice(
            ids_TK.masked_fill(~real_TK, E),
            gates_TK,
            Evidence(
                logits_TM[:, :E].softmax(-1),
                logits_TM,
                balance_scores=torch.cat((scores_TM[:, :E], _spread(scores_TM[:, E:])), -1),
                balance_chosen=torch.cat((load_M[:E], _spread(load_M[E:]))),
            ),
        )


def _spread(values: Tensor) -> Tensor:
    """Replace every entry of the last axis by their mean."""
    return values.mean(-1, keepdim=True).expand_as(values)


@dataclass(frozen=True)
class NullExperts(RouterConfig):
    """AdaMoE (arXiv 2406.13233): in addition to the E experts the gate knows null experts, which compute nothing. A
    token takes the ``top_k`` best of all; how many of them are real is its own affair, and the load-balancing loss
    holds their mean at ``top_k * E / (E + num_null_experts)``. Gates are the softmax over the chosen real experts; a
    token that chose only null experts comes out zero, and the block's residual carries it.

    Loss, with M = E + num_null_experts: ``M sum_i f_i P_i`` over all M, where every null expert has the null experts'
    mean ``f``: the choice among null experts does not matter. ``importance`` averages their scores likewise, and
    ``router_z_loss`` covers all M logits. The statistics and the other losses see the softmax over the real experts.

    A capacity factor counts ``top_k`` places a token: for c times the balanced load give ``c * E / M``.

    Attributes:
        top_k: experts per token, null ones included; at least 2.
        num_null_experts: number of experts that compute nothing.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2406.13233"
    router_class = NullExpertsRouter
    terms = SCORE_TERMS | {"router_z_loss"}

    top_k: Annotated[int, Bounds(2, why="every gate would be 1 and the router untrained")] = 4
    num_null_experts: Count = 8
    init_scale: Positive = 0.1

    def make_gate(self, dim: int, num_experts: int) -> LinearGate:
        return LinearGate(dim, num_experts + self.num_null_experts, self.init_scale)

    def check(self, num_experts: int) -> None:
        if self.top_k > num_experts + self.num_null_experts:
            raise ValueError(
                f"top_k={self.top_k} exceeds num_experts={num_experts} plus num_null_experts={self.num_null_experts}"
            )

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the mean at balance."""
        return self.top_k * num_experts / (num_experts + self.num_null_experts)

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * (num_experts + self.num_null_experts)

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * dim * (num_experts + self.num_null_experts)


class ThresholdGate(nn.Module):
    """The cosine similarity of a token to each expert, and the threshold that each expert sets for it.

    Parameters: ``weight`` (E, D), its rows orthogonal at the start where E <= D; ``threshold`` (E,), 0 at the start.
    """

    def __init__(self, dim: int, num_experts: int, temperature: float) -> None:
        super().__init__()
        self.temperature = temperature
        self.weight = nn.Parameter(torch.empty(num_experts, dim))
        self.threshold = nn.Parameter(torch.empty(num_experts))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.orthogonal_(self.weight)
        nn.init.zeros_(self.threshold)

    def forward(self, x_TD: Tensor) -> Tensor:
        """Return the logits (T, E) of float32 (T, D) tokens."""
        check_devices(x_TD, type(self).__name__, self._parameters)
        # A zero token has similarity 0 to all; the floor bounds its gradient.
        direction_TD = F.normalize(x_TD, dim=-1, eps=1e-4)
        return F.linear(direction_TD, self.directions().to(x_TD.dtype)) / self.temperature

    def directions(self) -> Tensor:
        """Return the rows of ``weight`` at length 1, float32 (E, D)."""
        return F.normalize(self.weight if self.weight.dtype == torch.float64 else self.weight.float(), dim=-1)

    def diversity(self) -> Tensor:
        """Return ``|W^ W^T - I|`` (Frobenius) of the directions: 0 where the experts are orthogonal."""
        directions_ED = self.directions()
        identity = torch.eye(len(directions_ED), dtype=directions_ED.dtype, device=directions_ED.device)
        return torch.linalg.matrix_norm(directions_ED @ directions_ED.T - identity)

    def simplicity(self) -> Tensor:
        """Return the mean length of the rows of ``weight``."""
        weight = self.weight if self.weight.dtype == torch.float64 else self.weight.float()
        return weight.norm(dim=-1).mean()


class DynamicThresholdRouter(PairRouter):
    """The router of ``DynamicThreshold``: all experts above their thresholds."""

    config: DynamicThreshold
    gate: ThresholdGate

    def choose(self, tokens: Tokens) -> Choice:
        config, gate = self.config, self.gate
        logits_TE = gate(tokens.x_TD)
        scores_TE = logits_TE.sigmoid()
        over_TE = scores_TE - (gate.threshold.to(logits_TE.dtype) / config.temperature).sigmoid()
        # Sorted by the distance to the threshold, so that experts above theirs come first.
        best_TK = top_k_ids(over_TE.detach(), config.max_k)
        above_TK = over_TE.detach().gather(-1, best_TK) > 0
        none_T = ~above_TK[:, 0]
        first_T = torch.where(none_T, logits_TE.detach().argmax(-1), best_TK[:, 0])
        ids_TK = torch.cat((first_T[:, None], best_TK[:, 1:]), -1)
        taken_TK = torch.cat((torch.ones_like(none_T)[:, None], above_TK[:, 1:]), -1)
        over_TK = over_TE.gather(-1, ids_TK)
        # 1 / k, and on the way back the gradient of the distance, as if the step were its identity.
        gates_TK = (1 + (over_TK - over_TK.detach())) / taken_TK.sum(-1, keepdim=True)
        # A loss is repeated for each token, so that their mean is the loss. Evaluation has no use for it.
        own = {"diversity": gate.diversity, "simplicity": gate.simplicity} if self.training else {}
        extra = {name: loss().expand(len(logits_TE)) for name, loss in own.items() if name in self.extra_weights}
        ids_TK = torch.where(taken_TK, ids_TK, self.num_experts)
        return Choice(ids_TK, gates_TK, Evidence(scores_TE, logits_TE, extra=extra))


@dataclass(frozen=True)
class DynamicThreshold(RouterConfig):
    """Top-any gating (DynMoE, arXiv 2405.14297): a token takes every expert whose score
    ``sigmoid(cos(x, w_e) / temperature)`` is above ``sigmoid(threshold_e / temperature)``, with learned thresholds.
    Each of the k taken experts has the gate ``1 / k``; its gradient is the gradient of ``(score - threshold) / k``,
    straight through the step.

    If no expert is above its threshold, the one with the highest score is taken; the paper does so only in evaluation
    and lets the token pass in training, for it then adds an expert. Experts are neither added nor removed here. At most
    ``max_k`` are taken, those furthest above their thresholds; the paper has no limit, which is ``max_k = E``.

    Attributes:
        max_k: places of a token, K: the most experts that it takes, which decides the memory.
        temperature: divisor of cosines and thresholds before the sigmoid; 1 in the paper.
        diversity: weight of the paper's ``|W^ W^T - I|``, with ``W^`` the rows of the gate's weight at length 1.
        simplicity: weight of the paper's mean length of these rows.
    """

    paper = "2405.14297"
    router_class = DynamicThresholdRouter
    terms = SCORE_TERMS  # no z-loss: a cosine is bounded
    has_exact_gradient = False  # gates are steps, and the gradient goes straight through

    max_k: Count = 4
    temperature: Positive = 1.0
    diversity: NotNegative = 0.01
    simplicity: NotNegative = 0.01

    def make_gate(self, dim: int, num_experts: int) -> ThresholdGate:
        return ThresholdGate(dim, num_experts, self.temperature)

    def check(self, num_experts: int) -> None:
        at_most_experts("max_k", self.max_k, num_experts)

    @property
    def extra_weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("diversity", "simplicity") if getattr(self, name)}

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the most; how many experts are above their thresholds is learned."""
        return float(self.max_k)

    def num_params(self, dim: int, num_experts: int) -> int:
        return (dim + 1) * num_experts

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * dim * num_experts


@dataclass(frozen=True)
class Rounded:
    """The result of ``round_to_tiles``: the pairs, and how many each expert has. Names are as in ``Routing``."""

    token_index_N: Tensor
    expert_ids_N: Tensor
    tokens_per_expert_E: Tensor
    chosen_per_expert_E: Tensor
    added_per_expert_E: Tensor


def round_to_tiles(scores_TE: Tensor, expert_ids_TK: Tensor, real_T: Tensor, tile: int) -> Rounded:
    """Round each expert's number of tokens to the nearest multiple of ``tile``, a half up (arXiv 2512.14080).

    Rounding down leaves out the expert's lowest-scored pairs; rounding up adds the highest-scored non-padding tokens
    that did not choose it. If there are too few such tokens it rounds down; else a load changes by ``tile / 2`` at
    most.

    Args:
        scores_TE: float (T, E).
        expert_ids_TK: int64 (T, K), the choice; E at padding.
        real_T: bool (T,), False for padding.
        tile: rows of a kernel's tile.

    Returns:
        ``N = T * K + E * min(tile // 2, T)`` pairs: the chosen ones, token-major, then the added ones by expert.
    """
    (T, E), K, device = scores_TE.shape, expert_ids_TK.shape[1], scores_TE.device
    scores_TE = scores_TE.detach()
    expert_ids_N = expert_ids_TK.flatten()
    chosen_E = count_experts(expert_ids_N, E)
    fit = real_T.sum() // tile * tile
    target_E = ((chosen_E + tile // 2) // tile * tile).minimum(fit)

    score_N = scores_TE.gather(-1, expert_ids_TK.clamp_max(E - 1)).flatten()
    best_first = score_N.argsort(descending=True, stable=True)
    place_N = torch.empty_like(best_first).scatter_(0, best_first, torch.arange(T * K, device=device))
    rank_N = capacity_ranks(expert_ids_N, place_N, E + 1)
    expert_ids_N = expert_ids_N.masked_fill(rank_N >= F.pad(target_E, (0, 1))[expert_ids_N], E)

    taken_TE = torch.zeros(T, E + 1, dtype=torch.bool, device=device).scatter_(1, expert_ids_TK, True)[:, :E]
    free_ET = scores_TE.masked_fill(taken_TE | ~real_T[:, None], -torch.inf).T
    extra = min(tile // 2, T)
    added_token_EX = top_k_ids(free_ET, extra)
    added_E = (target_E - chosen_E).clamp_min(0)
    is_added_EX = torch.arange(extra, device=device) < added_E[:, None]
    added_ids_EX = torch.where(is_added_EX, torch.arange(E, device=device)[:, None], E)
    return Rounded(
        torch.cat((torch.arange(T * K, device=device) // K, added_token_EX.flatten())),
        torch.cat((expert_ids_N, added_ids_EX.flatten())),
        target_E,
        chosen_E,
        added_E,
    )


class TokenRoundingRouter(TopKRouter):
    """The router of ``TokenRounding``: top-k in evaluation, top-k rounded to tiles in training."""

    config: TokenRounding

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Routing:
        if not self.training:
            return super().forward(x, context)
        self.check_context(context)
        with outside_autocast(x.device):
            return self._round(Tokens.of(x, context))

    @span("moe.router")
    def _round(self, tokens: Tokens) -> Routing:
        E, real_T = self.num_experts, tokens.real_T
        choice = self.choose(tokens)
        evidence = choice.evidence
        assert evidence is not None
        scores_TE = evidence.scores_TE
        assert scores_TE is not None
        ids_TK = choice.expert_ids_TK.masked_fill(~real_T[:, None], E)
        rounded = round_to_tiles(scores_TE, ids_TK, real_T, self.config.tile)
        token_N, ids_N = rounded.token_index_N, rounded.expert_ids_N
        gates_N = scores_TE.flatten().index_select(0, token_N * E + ids_N.clamp_max(E - 1)).masked_fill(ids_N == E, 0.0)
        if self.config.normalizes:
            sum_T = gates_N.new_zeros(len(scores_TE)).index_add(0, token_N, gates_N)
            gates_N = gates_N / sum_T.clamp_min(1e-20).index_select(0, token_N)
        return Routing(
            token_index_N=token_N,
            expert_ids_N=ids_N,
            gates_N=gates_N,
            tokens_per_expert_E=rounded.tokens_per_expert_E,
            # The added pairs count as chosen, so that a drop rate is the share of the dropped ones.
            chosen_per_expert_E=rounded.chosen_per_expert_E + rounded.added_per_expert_E,
            num_tokens=len(scores_TE),
            valid_T=tokens.valid_T,
            num_sequences=tokens.num_sequences,
            evidence=replace(evidence, balance_chosen=rounded.chosen_per_expert_E),
        )


@dataclass(frozen=True)
class TokenRounding(TopKConfig, LinearGateConfig):
    """Token rounding (SonicMoE, arXiv 2512.14080): top-k, and in training each expert's number of tokens in the call is
    rounded to the nearest multiple of ``tile``, so that grouped matmuls have no part-filled tiles; see
    ``round_to_tiles``. A token may get more or fewer than ``top_k`` experts in training; evaluation is plain top-k.

    In training tokens compete across the batch: batch-mates, later tokens too, change a token's output, so a causal
    decoder rejects it. Use it if ``T * K / E`` is well above ``tile``: an expert that fewer than ``tile / 2`` tokens
    chose gets none. Rounding decides the loads, without a capacity factor.

    Attributes:
        top_k: experts per token before rounding, K.
        tile: rows of a kernel's tile.
        normalize: as in ``TokenChoice``; the sum runs over the experts that compute the token.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2512.14080"
    router_class = TokenRoundingRouter
    terms = SCORE_TERMS | {"router_z_loss"}
    is_causal = False  # in training: in evaluation a token decides by itself
    depends_on = "token"
    layer_options = frozenset({"backend"})

    top_k: Count = 2
    tile: Count = 128
    normalize: bool | None = None
    init_scale: Positive = 0.1

    def check_group(self, group: str | int) -> None:
        if group != "batch":
            raise ValueError(f"group={group!r} does not apply to TokenRounding: it rounds the loads of the whole call")
