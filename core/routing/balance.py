"""Balance losses: pure functions of sums over tokens, and the step of the selection bias.

To add a balance loss, write its function, its entry in ``TERMS`` and the field of ``Balance`` that is its weight: all
of it here. A term with ``of_scores`` applies to every gate that has learned scores of all experts.

Every term is a function of sums over the tokens of *all* ranks and micro-steps it is given, with its denominator in the
signature, so that a loss is the same however the tokens are split over ranks.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass, fields
from functools import cached_property

import torch
from torch import Tensor

from ..contract import Decision, Routing, RoutingContext, check_kinds
from ..contract.checks import at_least_one, below_one, clean_ids, not_negative, one_of, positive, sequence, whole
from ..kernels.eager import top_k_ids
from ..registry import register_config

EXTRA = "extra."
"""Prefix of the names of the sums of ``Evidence.extra``."""

# The losses are functions of sums over tokens.


def mean_over(total: Tensor, count: Tensor | float) -> Tensor:
    """Return the mean of ``count`` values from their sum; 0 where there are none."""
    return total / (count.clamp_min(1) if isinstance(count, Tensor) else max(count, 1))


def load_balancing_loss(score_sum_E: Tensor, chosen_per_expert_E: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``E * sum_e f_e P_e``: 1 at balance, E when one expert takes all.

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token; ``P_e`` is it over ``num_tokens``.
        chosen_per_expert_E: (E,), pairs that chose each expert before capacity; ``f_e`` is its share of all pairs.
        num_tokens: number of real tokens.
    """
    share_E = chosen_per_expert_E / chosen_per_expert_E.sum().clamp_min(1)
    return mean_over(len(score_sum_E) * (share_E * score_sum_E).sum(), num_tokens)


def squared_cv(total_E: Tensor) -> Tensor:
    """Return the variance over the squared mean of (E,) sums, the variance over E and not E - 1; 0 at balance.

    For the summed scores it is ``importance`` (arXiv 2106.05974, eq. 6), for the ``smooth_load`` it is ``load``.
    """
    mean = total_E.mean()
    return (total_E - mean).square().mean() / mean.square().clamp_min(1e-20)


def entropy(p: Tensor) -> Tensor:
    """Return ``-sum p log p`` over the last axis, in nats; the gradient is finite at 0."""
    return -(p * p.clamp_min(1e-20).log()).sum(-1)


