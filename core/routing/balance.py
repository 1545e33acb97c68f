"""Balance losses: pure functions of sums over tokens, and the step of the selection bias.

Every term is a function of sums over the tokens of *all* ranks and micro-steps it is given, with its denominator in the
signature, so that a loss is the same however the tokens are split over ranks.
"""

from __future__ import annotations

import math
from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..contract import Routing, RoutingContext, check_kinds
from ..kernels.eager import top_k_ids
from ..registry import register_config
from .checks import clean_ids

TERMS = (
    "load_balancing",
    "router_z",
    "importance",
    "load",
    "mutual_information",
    "local_entropy",
    "global_entropy",
    "sequence_balance",
    "gate_budget",
)
# Functions of each token's scores alone: they apply wherever a gate has learned scores of all experts.
SCORE_TERMS = frozenset({"load_balancing", "importance", "mutual_information", "local_entropy", "global_entropy"})
# Of these, functions of the scores' sum alone, which a fused gate has taken on the way.
SUMMED_TERMS = frozenset({"load_balancing", "importance"})
SCOPES = ("global", "rank")
# Before the names of the sums of ``Routing.extra``.
EXTRA = "extra."


@register_config
@dataclass(frozen=True)
class Balance:
    """Weights of the balance losses of a layer. A term that does not apply to the router is skipped while it is at its
    default, and refused when set by hand.

    Attributes:
        load_balancing: ``E * sum_e f_e P_e`` (Switch, arXiv 2101.03961, eq. 4); 1 at balance.
        router_z: mean of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).
        importance: squared coefficient of variation of the experts' summed scores, which are those of all experts and
            not the gates of the chosen ones (V-MoE, arXiv 2106.05974, section A.1, and its code; arXiv 1701.06538, eq.
            7, sums the sparse gates).
        load: the same of the experts' smooth load; needs noise on the logits (arXiv 1701.06538, eq. 11).
        mutual_information: minus the mutual information of token and expert (ModuleFormer, arXiv 2306.04640), or, with
            ``num_tasks``, of task and expert (Mod-Squad, arXiv 2212.08066); in nats.
        local_entropy: mean entropy of a token's scores, summed over modalities (LIMoE, arXiv 2206.02770); in nats.
        global_entropy: ``max(0, entropy_threshold - entropy of the mean scores)``, summed over modalities (the same).
        sequence_balance: ``load_balancing`` within each sequence, the mean over sequences; the choice is the top-k of
            the scores without bias or noise (DeepSeek-V3, arXiv 2412.19437, eq. 17-20, where the weight is 1e-4).
        gate_budget: mean of ``|g - budget|``, g being the share of the routed path that ``MoEConfig.shared_gate="mix"``
            gives a token (NLLB, arXiv 2207.04672).
        num_tasks: tasks of ``mutual_information``, read from ``context.task_ids_B``; 0: it is of tokens.
        num_modalities: modalities of the entropies, read from ``context.modality_BS``; 1: all tokens are of one.
        local_entropy_modality: the only modality whose local entropy counts (LIMoE: text); None: all.
        entropy_threshold: in nats, ``log(n)`` asks for about n experts a modality; None: ``log(E)``.
        budget: share of the routed path that ``gate_budget`` asks for, in [0, 1].
        scope: "global": a term is a function of the tokens of all ranks; "rank": of each rank's own, with the mean of
            the ranks as its gradient (as Switch and most others do; cheaper, and stricter where a rank has few tokens).
        adaptive: the layer's weight of ``load_balancing`` starts at it and follows the drop rate, moved once per
            optimizer step by ``update_expert_bias`` (Skywork-MoE, arXiv 2406.06563): see ``adaptive_weight``. Needs a
            capacity factor.
        adaptive_scale, adaptive_max, adaptive_momentum: its weight per drop rate, largest weight and momentum.

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
    sequence_balance: float = 0.0
    gate_budget: float = 0.0
    num_tasks: int = 0
    num_modalities: int = 1
    local_entropy_modality: int | None = None
    entropy_threshold: float | None = None
    budget: float = 0.8
    scope: str = "global"
    adaptive: bool = False
    adaptive_scale: float = 0.2
    adaptive_max: float = 0.01
    adaptive_momentum: float = 0.99

    def __post_init__(self) -> None:
        check_kinds(self, "balance.")
        for name, weight in self.weights().items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"balance.{name}={weight} is not a finite number >= 0")
        for name, least in (("num_tasks", 0), ("num_modalities", 1)):
            if getattr(self, name) < least:
                raise ValueError(f"balance.{name}={getattr(self, name)} is not at least {least}")
        only = self.local_entropy_modality
        if only is not None and not 0 <= only < self.num_modalities:
            raise ValueError(
                f"balance.local_entropy_modality={only} is not below num_modalities={self.num_modalities}, or negative"
            )
        for name in ("adaptive_scale", "adaptive_max", "entropy_threshold"):
            value = getattr(self, name)
            if value is not None and not 0 < value < float("inf"):
                raise ValueError(f"balance.{name}={value} is not a positive number")
        if not 0 <= self.adaptive_momentum < 1:
            raise ValueError(f"balance.adaptive_momentum={self.adaptive_momentum} is not in [0, 1)")
        if not 0 <= self.budget <= 1:
            raise ValueError(f"balance.budget={self.budget} is not in [0, 1]")
        if self.scope not in SCOPES:
            raise ValueError(f"balance.scope={self.scope!r} is not one of {', '.join(SCOPES)}")
        if self.adaptive and self.load_balancing == 0:
            raise ValueError("balance.adaptive=True moves load_balancing, which is 0: its term would be left out")

    def weights(self) -> dict[str, float]:
        """The weight of each term."""
        return {name: getattr(self, name) for name in TERMS}

    def needs(self) -> tuple[str, ...]:
        """Fields of ``RoutingContext`` that the terms of positive weight read."""
        task = ("task_ids_B",) if self.mutual_information and self.num_tasks else ()
        entropies = self.local_entropy or self.global_entropy
        return task + (("modality_BS",) if entropies and self.num_modalities > 1 else ())

    def check(self, terms: frozenset[str], router: str) -> None:
        """Refuse a term that was set by hand and does not apply to the router.

        Raises:
            ValueError: naming the term and the router.
        """
        for f in fields(self):
            weight = getattr(self, f.name)
            if f.name in TERMS and weight and weight != f.default and f.name not in terms:
                why = " without noise on its logits, or with a bias or group limits" if f.name == "load" else ""
                raise ValueError(f"balance.{f.name}={weight} does not apply to {router}{why}")
        if self.adaptive and "load_balancing" not in terms:
            raise ValueError(f"balance.adaptive=True moves load_balancing, which does not apply to {router}")


def load_balancing_loss(score_sum_E: Tensor, chosen_per_expert_E: Tensor, num_tokens: Tensor | float) -> Tensor:
    """``E * sum_e f_e P_e``: 1 at balance, E when one expert takes all.

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token; ``P_e`` is it over ``num_tokens``.
        chosen_per_expert_E: (E,), pairs that chose each expert before capacity; ``f_e`` is its share of all pairs.
        num_tokens: real tokens summed over.
    """
    share_E = chosen_per_expert_E / chosen_per_expert_E.sum().clamp_min(1)
    return len(score_sum_E) * (share_E * score_sum_E).sum() / _at_least_one(num_tokens)


def squared_cv(total_E: Tensor) -> Tensor:
    """Variance over squared mean of (E,) sums, the variance over E and not E - 1; 0 at balance."""
    mean = total_E.mean()
    return (total_E - mean).square().mean() / mean.square().clamp_min(1e-20)


def importance_loss(score_sum_E: Tensor) -> Tensor:
    """``CV(sum over tokens of the scores)^2``, scores of all experts before the choice (arXiv 2106.05974, eq. 6)."""
    return squared_cv(score_sum_E)


def load_loss(load_E: Tensor) -> Tensor:
    """``CV(sum over tokens of P(the expert is chosen under fresh noise))^2``; see ``smooth_load``."""
    return squared_cv(load_E)


def router_z_loss(square_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, from its sum."""
    return square_sum / _at_least_one(num_tokens)


