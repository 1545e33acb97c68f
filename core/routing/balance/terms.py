"""The balance losses by name: the sums over tokens that each takes of a pass, and its loss of these sums.

To add a balance loss, write its formula in ``losses.py``, its entry in ``TERMS`` here, and its weight, a
field of ``BalanceWeights`` in ``balance.py``, where ``needs`` lists the fields of the context that it reads. A term
with ``of_scores`` applies to every gate that has learned scores of all experts.
"""

from __future__ import annotations

import math
from collections.abc import Callable, Mapping
from dataclasses import dataclass
from functools import cached_property

import torch
from torch import Tensor

from ...contract import Decision, Routing, RoutingContext
from ...contract.checks import clean_ids
from ...kernels.eager import top_k_ids
from .balance import Balance
from .losses import (
    entropy,
    entropy_of_means,
    global_entropy_loss,
    load_balancing_loss,
    local_entropy_loss,
    localized_loss,
    mean_over,
    mutual_information_loss,
    sequence_losses,
    smooth_load,
    sparsity_loss,
    squared_cv,
)

EXTRA = "extra."
"""Prefix of the names of the sums of ``Evidence.extra``."""


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
        """Return the sum over the non-padding tokens."""
        return per_token.sum(0) if self.valid_T is None else (per_token * _like(self.valid_T, per_token)).sum(0)

    def num_sequences(self, name: str) -> int:
        """Return the number of sequences: if the routing does not know it, from the context's field ``name``."""
        if self.routing.num_sequences is not None:
            return self.routing.num_sequences
        ids, T = None if self.context is None else getattr(self.context, name), self.routing.num_tokens
        return ids.shape[0] if ids is not None and ids.ndim and ids.shape[0] and T % ids.shape[0] == 0 else T

    @cached_property
    def share_TE(self) -> Tensor:
        """The scores normalized to sum to 1: a loss of plain sigmoid scores would shrink by lowering them all."""
        scores_TE = self.evidence.scores_TE
        assert scores_TE is not None
        return scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)

    @cached_property
    def score_E(self) -> Tensor:
        """The sum of the shares, (E,)."""
        return self.known["score"] if "score" in self.known else self.total(self.share_TE)

    @cached_property
    def modality_TG(self) -> Tensor:
        """Membership, float (T, G): 1 if a non-padding token belongs to modality g."""
        return _members(self, self.balance.num_modalities, "modality_BS")


@dataclass(frozen=True)
class Term:
    """One balance loss.

    Attributes:
        key: name of a sum that the loss needs; without it, since the evidence did not allow the sum, the loss is
            skipped.
        take: function of a pass that returns sums over its non-padding tokens, float32, by name. Terms may share a sum;
            "num_tokens" (1,) and "chosen" (E,) are always there.
        loss: function of the sums, added up over ranks, that returns the loss.
        of_scores: whether the term reads only scores, so that it applies wherever a gate has learned scores of all
            experts.
    """

    key: str
    take: Callable[[Pass], dict[str, Tensor]]
    loss: Callable[[dict[str, Tensor], Balance], Tensor]
    of_scores: bool = False


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
    score_GE, given = sums["modality_score"], balance.entropy_threshold
    threshold: Tensor | float
    if isinstance(given, tuple):
        threshold = torch.tensor(given, device=score_GE.device)
    else:
        threshold = math.log(score_GE.shape[-1]) if given is None else given
    return global_entropy_loss(score_GE, sums["modality_tokens"], threshold)


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
    # 1 + delta if the expert has the sample's type, else 1 - delta: one type per sample, so one term of the sum.
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
    """Return membership, float (T, G): 1 if a non-padding token belongs to task or modality g."""
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
    "load_balancing_loss": Term(
        "score",
        _scores,
        lambda sums, _: load_balancing_loss(_judged(sums), sums["chosen"], sums["num_tokens"][0]),
        of_scores=True,
    ),
    "importance": Term("score", _scores, lambda sums, _: squared_cv(_judged(sums)), of_scores=True),
    "mutual_information": Term("score", _informed, _information, of_scores=True),
    "local_entropy": Term("modality_entropy", _modality_entropies, _local_entropy, of_scores=True),
    "global_entropy": Term("modality_score", _modality_scores, _global_entropy, of_scores=True),
    "localized": Term("localized", _localized, _localized_balance, of_scores=True),
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
    "router_z_loss": Term("square", _squares, lambda sums, _: mean_over(sums["square"][0], sums["num_tokens"][0])),
    "load": Term("load", _smooth_loads, lambda sums, _: squared_cv(sums["load"])),
    "gate_budget": Term(
        "gate_distance",
        _gate_distance,
        lambda sums, _: mean_over(sums["gate_distance"][0], sums["num_tokens"][0]),
    ),
}
"""The balance losses by name, in the order they are added. Each is a field of ``BalanceWeights``."""
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


def balance_sums(
    routing: Decision,
    wanted: frozenset[str],
    balance: Balance = Balance(),
    context: RoutingContext | None = None,
    shared_gate_T: Tensor | None = None,
) -> dict[str, Tensor]:
    """Return the sums over tokens that the ``wanted`` terms are functions of; float32, on the routing's device.

    Sums of different ranks add up, and each term is computed from the added sums only.

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


def _like(valid_T: Tensor, per_token: Tensor) -> Tensor:
    return valid_T.to(per_token.dtype).reshape(-1, *(1,) * (per_token.ndim - 1))