def mutual_information_loss(score_sum_E: Tensor, entropy_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``-I = H(expert | condition) - H(expert)``: 0 where the two are independent, ``-log(E)`` at best.

    The condition is the token (arXiv 2306.04640) or its task (arXiv 2212.08066, tasks weighted by their tokens).

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token.
        entropy_sum: sum over tokens of the entropy of the token's scores, or of its task's mean scores.
        num_tokens: number of real tokens.
    """
    return mean_over(entropy_sum, num_tokens) - entropy(mean_over(score_sum_E, num_tokens))


def entropy_of_means(score_sum_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """Return the entropy of each group's mean scores, (G,), from (G, E) sums and token counts; 0 without tokens."""
    return entropy(score_sum_GE / tokens_G.clamp_min(1)[:, None])


def local_entropy_loss(entropy_sum_G: Tensor, tokens_G: Tensor) -> Tensor:
    """Return the sum over modalities of the mean entropy of their tokens' scores (LIMoE): low where gates are sharp.

    Args:
        entropy_sum_G: (G,), sum of the entropies of each modality's tokens.
        tokens_G: (G,), number of its real tokens.
    """
    return (entropy_sum_G / tokens_G.clamp_min(1)).sum()


def global_entropy_loss(score_sum_GE: Tensor, tokens_G: Tensor, threshold: float) -> Tensor:
    """Return the sum over modalities that have tokens of ``max(0, threshold - H(mean scores))`` (LIMoE): 0 where each
    modality uses about ``exp(threshold)`` experts or more.

    Args:
        score_sum_GE: (G, E), sums of the scores of each modality's tokens.
        tokens_G: (G,), number of its real tokens.
        threshold: entropy in nats.
    """
    return ((threshold - entropy_of_means(score_sum_GE, tokens_G)).relu() * (tokens_G > 0)).sum()


def sequence_losses(score_sum_BE: Tensor, chosen_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """Return ``E * sum_e f_e P_e`` of each sequence, (B,); 0 without tokens (arXiv 2412.19437, eq. 17-20).

    Args:
        score_sum_BE: (B, E), sums of the scores of its tokens; ``P_e`` is it over ``tokens_B``.
        chosen_BE: (B, E), pairs that chose each expert; ``f_e`` is its share of the sequence's pairs.
        tokens_B: (B,), number of its real tokens.
    """
    share_BE = chosen_BE / chosen_BE.sum(-1, keepdim=True).clamp_min(1)
    return score_sum_BE.shape[-1] * (share_BE * score_sum_BE).sum(-1) / tokens_B.clamp_min(1)


def smooth_load(logits_TE: Tensor, threshold_TE: Tensor, noise_std: float | Tensor) -> Tensor:
    """Return the probability that fresh noise lifts each logit over its threshold, (T, E)."""
    return torch.special.ndtr((logits_TE - threshold_TE) / noise_std)


def sparsity_loss(score_sum_E: Tensor, positive_E: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Return ``E * sum_e f_e m_e``, with ``f_e`` the share of tokens whose score of e is positive and ``m_e`` the mean
    score: an L1 norm that weighs the scores of busy experts more (ReMoE, arXiv 2412.14711).

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which are not negative.
        positive_E: (E,), number of tokens with a positive score.
        num_tokens: number of real tokens.
    """
    return len(score_sum_E) * (mean_over(positive_E, num_tokens) * mean_over(score_sum_E, num_tokens)).sum()


def localized_loss(total: Tensor, square: Tensor, count: Tensor | float) -> Tensor:
    """Return the variance over the mean of ``count`` values, from the sums of them and of their squares; 0 without any.

    For the weighted importances of experts in sequences it is LoRAMoE's localized balance (arXiv 2312.09979).
    """
    mean = mean_over(total, count)
    return (mean_over(square, count) - mean.square()) / mean.clamp_min(1e-20)


def contrast_losses(y_SD: Tensor, expert_S: Tensor, kept_S: Tensor, temperature: float) -> tuple[Tensor, Tensor]:
    """Return the contrast of each expert's outputs with those of the others, float32 (S,), and which rows have one.

    For row i, with the similarities ``s_ij = u_i . u_j / temperature`` and ``u = y / sqrt(1 + |y|^2)``, it is the mean
    over the other rows p of its expert of ``-log(exp(s_ip) / sum over j != i of exp(s_ij))``, as in MoELoRA (arXiv
    2402.12851): outputs of one expert attract each other, and those of different experts repel. Long outputs are
    compared by their direction; one of zero, as that of a new low-rank update, has none, and its gradient is bounded.

    Args:
        y_SD: (S, D) outputs.
        expert_S: int64 (S,), the expert of each.
        kept_S: bool (S,), False for rows that are left out.
        temperature: positive.
    """
    y_SD = torch.where(kept_S[:, None], y_SD.to(torch.float32), 0)
    u_SD = y_SD * (1 + y_SD.square().sum(-1, keepdim=True)).rsqrt()
    is_other_SS = kept_S & ~torch.eye(len(u_SD), dtype=torch.bool, device=u_SD.device)
    is_same_SS = is_other_SS & (expert_S == expert_S[:, None])
    similar_SS = (u_SD @ u_SD.T / temperature).masked_fill(~is_other_SS, torch.finfo(torch.float32).min)
    log_share_SS = similar_SS.log_softmax(-1)
    num_same_S = is_same_SS.sum(-1)
    has_loss_S = kept_S & (num_same_S > 0)
    loss_S = -torch.where(is_same_SS, log_share_SS, 0).sum(-1) / num_same_S.clamp_min(1)
    return torch.where(has_loss_S, loss_S, 0), has_loss_S


# The terms say which sums a loss is a function of, and how a pass gives them.


class Pass:
    """One pass of a layer, as the terms read it. A value that several terms need is computed once, at its first use.

    Args:
        routing: the decision, with the evidence for it.
        balance: options of the terms, such as the numbers of tasks and modalities.
        context: the ids of tasks and modalities. On a GPU and in compiled code an id out of range belongs to none.
        shared_gate_T: gate of the shared experts, as in ``Entry``.
    """

    def __init__(
        self, routing: Decision, balance: Balance, context: RoutingContext | None, shared_gate_T: Tensor | None
    ) -> None:
        self.routing, self.evidence, self.valid_T = routing, routing.evidence, routing.valid_T
        self.balance, self.context, self.shared_gate_T = balance, context, shared_gate_T
        self.known: Mapping[str, Tensor] = self.evidence.sums or {}

    def total(self, per_token: Tensor) -> Tensor:
        """Return the sum over the real tokens."""
        return per_token.sum(0) if self.valid_T is None else (per_token * _like(self.valid_T, per_token)).sum(0)

    def num_sequences(self, name: str) -> int:
        """Return the number of sequences: where the routing does not know it, that of the context's field ``name``."""
        if self.routing.num_sequences is not None:
            return self.routing.num_sequences
        ids, T = None if self.context is None else getattr(self.context, name), self.routing.num_tokens
        return ids.shape[0] if ids is not None and ids.ndim and ids.shape[0] and T % ids.shape[0] == 0 else T

    @cached_property
    def share_TE(self) -> Tensor:
        """The scores divided by their sum: a loss of plain sigmoid scores would shrink by lowering them all."""
        scores_TE = self.evidence.scores_TE
        assert scores_TE is not None
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)

    @cached_property
    def score_E(self) -> Tensor:
        """The sum of the shares, (E,)."""
        return self.known["score"] if "score" in self.known else self.total(self.share_TE)

    @cached_property
    def modality_TG(self) -> Tensor:
        """Membership, float (T, G): 1 where a real token is of modality g."""
        return _members(self, self.balance.num_modalities, "modality_BS")


@dataclass(frozen=True)
class Term:
    """One balance loss.

    Attributes:
        key: name of a sum without which there is no loss, since the evidence did not allow the sum.
        take: function of a pass that returns sums over its real tokens, float32, by name. Terms may share a sum;
            "num_tokens" (1,) and "chosen" (E,) are always there.
        loss: function of the sums, added up over ranks, that returns the loss.
        of_scores: whether the term reads scores alone, so that it applies wherever a gate has learned scores of all
            experts.
        needs: function that returns the fields of ``RoutingContext`` that the term reads.
    """

    key: str
    take: Callable[[Pass], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], Balance], Tensor]
    of_scores: bool = False
    needs: Callable[[Balance], tuple[str, ...]] = lambda balance: ()