def entropy(p: Tensor) -> Tensor:
    """``-sum p log p`` over the last axis, in nats; the gradient is finite at 0."""
    return -(p * p.clamp_min(1e-20).log()).sum(-1)


def mutual_information_loss(score_sum_E: Tensor, entropy_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """``-I = H(expert | what is known) - H(expert)``: 0 where what is known tells nothing, ``-log(E)`` at best.

    Known is the token (arXiv 2306.04640) or its task (arXiv 2212.08066, tasks weighted by their tokens).

    Args:
        score_sum_E: (E,), sum over tokens of the scores, which sum to 1 in a token.
        entropy_sum: sum over tokens of the entropy of the token's scores, or of its task's mean scores.
        num_tokens: real tokens summed over.
    """
    num_tokens = _at_least_one(num_tokens)
    return entropy_sum / num_tokens - entropy(score_sum_E / num_tokens)


def entropy_of_means(score_sum_GE: Tensor, tokens_G: Tensor) -> Tensor:
    """Entropy of each group's mean scores, (G,), from (G, E) sums and their numbers of tokens; 0 without tokens."""
    return entropy(score_sum_GE / tokens_G.clamp_min(1)[:, None])


def local_entropy_loss(entropy_sum_G: Tensor, tokens_G: Tensor) -> Tensor:
    """Sum over modalities of the mean entropy of their tokens' scores (LIMoE): low where tokens are decided.

    Args:
        entropy_sum_G: (G,), sum of the entropies of each modality's tokens.
        tokens_G: (G,), its real tokens.
    """
    return (entropy_sum_G / tokens_G.clamp_min(1)).sum()


def global_entropy_loss(score_sum_GE: Tensor, tokens_G: Tensor, threshold: float) -> Tensor:
    """Sum over modalities that have tokens of ``max(0, threshold - H(mean scores))`` (LIMoE): 0 where each modality
    uses about ``exp(threshold)`` experts or more.

    Args:
        score_sum_GE: (G, E), sums of the scores of each modality's tokens.
        tokens_G: (G,), its real tokens.
        threshold: in nats.
    """
    return ((threshold - entropy_of_means(score_sum_GE, tokens_G)).relu() * (tokens_G > 0)).sum()


def sequence_losses(score_sum_BE: Tensor, chosen_BE: Tensor, tokens_B: Tensor) -> Tensor:
    """``E * sum_e f_e P_e`` of each sequence, (B,); 0 without tokens (arXiv 2412.19437, eq. 17-20).

    Args:
        score_sum_BE: (B, E), sums of the scores of its tokens; ``P_e`` is it over ``tokens_B``.
        chosen_BE: (B, E), pairs that chose each expert; ``f_e`` is its share of the sequence's pairs.
        tokens_B: (B,), its real tokens.
    """
    share_BE = chosen_BE / chosen_BE.sum(-1, keepdim=True).clamp_min(1)
    return score_sum_BE.shape[-1] * (share_BE * score_sum_BE).sum(-1) / tokens_B.clamp_min(1)


def sequence_balance_loss(loss_sum: Tensor, num_sequences: Tensor | float) -> Tensor:
    """Mean of ``sequence_losses`` over the sequences that have real tokens, from their sum."""
    return loss_sum / _at_least_one(num_sequences)


def gate_budget_loss(distance_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of ``|g - budget|`` (arXiv 2207.04672), from its sum."""
    return distance_sum / _at_least_one(num_tokens)


def adaptive_weight(weight: Tensor, drop_rate: Tensor, balance: Balance) -> Tensor:
    """The next weight of ``load_balancing``: ``m * weight + (1 - m) * min(scale * drop_rate, max)`` with momentum m
    (Skywork-MoE, arXiv 2406.06563, section 4.2; there scale 1/5, max 0.01, momentum 0.99)."""
    target = (balance.adaptive_scale * drop_rate).clamp_max(balance.adaptive_max)
    return balance.adaptive_momentum * weight + (1 - balance.adaptive_momentum) * target


def smooth_load(logits_TE: Tensor, threshold_TE: Tensor, noise_std: float | Tensor) -> Tensor:
    """Probability that fresh noise lifts each logit over what it had to reach, (T, E)."""
    return torch.special.ndtr((logits_TE - threshold_TE) / noise_std)


def _at_least_one(n: Tensor | float) -> Tensor | float:
    return n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1)


def balance_sums(
    routing: Routing,
    wanted: frozenset[str],
    balance: Balance = Balance(),
    context: RoutingContext | None = None,
    shared_gate_T: Tensor | None = None,
) -> dict[str, Tensor]:
    """The sums over tokens that the ``wanted`` terms are functions of; float32, on the routing's device.

    Sums of different ranks add up, and each term is computed from the added sums alone.

    Args:
        routing: one pass of a layer.
        wanted: names of terms.
        balance: how many tasks and modalities there are.
        context: where they are read. Ids out of range belong to none where they are not refused (GPU, compiled code).
        shared_gate_T: as in ``Entry``.

    Raises:
        ValueError: the context lacks what a wanted term reads, or it has another shape, no integers, or (on CPU) an id
            of a real token that is out of range.
    """
    valid_T, scores_TE, known = routing.valid_T, routing.scores_TE, routing.sums or {}

    def total(per_token: Tensor) -> Tensor:
        return per_token.sum(0) if valid_T is None else (per_token * _like(valid_T, per_token)).sum(0)

    chosen = routing.chosen_per_expert_E if routing.balance_chosen is None else routing.balance_chosen
    chosen_E = chosen.to(torch.float32)
    tokens = chosen_E.new_full((), routing.num_tokens) if valid_T is None else valid_T.sum().to(torch.float32)
    sums = {"num_tokens": tokens.reshape(1), "chosen": chosen_E}
    if scores_TE is not None and wanted & (SCORE_TERMS | {"sequence_balance"}):
        share_TE = scores_TE
        if "score" not in known or wanted & (SCORE_TERMS - SUMMED_TERMS | {"sequence_balance"}):
            # Sigmoid scores are brought to sum 1, or the loss would shrink by lowering them all.
            share_TE = scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20)
        if wanted & (SUMMED_TERMS | {"mutual_information"}):
            sums["score"] = known["score"] if "score" in known else total(share_TE)
            if routing.balance_scores is not None:
                sums["balance_score"] = total(routing.balance_scores)
        if "mutual_information" in wanted and balance.num_tasks:
            task_TG = _members(routing, balance.num_tasks, context, "task_ids_B")
            sums["task_score"], sums["task_tokens"] = task_TG.T @ share_TE, task_TG.sum(0)
        elif "mutual_information" in wanted:
            sums["entropy"] = total(entropy(share_TE)).reshape(1)
        if wanted & {"local_entropy", "global_entropy"}:
            modality_TG = _members(routing, balance.num_modalities, context, "modality_BS")
            sums["modality_tokens"] = modality_TG.sum(0)
            if "local_entropy" in wanted:
                sums["modality_entropy"] = entropy(share_TE) @ modality_TG
            if "global_entropy" in wanted:
                sums["modality_score"] = modality_TG.T @ share_TE
        if "sequence_balance" in wanted and routing.num_sequences is not None and routing.top_k is not None:
            sums["sequence_loss"], sums["num_sequences"] = _sequence_sums(routing, share_TE)
    if routing.logits_TE is not None and "router_z" in wanted:
        square = known.get("square")
        sums["square"] = total(routing.logits_TE.logsumexp(-1).square()).reshape(1) if square is None else square
    noise, logits_TE = routing.noise_std, routing.logits_TE
    if routing.threshold_TE is not None and noise is not None and logits_TE is not None and "load" in wanted:
        sums["load"] = total(smooth_load(logits_TE, routing.threshold_TE, noise))
    if shared_gate_T is not None and "gate_budget" in wanted:
        sums["gate_distance"] = total((shared_gate_T - balance.budget).abs()).reshape(1)
    for name, value_T in (routing.extra or {}).items():
        if name in wanted:
            sums[EXTRA + name] = total(value_T).reshape(1)
    return sums


def _members(routing: Routing, count: int, context: RoutingContext | None, name: str) -> Tensor:
    """float (T, G), 1 where a real token is of task or modality g."""
    assert routing.scores_TE is not None
    scores_TE, valid_T = routing.scores_TE, routing.valid_T
    T = scores_TE.shape[0]
    if name == "modality_BS" and count == 1:
        member_TG = scores_TE.new_ones(T, 1)
    else:
        ids = None if context is None else getattr(context, name)
        if ids is None:
            raise ValueError(f"the balance losses need context.{name}, which is None")
        if T == 0:
            return scores_TE.new_zeros(0, count)
        B = routing.num_sequences
        if B is None:  # as the ids say it, where that can be
            B = ids.shape[0] if ids.ndim and ids.shape[0] and T % ids.shape[0] == 0 else T
        real_BS = None if valid_T is None else valid_T.unflatten(0, (B, T // B))
        if name == "task_ids_B":  # a task is one number a sequence, a modality one a token
            ids_B = clean_ids(ids, (B,), None if real_BS is None else real_BS.any(1), name, count)
            ids_T = ids_B.repeat_interleave(T // B)
        else:
            ids_T = clean_ids(ids, (B, T // B), real_BS, name, count).flatten()
        member_TG = (ids_T[:, None] == torch.arange(count, device=ids.device)).to(scores_TE.dtype)
    return member_TG if valid_T is None else member_TG * valid_T[:, None]


def _sequence_sums(routing: Routing, share_TE: Tensor) -> tuple[Tensor, Tensor]:
    """Sum of the sequences' losses, (1,), and the number of those that have real tokens, (1,)."""
    B, K = routing.num_sequences, routing.top_k
    assert B is not None
    assert K is not None
    T = share_TE.shape[0]
    real_T1 = share_TE.new_ones(T, 1) if routing.valid_T is None else _like(routing.valid_T, share_TE)
    # By the logits, whose order the scores have: those of large logits are equal in float32.
    best_TK = top_k_ids((share_TE if routing.logits_TE is None else routing.logits_TE).detach(), K)
    chosen_TE = torch.zeros_like(share_TE).scatter_(-1, best_TK, 1.0) * real_T1
    of_sequence = (B, T // max(B, 1))
    score_BE = (share_TE * real_T1).unflatten(0, of_sequence).sum(1)
    tokens_B = real_T1.unflatten(0, of_sequence).sum((1, 2))
    losses_B = sequence_losses(score_BE, chosen_TE.unflatten(0, of_sequence).sum(1), tokens_B)
    return losses_B.sum().reshape(1), (tokens_B > 0).sum().to(losses_B.dtype).reshape(1)


def balance_terms(sums: dict[str, Tensor], balance: Balance = Balance()) -> dict[str, Tensor]:
    """The unweighted terms that ``sums`` allow; ``balance`` holds their options."""
    terms = {}
    if "score" in sums:
        tokens = sums["num_tokens"][0]
        judged = sums.get("balance_score", sums["score"])
        terms["load_balancing"] = load_balancing_loss(judged, sums["chosen"], tokens)
        terms["importance"] = importance_loss(judged)
        if "entropy" in sums:
            terms["mutual_information"] = mutual_information_loss(sums["score"], sums["entropy"][0], tokens)
        if "task_score" in sums:
            score_GE, tokens_G = sums["task_score"], sums["task_tokens"]
            entropy_sum = (tokens_G * entropy_of_means(score_GE, tokens_G)).sum()
            # Over the tokens that have a task: others tell nothing of it.
            terms["mutual_information"] = mutual_information_loss(score_GE.sum(0), entropy_sum, tokens_G.sum())
    if "modality_entropy" in sums:
        entropy_G, tokens_G = sums["modality_entropy"], sums["modality_tokens"]
        only = balance.local_entropy_modality
        kept = slice(None) if only is None else slice(only, only + 1)
        terms["local_entropy"] = local_entropy_loss(entropy_G[kept], tokens_G[kept])
    if "modality_score" in sums:
        threshold = balance.entropy_threshold
        threshold = math.log(sums["modality_score"].shape[-1]) if threshold is None else threshold
        terms["global_entropy"] = global_entropy_loss(sums["modality_score"], sums["modality_tokens"], threshold)
    if "sequence_loss" in sums:
        terms["sequence_balance"] = sequence_balance_loss(sums["sequence_loss"][0], sums["num_sequences"][0])
    if "square" in sums:
        terms["router_z"] = router_z_loss(sums["square"][0], sums["num_tokens"][0])
    if "load" in sums:
        terms["load"] = load_loss(sums["load"])
    if "gate_distance" in sums:
        terms["gate_budget"] = gate_budget_loss(sums["gate_distance"][0], sums["num_tokens"][0])
    for name in sums:
        if name.startswith(EXTRA):
            terms[name.removeprefix(EXTRA)] = sums[name][0] / _at_least_one(sums["num_tokens"][0])
    return terms


def expert_bias_step(chosen_per_expert_E: Tensor, rate: float) -> Tensor:
    """``rate * sign(mean load - load)``: an expert with too few tokens rises (arXiv 2408.15664, algorithm 1)."""
    load_E = chosen_per_expert_E.to(torch.float32)
    return rate * torch.sign(load_E.mean() - load_E)


def _like(valid_T: Tensor, per_token: Tensor) -> Tensor:
    return valid_T.to(per_token.dtype).reshape(-1, *(1,) * (per_token.ndim - 1))
