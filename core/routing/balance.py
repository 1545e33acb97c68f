"""Balance losses: pure functions of sums over tokens, and the step of the selection bias.

Every term is a function of sums over the tokens of *all* ranks and micro-steps it is given, with its denominator in the
signature, so that a loss is the same however the tokens are split over ranks.
"""

from __future__ import annotations

from dataclasses import dataclass, fields

import torch
from torch import Tensor

from ..contract import Routing

TERMS = ("load_balancing", "router_z", "importance", "load")


@dataclass(frozen=True)
class Balance:
    """Weights of the balance losses of a layer. A term that does not apply to the router is skipped while it is at its
    default, and refused when set by hand.

    Attributes:
        load_balancing: ``E * sum_e f_e P_e`` (Switch, arXiv 2101.03961, eq. 4); 1 at balance.
        router_z: mean of ``logsumexp(logits)^2`` (ST-MoE, arXiv 2202.08906, eq. 5).
        importance: squared coefficient of variation of the experts' summed scores (arXiv 1701.06538, eq. 7).
        load: the same of the experts' smooth load; needs noise on the logits (arXiv 1701.06538, eq. 11).

    V-MoE's loss is ``Balance(load_balancing=0, router_z=0, importance=0.005, load=0.005)``.

    Raises:
        ValueError: a weight is negative or not finite.
    """

    load_balancing: float = 0.01
    router_z: float = 0.001
    importance: float = 0.0
    load: float = 0.0

    def __post_init__(self) -> None:
        for name, weight in self.weights().items():
            if not 0 <= weight < float("inf"):
                raise ValueError(f"balance.{name}={weight} is not a finite number >= 0")

    def weights(self) -> dict[str, float]:
        return {f.name: getattr(self, f.name) for f in fields(self)}

    def check(self, terms: frozenset[str], router: str) -> None:
        """Refuse a term that was set by hand and does not apply to the router.

        Raises:
            ValueError: naming the term and the router.
        """
        for f in fields(self):
            weight = getattr(self, f.name)
            if weight and weight != f.default and f.name not in terms:
                why = " without noise on its logits, or with a bias or group limits" if f.name == "load" else ""
                raise ValueError(f"balance.{f.name}={weight} does not apply to {router}{why}")


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
    """``CV(sum over tokens of the scores)^2`` (arXiv 2106.05974, eq. 6)."""
    return squared_cv(score_sum_E)


def load_loss(load_E: Tensor) -> Tensor:
    """``CV(sum over tokens of P(the expert is chosen under fresh noise))^2``; see ``smooth_load``."""
    return squared_cv(load_E)


def router_z_loss(square_sum: Tensor, num_tokens: Tensor | float) -> Tensor:
    """Mean over tokens of ``logsumexp(logits)^2``, from its sum."""
    return square_sum / _at_least_one(num_tokens)


def smooth_load(logits_TE: Tensor, threshold_TE: Tensor, noise_std: float | Tensor) -> Tensor:
    """Probability that fresh noise lifts each logit over what it had to reach, (T, E)."""
    return torch.special.ndtr((logits_TE - threshold_TE) / noise_std)


def _at_least_one(n: Tensor | float) -> Tensor | float:
    return n.clamp_min(1) if isinstance(n, Tensor) else max(n, 1)


def balance_sums(routing: Routing, wanted: frozenset[str]) -> dict[str, Tensor]:
    """The sums over tokens that the ``wanted`` terms are functions of; float32, on the routing's device.

    Sums of different ranks add up, and each term is computed from the added sums alone.
    """
    valid_T, scores_TE = routing.valid_T, routing.scores_TE

    def total(per_token: Tensor) -> Tensor:
        return per_token.sum(0) if valid_T is None else (per_token * _like(valid_T, per_token)).sum(0)

    chosen_E = routing.chosen_per_expert_E.to(torch.float32)
    tokens = chosen_E.new_tensor(routing.num_tokens) if valid_T is None else valid_T.sum().to(torch.float32)
    sums = {"num_tokens": tokens.reshape(1), "chosen": chosen_E}
    if scores_TE is not None and wanted & {"load_balancing", "importance"}:
        # Sigmoid scores are brought to sum 1, or the loss would shrink by lowering them all.
        sums["score"] = total(scores_TE / scores_TE.sum(-1, keepdim=True).clamp_min(1e-20))
    if routing.logits_TE is not None and "router_z" in wanted:
        sums["square"] = total(routing.logits_TE.logsumexp(-1).square()).reshape(1)
    noise, logits_TE = routing.noise_std, routing.logits_TE
    if routing.threshold_TE is not None and noise is not None and logits_TE is not None and "load" in wanted:
        sums["load"] = total(smooth_load(logits_TE, routing.threshold_TE, noise))
    return sums


def balance_terms(sums: dict[str, Tensor]) -> dict[str, Tensor]:
    """The unweighted terms that ``sums`` allow."""
    terms = {}
    if "score" in sums:
        terms["load_balancing"] = load_balancing_loss(sums["score"], sums["chosen"], sums["num_tokens"][0])
        terms["importance"] = importance_loss(sums["score"])
    if "square" in sums:
        terms["router_z"] = router_z_loss(sums["square"][0], sums["num_tokens"][0])
    if "load" in sums:
        terms["load"] = load_loss(sums["load"])
    return terms


def expert_bias_step(chosen_per_expert_E: Tensor, rate: float) -> Tensor:
    """``rate * sign(mean load - load)``: an expert with too few tokens rises (arXiv 2408.15664, algorithm 1)."""
    load_E = chosen_per_expert_E.to(torch.float32)
    return rate * torch.sign(load_E.mean() - load_E)


def _like(valid_T: Tensor, per_token: Tensor) -> Tensor:
    return valid_T.to(per_token.dtype).reshape(-1, *(1,) * (per_token.ndim - 1))