def _scores(one: Pass) -> dict[str, Tensor]:
    judged = one.evidence.balance_scores
    return {"score": one.score_E} | ({} if judged is None else {"balance_score": one.total(judged)})


def _judged(sums: dict[str, Tensor]) -> Tensor:
    return sums.get("balance_score", sums["score"])


def _informed(one: Pass) -> dict[str, Tensor]:
    if not one.balance.num_tasks:
        return _scores(one) | {"entropy": one.total(entropy(one.share_TE)).reshape(1)}
    task_TG = _members(one, one.balance.num_tasks, "task_ids_B")
    return _scores(one) | {"task_score": task_TG.T @ one.share_TE, "task_tokens": task_TG.sum(0)}


def _information(sums: dict[str, Tensor], balance: Balance) -> Tensor:
    if not balance.num_tasks:
        return mutual_information_loss(sums["score"], sums["entropy"][0], sums["num_tokens"][0])
    score_GE, tokens_G = sums["task_score"], sums["task_tokens"]
    entropy_sum = (tokens_G * entropy_of_means(score_GE, tokens_G)).sum()
    # Tokens without a task say nothing of it, so they do not count.
    return mutual_information_loss(score_GE.sum(0), entropy_sum, tokens_G.sum())


def _modality_entropies(one: Pass) -> dict[str, Tensor]:
    tokens_G = one.modality_TG.sum(0)
    return {"modality_tokens": tokens_G, "modality_entropy": entropy(one.share_TE) @ one.modality_TG}


def _local_entropy(sums: dict[str, Tensor], balance: Balance) -> Tensor:
    only = balance.local_entropy_modality
    kept = slice(None) if only is None else slice(only, only + 1)
    return local_entropy_loss(sums["modality_entropy"][kept], sums["modality_tokens"][kept])


