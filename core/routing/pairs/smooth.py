"""Routers that are smooth in their weights, or start so: dense gates, DSelect-k, and dense-to-sparse annealing.

They compute more than a few experts per token, in training or for ever: every place of a token is static, and pairs of
weight 0 (or below a threshold) are left out, so that computation falls as the gates become sparse.
"""

from __future__ import annotations

import math
from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ...contract import Evidence
from ...contract.checks import at_most_experts
from ...fields import Count, NotNegative, Positive, ShareBelowOne
from ...kernels.eager import check_devices, top_k_ids
from ..balance.losses import entropy
from ..balance.terms import SCORE_TERMS
from ..gates import init_gate_
from ..router import LinearGateConfig, PairRouter, RouterConfig, Tokens
from ..selection import Capacity, Choice

# Where (nearly) every token takes every expert the shares of pairs are equal, and the term is constant.
DENSE_TERMS = SCORE_TERMS - {"load_balancing_loss"}


class DenseRouter(PairRouter):
    """The router of ``Dense``: every expert for every token."""

    config: Dense

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = tokens.logits(self.gate)
        scores_TE = logits_TE.softmax(-1)
        places = self.num_experts if self.training else self.config.eval_top_k or self.num_experts
        ids_TK = top_k_ids(logits_TE.detach(), places)
        return Choice(ids_TK, scores_TE.gather(-1, ids_TK), Evidence(scores_TE, logits_TE))


@dataclass(frozen=True)
class Dense(LinearGateConfig):
    """``y = sum over all e of softmax(W x)_e f_e(x)``: the classic mixture of experts, all E computed for every token.

    With ``eval_top_k`` evaluation is sparse (DS-MoE, arXiv 2404.05567: dense training, sparse inference): a token takes
    its best experts with their gates as they are, not brought to sum 1. ``Balance(mutual_information=...)`` is the
    paper's loss, which makes the gates sharp and the experts equally used.

    Attributes:
        eval_top_k: experts per token in evaluation; None: all.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2404.05567"
    router_class = DenseRouter
    terms = DENSE_TERMS | {"router_z_loss"}

    eval_top_k: Count | None = None
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        at_most_experts("eval_top_k", self.eval_top_k, num_experts)

    def constant_gates(self, num_experts: int) -> tuple[float, ...] | None:
        return (1.0,) if num_experts == 1 else None

    def pairs_per_token(self, num_experts: int) -> float:
        return float(num_experts)


def smooth_step(z: Tensor, gamma: float) -> Tensor:
    """Return ``-2 / gamma^3 z^3 + 3 / (2 gamma) z + 1 / 2``, exactly 0 from ``-gamma / 2`` down and exactly 1 from
    ``gamma / 2`` up (arXiv 2106.03760); its derivative is 0 at both ends."""
    t = (z / gamma).clamp(-0.5, 0.5)
    return t * (1.5 - 2 * t * t) + 0.5


def selectors(codes: Tensor, num_experts: int, gamma: float) -> Tensor:
    """Return single-expert selectors: ``r_e = prod over bits j of S(z_j)`` where bit j of e is set, else ``1 - S(z_j)``
    (arXiv 2106.03760).

    Args:
        codes: (..., m) z, ``m = ceil(log2 E)``, the lowest bit first.
        num_experts: E.
        gamma: width of the smooth step.

    Returns:
        (..., E), which sums to 1 over all ``2^m`` codes: to less over E if the unused ones have weight.
    """
    step = smooth_step(codes, gamma)
    r = codes.new_ones(*codes.shape[:-1], 1)
    for bit in step.unbind(-1):
        r = torch.cat((r * (1 - bit[..., None]), r * bit[..., None]), -1)
    return r[..., :num_experts]


def selector_entropy(r_TKE: Tensor) -> Tensor:
    """Return the sum of the entropies of a token's selectors, (T,), in nats: 0 once the codes are binary."""
    return entropy(r_TKE).sum(-1)


def reachability(r_TKE: Tensor) -> Tensor:
    """Return the sum over a token's selectors of ``1 / sum_e r_e``, (T,): K if no weight is on codes without an
    expert, as always for E a power of 2 (arXiv 2106.03760 and its code). Sums below 0.01 count as 0.01."""
    return r_TKE.sum(-1).clamp_min(0.01).reciprocal().sum(-1)