def _modality_scores(one: Pass) -> dict[str, Tensor]:
    return {"modality_tokens": one.modality_TG.sum(0), "modality_score": one.modality_TG.T @ one.share_TE}


def _global_entropy(sums: dict[str, Tensor], balance: Balance) -> Tensor:
    score_GE, threshold = sums["modality_score"], balance.entropy_threshold
    threshold = math.log(score_GE.shape[-1]) if threshold is None else threshold
    return global_entropy_loss(score_GE, sums["modality_tokens"], threshold)


def _modality_needs(balance: Balance) -> tuple[str, ...]:
    return ("modality_BS",) if balance.num_modalities > 1 else ()


def _sequences(one: Pass) -> dict[str, Tensor]:
    routing, evidence = one.routing, one.evidence
    if evidence.scores_TE is None or not isinstance(routing, Routing):
        return {}
    B, K = routing.num_sequences, routing.top_k
    if B is None or K is None:
        return {}
    share_TE, T = one.share_TE, one.share_TE.shape[0]
    real_T1 = share_TE.new_ones(T, 1) if one.valid_T is None else _like(one.valid_T, share_TE)
    # Logits have the order of the scores, which are equal in float32 where logits are large.
    best_TK = top_k_ids((share_TE if evidence.logits_TE is None else evidence.logits_TE).detach(), K)
    chosen_TE = torch.zeros_like(share_TE).scatter_(-1, best_TK, 1.0) * real_T1
    of_sequence = (B, T // max(B, 1))
    score_BE = (share_TE * real_T1).unflatten(0, of_sequence).sum(1)
    tokens_B = real_T1.unflatten(0, of_sequence).sum((1, 2))
    losses_B = sequence_losses(score_BE, chosen_TE.unflatten(0, of_sequence).sum(1), tokens_B)
    count = (tokens_B > 0).sum().to(losses_B.dtype)
    return {"sequence_loss": losses_B.sum().reshape(1), "num_sequences": count.reshape(1)}


def _localized(one: Pass) -> dict[str, Tensor]:
    balance, share_TE = one.balance, one.share_TE
    type_TG = _members(one, balance.num_types, "task_ids_B")
    type_E = torch.tensor(balance.expert_types, device=share_TE.device)
    is_type_GE = (type_E == torch.arange(balance.num_types, device=share_TE.device)[:, None]).to(share_TE.dtype)
    real_T1 = share_TE.new_ones(len(share_TE), 1) if one.valid_T is None else _like(one.valid_T, share_TE)
    # 1 + delta where the expert is of the sample's type, else 1 - delta: one type a sample, so one term of the sum.
    factor_TE = real_T1 * (1 - balance.localized_delta) + 2 * balance.localized_delta * type_TG @ is_type_GE
    B = one.num_sequences("task_ids_B")
    of_sequence = (B, len(share_TE) // max(B, 1))
    importance_BE = (share_TE * factor_TE).unflatten(0, of_sequence).sum(1)
    count = real_T1.unflatten(0, of_sequence).any(1).sum().to(share_TE.dtype)
    return {
        "localized": importance_BE.sum().reshape(1),
        "localized_square": importance_BE.square().sum().reshape(1),
        "num_samples": count.reshape(1),
    }


def _localized_balance(sums: dict[str, Tensor], balance: Balance) -> Tensor:
    count = sums["num_samples"][0] * len(balance.expert_types)
    return localized_loss(sums["localized"][0], sums["localized_square"][0], count)


def _first_choices(one: Pass) -> dict[str, Tensor]:
    evidence = one.evidence
    if evidence.scores_TE is None or not isinstance(one.routing, Routing):
        return {}
    share_TE = one.share_TE
    # Logits have the order of the scores, and the lowest of equal experts is taken, as everywhere.
    ranked_TE = share_TE if evidence.logits_TE is None else evidence.logits_TE
    first_T1 = top_k_ids(ranked_TE.detach(), 1)
    chosen_TE = torch.zeros_like(share_TE).scatter_(-1, first_T1, 1.0)
    return {"score": one.score_E, "first_chosen": one.total(chosen_TE)}


def _contrasts(one: Pass) -> dict[str, Tensor]:
    return {name: one.known[name] for name in ("contrast", "num_contrasts") if name in one.known}


def _sparse_gates(one: Pass) -> dict[str, Tensor]:
    routing = one.routing
    if not isinstance(routing, Routing):
        return {}
    E = routing.tokens_per_expert_E.shape[0]
    # Pairs that are not computed have the id E, and gates of 0.
    gate_E = routing.gates_N.new_zeros(E + 1).index_add(0, routing.expert_ids_N, routing.gates_N)[:E]
    return {"gate": gate_E}


def _squares(one: Pass) -> dict[str, Tensor]:
    logits_TE = one.evidence.logits_TE
    if logits_TE is None:
        return {}
    known = one.known.get("square")
    return {"square": one.total(logits_TE.logsumexp(-1).square()).reshape(1) if known is None else known}


def _smooth_loads(one: Pass) -> dict[str, Tensor]:
    logits_TE, threshold_TE, noise = one.evidence.logits_TE, one.evidence.threshold_TE, one.evidence.noise_std
    if logits_TE is None or threshold_TE is None or noise is None:
        return {}
    return {"load": one.total(smooth_load(logits_TE, threshold_TE, noise))}


def _sparse_scores(one: Pass) -> dict[str, Tensor]:
    scores_TE = one.evidence.sparse_scores
    if scores_TE is None:
        return {}
    return {"sparse_score": one.total(scores_TE), "positive": one.total((scores_TE > 0).to(scores_TE.dtype))}


def _gate_distance(one: Pass) -> dict[str, Tensor]:
    if one.shared_gate_T is None:
        return {}
    return {"gate_distance": one.total((one.shared_gate_T - one.balance.budget).abs()).reshape(1)}


def _members(one: Pass, count: int, name: str) -> Tensor:
    """Return membership, float (T, G): 1 where a real token is of task or modality g."""
    scores_TE, valid_T, context = one.share_TE, one.valid_T, one.context
    T = scores_TE.shape[0]
    if name == "modality_BS" and count == 1:
        member_TG = scores_TE.new_ones(T, 1)
    else:
        ids = None if context is None else getattr(context, name)
        if ids is None:
            raise ValueError(f"the balance losses need context.{name}, which is None")
        if T == 0:
            return scores_TE.new_zeros(0, count)
        B = one.num_sequences(name)
        ids = clean_ids(ids, name, count, (B, T // B), valid_T)
        # A task is one number a sequence, a modality one a token.
        ids_T = ids.repeat_interleave(T // B) if ids.ndim == 1 else ids.flatten()
        member_TG = (ids_T[:, None] == torch.arange(count, device=ids.device)).to(scores_TE.dtype)
    return member_TG if valid_T is None else member_TG * valid_T[:, None]


TERMS: dict[str, Term] = {
    "load_balancing": Term(
        "score",
        _scores,
        lambda sums, _: load_balancing_loss(_judged(sums), sums["chosen"], sums["num_tokens"][0]),
        of_scores=True,
    ),
    "importance": Term("score", _scores, lambda sums, _: squared_cv(_judged(sums)), of_scores=True),
    "mutual_information": Term(
        "score",
        _informed,
        _information,
        of_scores=True,
        needs=lambda balance: ("task_ids_B",) if balance.num_tasks else (),
    ),
    "local_entropy": Term(
        "modality_entropy", _modality_entropies, _local_entropy, of_scores=True, needs=_modality_needs
    ),
    "global_entropy": Term("modality_score", _modality_scores, _global_entropy, of_scores=True, needs=_modality_needs),
    "localized": Term(
        "localized", _localized, _localized_balance, of_scores=True, needs=lambda balance: ("task_ids_B",)
    ),
    "sequence_balance": Term(
        "sequence_loss",
        _sequences,
        lambda sums, _: mean_over(sums["sequence_loss"][0], sums["num_sequences"][0]),
    ),
    "first_choice": Term(
        "first_chosen",
        _first_choices,
        lambda sums, _: load_balancing_loss(sums["score"], sums["first_chosen"], sums["num_tokens"][0]),
    ),
    "gate_importance": Term("gate", _sparse_gates, lambda sums, _: squared_cv(sums["gate"])),
    "contrast": Term("contrast", _contrasts, lambda sums, _: mean_over(sums["contrast"][0], sums["num_contrasts"][0])),
    "router_z": Term("square", _squares, lambda sums, _: mean_over(sums["square"][0], sums["num_tokens"][0])),
    "load": Term("load", _smooth_loads, lambda sums, _: squared_cv(sums["load"])),
    "gate_budget": Term(
        "gate_distance",
        _gate_distance,
        lambda sums, _: mean_over(sums["gate_distance"][0], sums["num_tokens"][0]),
    ),
}
"""The balance losses by name, in the order they are added. Each is a field of ``Balance``, its weight."""
OWN_TERMS: dict[str, Term] = {
    "sparsity": Term(
        "sparse_score",
        _sparse_scores,
        lambda sums, _: sparsity_loss(sums["sparse_score"], sums["positive"], sums["num_tokens"][0]),
    ),
}
"""Losses of a router's own that are more than a mean over tokens, by name. Their weights are in its
``extra_weights``, not in ``Balance``."""
SCORE_TERMS = frozenset(name for name, term in TERMS.items() if term.of_scores)
"""The terms that apply wherever a gate has learned scores of all experts."""
CHOICE_TERMS = frozenset({"sequence_balance", "first_choice", "gate_importance"})
"""The terms that apply besides where each token takes its K best experts by itself."""


@register_config
@dataclass(frozen=True)
class Balance:
    """Weights of the balance losses of a layer. A term that does not apply to the router is skipped while it is at its
    default, and refused when set by hand.

    Attributes:
        load_balancing: ``E * sum_e f_e P_e`` (Switch, arXiv 2101.03961, eq. 4); 1 at balance.
        router_z: mean of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).
        importance: squared coefficient of variation of the experts' summed scores, which are those of all experts and
            not the gates of the chosen ones (V-MoE, arXiv 2106.05974, section A.1, and its code).
        load: squared coefficient of variation of the experts' smooth load, which needs noise on the logits
            (arXiv 1701.06538, eq. 11).
        mutual_information: minus the mutual information of token and expert (ModuleFormer, arXiv 2306.04640), or, with
            ``num_tasks``, of task and expert (Mod-Squad, arXiv 2212.08066); in nats.
        local_entropy: mean entropy of a token's scores, summed over modalities (LIMoE, arXiv 2206.02770); in nats.
        global_entropy: ``max(0, entropy_threshold - entropy of the mean scores)``, summed over modalities (LIMoE).
        sequence_balance: ``load_balancing`` within each sequence, the mean over sequences; the choice is the top-k of
            the scores without bias or noise (DeepSeek-V3, arXiv 2412.19437, eq. 17-20, where the weight is 1e-4).
        localized: variance over mean of the importance of each expert in each sequence, ``Z = (1 + delta) Q`` where
            the expert is of the sequence's type and ``(1 - delta) Q`` elsewhere, with Q the sum of its scores over the
            sequence; the type is ``context.task_ids_B`` (LoRAMoE, arXiv 2312.09979).
        first_choice: ``load_balancing`` with the shares of first choices alone, the best by the scores without bias or
            noise, in place of all K (GShard, arXiv 2006.16668, algorithm 1).
        gate_importance: squared coefficient of variation of the experts' summed gates, which are 0 for experts that a
            token did not take, or that were full (arXiv 1701.06538, eq. 6-7).
        contrast: mean of ``contrast_losses`` over rows of the pass, in training (MoELoRA, arXiv 2402.12851); in nats.
        gate_budget: mean of ``|g - budget|``, g being the share of the routed path that ``MoEConfig.shared_gate="mix"``
            gives a token (NLLB, arXiv 2207.04672).
        num_tasks: number of tasks in ``context.task_ids_B`` for ``mutual_information``; 0: it is of tokens.
        num_modalities: number of modalities in ``context.modality_BS`` for the entropies; 1: all tokens are of one.
        local_entropy_modality: the only modality whose local entropy counts (LIMoE: text); None: all.
        entropy_threshold: entropy in nats; ``log(n)`` asks for about n experts a modality; None: ``log(E)``.
        budget: share of the routed path that ``gate_budget`` asks for, in [0, 1].
        localized_delta: delta of ``localized``, in (-1, 1). The loss is 0 where experts of a sequence's type have
            ``(1 - delta) / (1 + delta)`` times the importance of the others: by a negative delta they have more.
        contrast_temperature: temperature of ``contrast``.
        contrast_rows: most rows of a pass that ``contrast`` compares; the same number is computed twice.
        expert_types: type of each expert, for ``localized``; types are the tasks, from 0 on.
        scope: "global": a term is a function of the tokens of all ranks; "rank": of each rank's own, with the mean of
            the ranks as its gradient (as Switch and most others do; cheaper, and stricter where a rank has few tokens).
        adaptive: whether the layer's weight of ``load_balancing``, which starts at that field, follows the drop rate:
            ``update_expert_bias`` moves it once per optimizer step by ``adaptive_weight`` (Skywork-MoE, arXiv
            2406.06563). This needs a capacity factor.
        adaptive_scale, adaptive_max, adaptive_momentum: weight per drop rate, largest weight, and momentum.

    V-MoE's loss is ``Balance(load_balancing=0, router_z=0, importance=0.005, load=0.005)``; LIMoE adds
    ``local_entropy`` and ``global_entropy`` with ``num_modalities=2`` to it. ``Balance(adaptive=True)`` is Skywork's.

    Raises:
        ValueError: a weight is negative or not finite, or another value is out of its range.
    """

    load_balancing: float = 0.01
    router_z: float = 0.001
    importance: float = 0.0
    load: float = 0.0
    mutual_information: float = 0.0
    local_entropy: float = 0.0
    global_entropy: float = 0.0
    localized: float = 0.0
    sequence_balance: float = 0.0
    first_choice: float = 0.0
    gate_importance: float = 0.0
    contrast: float = 0.0
    gate_budget: float = 0.0
    num_tasks: int = 0
    num_modalities: int = 1
    local_entropy_modality: int | None = None
    entropy_threshold: float | None = None
    budget: float = 0.8
    localized_delta: float = 0.1
    expert_types: tuple[int, ...] = ()
    contrast_temperature: float = 0.1
    contrast_rows: int = 256
    scope: str = "global"
    adaptive: bool = False
    adaptive_scale: float = 0.2
    adaptive_max: float = 0.01
    adaptive_momentum: float = 0.99

    def __post_init__(self) -> None:
        check_kinds(self, "balance.")
        for name, weight in self.weights().items():
            not_negative(f"balance.{name}", weight)
        not_negative("balance.num_tasks", self.num_tasks)
        at_least_one("balance.num_modalities", self.num_modalities)
        only = self.local_entropy_modality
        if only is not None and not 0 <= only < self.num_modalities:
            raise ValueError(
                f"balance.local_entropy_modality={only} is not below num_modalities={self.num_modalities}, or negative"
            )
        at_least_one("balance.contrast_rows", self.contrast_rows)
        for name in ("adaptive_scale", "adaptive_max", "entropy_threshold", "contrast_temperature"):
            if getattr(self, name) is not None:
                positive(f"balance.{name}", getattr(self, name))
        below_one("balance.adaptive_momentum", self.adaptive_momentum)
        if not 0 <= self.budget <= 1:
            raise ValueError(f"balance.budget={self.budget} is not in [0, 1]")
        if not -1 < self.localized_delta < 1:
            raise ValueError(f"balance.localized_delta={self.localized_delta} is not in (-1, 1)")
        sequence("balance.expert_types", self.expert_types)
        for kind in self.expert_types:
            whole("balance.expert_types", kind)
            not_negative("balance.expert_types", kind)
        if self.localized and not self.expert_types:
            raise ValueError(f"balance.localized={self.localized} needs expert_types, the type of each expert")
        one_of("balance.scope", self.scope, ("global", "rank"))
        if self.adaptive and self.load_balancing == 0:
            raise ValueError("balance.adaptive=True moves load_balancing, which is 0: its term would be left out")

    def weights(self) -> dict[str, float]:
        """Return the weight of each term."""
        return {name: getattr(self, name) for name in TERMS}

    @property
    def num_types(self) -> int:
        """Return the number of types that ``expert_types`` names: they are in ``range(num_types)``."""
        return max(self.expert_types, default=-1) + 1

    @property
    def needs(self) -> tuple[str, ...]:
        """Return the fields of ``RoutingContext`` that the terms of positive weight read."""
        weights = self.weights()
        return tuple(dict.fromkeys(n for name, term in TERMS.items() if weights[name] for n in term.needs(self)))

    def check(self, terms: frozenset[str], router: str, num_experts: int | None = None) -> None:
        """Raise a ``ValueError`` for a term that was set by hand and does not apply to the router.

        Args:
            terms: names of the terms that apply.
            router: names the router in the message.
            num_experts: E; None: the layer's gates differ in their experts, whose types one list cannot name.
        """
        for f in fields(self):
            weight = getattr(self, f.name)
            if f.name in TERMS and weight and weight != f.default and f.name not in terms:
                why = " without noise on its logits, or with a bias or group limits" if f.name == "load" else ""
                raise ValueError(f"balance.{f.name}={weight} does not apply to {router}{why}")
        if self.localized and num_experts is None:
            raise ValueError(
                f"balance.localized={self.localized} does not apply to {router}: it is for MoEConfig's layers"
            )
        if self.localized and len(self.expert_types) != num_experts:
            raise ValueError(f"balance.expert_types has {len(self.expert_types)} types for num_experts={num_experts}")
        if self.adaptive and "load_balancing" not in terms:
            raise ValueError(f"balance.adaptive=True moves load_balancing, which does not apply to {router}")


def balance_sums(
    routing: Decision,
    wanted: frozenset[str],
    balance: Balance = Balance(),
    context: RoutingContext | None = None,
    shared_gate_T: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the sums over tokens that the ``wanted`` terms are functions of; float32, on the routing's device.

    Sums of different ranks add up, and each term is computed from the added sums alone.

    Args:
        routing, balance, context, shared_gate_T: arguments of ``Pass``.
        wanted: names of terms.

    Raises:
        ValueError: the context lacks a field that a wanted term reads, or the field has another shape, holds no
            integers, or (on CPU) an id of a real token that is out of range.
    """
    one = Pass(routing, balance, context, shared_gate_T)
    chosen = one.evidence.balance_chosen
    chosen_E = (routing.chosen_per_expert_E if chosen is None else chosen).to(torch.float32)
    valid_T = routing.valid_T
    tokens = chosen_E.new_full((), routing.num_tokens) if valid_T is None else valid_T.sum().to(torch.float32)
    sums = {"num_tokens": tokens.reshape(1), "chosen": chosen_E}
    for name, term in (TERMS | OWN_TERMS).items():
        if name in wanted and (one.evidence.scores_TE is not None or not term.of_scores):
            sums |= term.take(one)
    for name, value_T in (one.evidence.extra or {}).items():
        if name in wanted:
            sums[EXTRA + name] = one.total(value_T).reshape(1)
    return sums


def balance_terms(sums: dict[str, Tensor], wanted: frozenset[str], balance: Balance = Balance()) -> dict[str, Tensor]:
    """Return the ``wanted`` terms that ``sums`` allow, unweighted; ``balance`` holds their options."""
    every = TERMS | OWN_TERMS
    terms = {name: t.loss(sums, balance) for name, t in every.items() if name in wanted and t.key in sums}
    extra = {name.removeprefix(EXTRA): total for name, total in sums.items() if name.startswith(EXTRA)}
    return terms | {name: mean_over(total[0], sums["num_tokens"][0]) for name, total in extra.items()}


def adaptive_weight(weight: Tensor, drop_rate: Tensor, balance: Balance) -> Tensor:
    """Return the next weight of ``load_balancing``, ``m * weight + (1 - m) * min(scale * drop_rate, max)``, with m the
    momentum (Skywork-MoE, arXiv 2406.06563, section 4.2; there scale 1/5, max 0.01, momentum 0.99)."""
    target = (balance.adaptive_scale * drop_rate).clamp_max(balance.adaptive_max)
    return balance.adaptive_momentum * weight + (1 - balance.adaptive_momentum) * target


def expert_bias_step(chosen_per_expert_E: Tensor, rate: float) -> Tensor:
    """Return ``rate * sign(mean load - load)``: an expert with too few tokens rises (arXiv 2408.15664, algorithm 1)."""
    load_E = chosen_per_expert_E.to(torch.float32)
    return rate * torch.sign(load_E.mean() - load_E)


def _like(valid_T: Tensor, per_token: Tensor) -> Tensor:
    return valid_T.to(per_token.dtype).reshape(-1, *(1,) * (per_token.ndim - 1))