class SelectorGate(nn.Module):
    """The codes and weights of K selectors: linear in the token, or equal for all tokens.

    Args:
        dim: D.
        num_experts: E, encoded in ``m = ceil(log2 E)`` bits.
        top_k: K.
        gamma: width of the smooth step.
        per_token: whether they depend on the token.
        init_scale: variance times D of the initial weights, the codes' in units of ``gamma``.
    """

    def __init__(
        self, dim: int, num_experts: int, top_k: int, gamma: float, per_token: bool, init_scale: float
    ) -> None:
        super().__init__()
        self.top_k, self.gamma, self.per_token, self.init_scale = top_k, gamma, per_token, init_scale
        codes = top_k * (num_experts - 1).bit_length()
        self.code_weight = nn.Parameter(torch.empty(codes, dim if per_token else 1))
        self.weight = nn.Parameter(torch.empty(top_k, dim if per_token else 1))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        init_gate_(self.code_weight, self.init_scale * self.gamma**2)
        init_gate_(self.weight, self.init_scale)

    def forward(self, x_TD: Tensor) -> tuple[Tensor, Tensor]:
        """Return the codes z (T, K, m) of float32 (T, D) tokens, and the selectors' weights (T, K), which sum to 1."""
        check_devices(x_TD, type(self).__name__, self._parameters)
        if not self.per_token:
            x_TD = x_TD.new_ones(x_TD.shape[0], 1)
        # A matrix product with one input of 1 would count FLOPs.
        linear = F.linear if self.per_token else lambda x, weight: x * weight.T
        codes = linear(x_TD, self.code_weight.to(x_TD.dtype))
        logits = linear(x_TD, self.weight.to(x_TD.dtype))
        return codes.unflatten(-1, (self.top_k, -1)), logits.softmax(-1)


class DSelectKRouter(PairRouter):
    """The router of ``DSelectK``: weighted single-expert selectors."""

    config: DSelectK

    def choose(self, tokens: Tokens) -> Choice:
        config, E = self.config, self.num_experts
        codes, weights_TK = self.gate(tokens.x_TD)
        r_TKE = selectors(codes, E, config.gamma)
        scores_TE = (weights_TK[..., None] * r_TKE).sum(1)
        places = config.max_k or E
        if not self.training:
            places = config.eval_max_k or places
        best_TK = top_k_ids(scores_TE.detach(), places)
        gates_TK = scores_TE.gather(-1, best_TK)
        if places < E:
            # The weight that is cut off is shared out, so that the sum of a token's gates stays.
            gates_TK = gates_TK * (scores_TE.sum(-1, keepdim=True) / gates_TK.sum(-1, keepdim=True).clamp_min(1e-20))
        extra = {}
        if self.training:  # evaluation has no use for them
            if "selector_entropy" in self.extra_weights:
                extra["selector_entropy"] = selector_entropy(r_TKE)
            if "reachability" in self.extra_weights and E & (E - 1):
                extra["reachability"] = reachability(r_TKE)
        # Weight 0 has gradient 0 (the smooth step is flat there): leaving such pairs out is exact.
        ids_TK = torch.where(gates_TK > 0, best_TK, E)
        return Choice(ids_TK, gates_TK, Evidence(scores_TE, extra=extra))


@dataclass(frozen=True)
class DSelectK(RouterConfig):
    """DSelect-k (arXiv 2106.03760): K selectors that each learn the binary code of one expert, through a smooth step
    that is flat at 0 and 1, and a softmax over the selectors: ``q_e = sum_k softmax(a)_k r_e(z_k)``. Smooth in all
    weights; at most K experts have weight once every code is binary.

    Until then up to all E have. Each token has ``max_k`` places, E by default, and pairs of weight 0 are not computed:
    exact in training and evaluation, dense at the start, K experts per token in the end. A lower ``max_k`` or
    ``eval_max_k`` bounds the cost; the gates that stay then take over the weight of those left out.

    If E is not a power of 2 some codes have no expert. Weight on them is lost to the output (a selector wholly on
    them gives 0), and ``reachability`` holds it down, as in the paper.

    Attributes:
        top_k: selectors, K.
        gamma: width of the smooth step.
        per_token: codes and weights are linear in the token; False: parameters, the same experts for all tokens.
        max_k: places of a token; None: E.
        eval_max_k: the same in evaluation; None: as in training. K is exact once the codes are binary.
        selector_entropy: weight of the selectors' entropy, which drives the codes to be binary; tuned in the paper.
        reachability: weight of the mean of ``1 / (weight on codes with an expert)``, if E is not a power of 2.
        init_scale: variance times D of the initial weights, the codes' in units of ``gamma``: small, for codes beyond
            ``gamma / 2`` have no gradient.
    """

    paper = "2106.03760"
    router_class = DSelectKRouter
    can_grow = False
    terms = DENSE_TERMS

    top_k: Count = 2
    gamma: Positive = 1.0
    per_token: bool = True
    max_k: int | None = None
    eval_max_k: int | None = None
    selector_entropy: NotNegative = 0.01
    reachability: NotNegative = 0.1
    init_scale: Positive = 0.01

    def __post_init__(self) -> None:
        super().__post_init__()
        for name in ("max_k", "eval_max_k"):
            value = getattr(self, name)
            if value is not None and value < self.top_k:
                raise ValueError(f"{name}={value} is less than top_k={self.top_k}, the experts of binary codes")

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"DSelectK has nothing to select among num_experts={num_experts}")
        for name in ("top_k", "max_k", "eval_max_k"):
            at_most_experts(name, getattr(self, name), num_experts)

    @property
    def extra_weights(self) -> dict[str, float]:
        return {name: getattr(self, name) for name in ("selector_entropy", "reachability") if getattr(self, name)}

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the largest number, at the start of training; ``top_k`` once the codes are binary."""
        return float(self.max_k or num_experts)

    def make_gate(self, dim: int, num_experts: int) -> SelectorGate:
        return SelectorGate(dim, num_experts, self.top_k, self.gamma, self.per_token, self.init_scale)

    def num_params(self, dim: int, num_experts: int) -> int:
        return (dim if self.per_token else 1) * self.top_k * ((num_experts - 1).bit_length() + 1)

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * self.num_params(dim, num_experts) if self.per_token else 0


def falling_temperature(num_steps: Tensor, start: float, end: float, anneal_steps: int) -> Tensor:
    """Return the temperature after so many steps, float32 (): ``start (end / start)^(steps / anneal_steps)``, then
    ``end``."""
    share = (num_steps.to(torch.float32) / anneal_steps).clamp_max(1.0)
    return start * (share * math.log(end / start)).exp()


def check_falls(tau_start: float, tau_end: float) -> None:
    """Raise a ``ValueError`` if a temperature rises."""
    if tau_end > tau_start:
        raise ValueError(f"tau_end={tau_end} is above tau_start={tau_start}: the temperature has to fall")


class DenseToSparseRouter(PairRouter):
    """The router of ``DenseToSparse``: all experts above a threshold, at a falling temperature.

    Attributes:
        num_steps: int64 () buffer, the optimizer steps so far.
    """

    config: DenseToSparse
    num_steps: Tensor

    def __init__(self, dim: int, num_experts: int, config: DenseToSparse, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.register_buffer("num_steps", torch.zeros((), dtype=torch.int64))

    @property
    def temperature(self) -> Tensor:
        """The temperature of this step; see ``falling_temperature``."""
        config = self.config
        return falling_temperature(self.num_steps, config.tau_start, config.tau_end, config.anneal_steps)

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.num_steps.zero_()

    @torch.no_grad()
    def after_step(self) -> None:
        self.num_steps += 1

    def choose(self, tokens: Tokens) -> Choice:
        config = self.config
        logits_TE = tokens.logits(self.gate)
        tau = self.temperature.to(logits_TE.dtype)
        # The losses see the clean logits, as everywhere; noise only explores.
        noisy_TE, scores_TE = logits_TE, (logits_TE / tau).softmax(-1)
        gates_TE = scores_TE
        if self.training:
            gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
            noisy_TE = logits_TE + gumbel_TE
            gates_TE = (noisy_TE / tau).softmax(-1)
        best_TK = top_k_ids(noisy_TE.detach(), config.max_k or self.num_experts)
        gates_TK = gates_TE.gather(-1, best_TK)
        above_TK = gates_TK > config.threshold
        above_TK = torch.cat((torch.ones_like(above_TK[:, :1]), above_TK[:, 1:]), -1)
        ids_TK = torch.where(above_TK, best_TK, self.num_experts)
        return Choice(ids_TK, gates_TK, Evidence(scores_TE, logits_TE))


@dataclass(frozen=True)
class DenseToSparse(LinearGateConfig):
    """Dense-to-sparse gate (EvoMoE, arXiv 2112.14397): gates ``softmax((W x + gumbel) / tau)``, the noise only in
    training; experts whose gate is not above ``threshold`` are left out, and the gates of the others stay as they are.
    At a high temperature tau nearly all experts stay, at a low one few: the best is always taken.

    The temperature falls from ``tau_start`` to ``tau_end`` by the same factor each optimizer step, for ``anneal_steps``
    steps: ``update_expert_bias(model, tape)``, called once per step, counts them. The count is part of the state.

    Attributes:
        tau_start, tau_end: temperatures.
        anneal_steps: optimizer steps between them.
        threshold: bound that a gate has to exceed.
        max_k: places of a token; None: E. Experts beyond it are left out.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2112.14397"
    router_class = DenseToSparseRouter
    terms = SCORE_TERMS | {"router_z_loss"}

    tau_start: Positive = 2.0
    tau_end: Positive = 0.3
    anneal_steps: Count = 10_000
    threshold: ShareBelowOne = 0.01
    max_k: Count | None = None
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        check_falls(self.tau_start, self.tau_end)

    def check(self, num_experts: int) -> None:
        at_most_experts("max_k", self.max_k, num_experts)
        if num_experts > 1 and self.threshold * num_experts >= 1:
            raise ValueError(
                f"threshold={self.threshold} is not below 1 / {num_experts}, the gates of num_experts={num_experts} "
                "taken alike: training would not start dense"
            )

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the largest number, at the start of training."""
        return float(self.max_k or num_experts)
