"""``ReLURouting``: gates are rectified logits, so that the number of experts per token is learned without a top-k."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated, Any

import torch
from torch import Tensor

from ...contract import Evidence
from ...contract.checks import at_most_experts
from ...fields import Bounds, Count, Positive
from ...kernels.eager import top_k_ids
from ..gates import LinearGate
from ..router import LinearGateConfig, PairRouter, Tokens
from ..selection import Capacity, Choice
from .smooth import DENSE_TERMS

LEAST_WEIGHT, MOST_WEIGHT = 1e-12, 1e4
"""Bounds of the weight of the L1 norm, which else would leave float32 where no weight reaches the target."""


def next_l1_weight(weight: Tensor, positive_share: Tensor, target: float, factor: float) -> Tensor:
    """Return ``weight * factor^sign(share - target)``: it rises while tokens take too many experts (ReMoE, arXiv
    2412.14711), within ``LEAST_WEIGHT`` and ``MOST_WEIGHT``.

    Args:
        weight: (), the weight of the L1 norm.
        positive_share: (), the share of positive gates among all tokens and experts: 1 minus the paper's sparsity.
        target: wanted share, K / E.
        factor: alpha, above 1.
    """
    return (weight * factor ** torch.sign(positive_share - target)).clamp(LEAST_WEIGHT, MOST_WEIGHT)


class ReLURouter(PairRouter):
    """The router of ``ReLURouting``: every expert whose logit is positive.

    Attributes:
        gate: the gate of evaluation, which ``sparsity`` holds down.
        dense_gate: with ``dense_training`` the other gate, which takes half of the tokens in training; else None.
        l1_weight: float32 () buffer, the weight of ``sparsity``.
    """

    config: ReLURouting
    l1_weight: Tensor
    dense_gate: LinearGate | None
    num_counts = 2

    def __init__(self, dim: int, num_experts: int, config: ReLURouting, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.dense_gate = config.make_gate(dim, num_experts) if config.dense_training else None
        self.register_buffer("l1_weight", torch.tensor(config.l1_start, dtype=torch.float32))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.l1_weight.fill_(self.config.l1_start)

    def moving_weights(self) -> dict[str, Tensor]:
        return {"sparsity": self.l1_weight}

    @torch.no_grad()
    def after_counts(self, counts: Tensor) -> None:
        positive, places = counts
        moved = next_l1_weight(
            self.l1_weight, positive / places.clamp_min(1), self.config.top_k / self.num_experts, self.config.l1_factor
        )
        # In place: a compiled layer and a captured graph see the same buffer.
        self.l1_weight.copy_(torch.where(places > 0, moved, self.l1_weight))

    def choose(self, tokens: Tokens) -> Choice:
        config, E = self.config, self.num_experts
        logits_TE = tokens.logits(self.gate)
        scores_TE = logits_TE.relu()
        positive_TE = (scores_TE > 0) & tokens.real_T[:, None]
        counts = torch.stack((positive_TE.sum(), tokens.real_T.sum() * E)).to(torch.float32)
        gates_TE = scores_TE
        if self.training and self.dense_gate is not None:
            dense_TE = tokens.logits(self.dense_gate).relu()
            gates_TE = torch.where(torch.rand_like(dense_TE[:, :1]) < 0.5, dense_TE, scores_TE)
        dense = self.training and config.dense_training
        places = E if dense else config.max_k or E
        ids_TK = top_k_ids(gates_TE.detach(), places)
        gates_TK = gates_TE.gather(-1, ids_TK)
        # A gate of 0 has gradient 0: leaving such pairs out is exact.
        ids_TK = torch.where(gates_TK > 0, ids_TK, E)
        evidence = Evidence(scores_TE, logits_TE, sparse_scores=scores_TE / config.top_k, counts=counts)
        return Choice(ids_TK, gates_TK, evidence, priority_T=gates_TE.amax(-1))

    def _apply(self, fn: Any, recurse: bool = True) -> ReLURouter:
        before = self.l1_weight
        super()._apply(fn, recurse)
        if self.l1_weight.dtype != before.dtype:
            # float16 has no 1e-8: keep the dtype, and the value unrounded.
            self.l1_weight = before.to(self.l1_weight.device)
        return self


@dataclass(frozen=True)
class ReLURouting(LinearGateConfig):
    """ReMoE (arXiv 2412.14711): the gates are ``relu(W x)``, and a token takes every expert whose gate is positive. No
    step is taken on the way, so the output is continuous in the gate's weights. A token without a positive logit comes
    out zero, and the block's residual carries it.

    The number of experts per token is learned. Their mean is held at ``top_k`` by the router's own loss ``sparsity``,
    ``1 / (K T) sum_e n_e mean_e E`` with ``n_e`` the tokens whose gate of e is positive and ``mean_e`` the mean gate:
    the paper's L1 norm with load balancing. Its weight is a buffer that ``update_expert_bias`` updates once per step:
    times ``l1_factor`` if the tokens of all ranks took more than ``top_k`` experts on average, by ``1 / l1_factor``
    if fewer. The paper has one weight for all layers and the mean of their sparsity; here each layer has its own.

    Attributes:
        top_k: mean number of experts per token, K, that the weight steers to.
        max_k: places of a token, which bound its experts; None: E.
        l1_start: weight of ``sparsity`` before the first step.
        l1_factor: factor of the weight per step, alpha. The paper's 1.2 is for tens of thousands of steps; in runs of a
            few hundred it makes the number of experts swing, and 1.05 holds it.
        dense_training: whether a second gate without ``sparsity`` is trained next to the first one: in training each
            token takes, with probability 1/2 each, the experts of the one or of the other, in E places; evaluation only
            knows the first one. Then experts that sparse tokens leave out are trained too (after RankMixer, arXiv
            2507.15551, which has two such gates; how they share the tokens is our choice).
        gate_bias: whether the logits are ``W x + b`` with a learned b. The paper has none; but if tokens are spread
            evenly around 0, half of the logits ``W x`` are positive whatever W is, and no weight reaches the target.
        init_scale: variance of the gates' initial weights times D.
    """

    paper = "2412.14711"
    router_class = ReLURouter
    # The L1 norm balances the load already; without a softmax logits have no sum for the z-loss to hold down.
    terms = DENSE_TERMS

    top_k: Count = 2
    max_k: int | None = None
    l1_start: Annotated[float, Bounds(LEAST_WEIGHT, MOST_WEIGHT, "[]")] = 1e-8
    l1_factor: Annotated[float, Bounds(1, ends="()", why="the weight would not follow the experts taken")] = 1.2
    dense_training: bool = False
    gate_bias: bool = True
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.max_k is not None and self.max_k < self.top_k:
            raise ValueError(f"max_k={self.max_k} is less than top_k={self.top_k}, the mean that it has to allow")

    def check(self, num_experts: int) -> None:
        at_most_experts("top_k", self.top_k, num_experts)
        at_most_experts("max_k", self.max_k, num_experts)

    @property
    def extra_weights(self) -> dict[str, float]:
        return {"sparsity": self.l1_start}

    def pairs_per_token(self, num_experts: int) -> float:
        """Return the mean that is steered to; a new router takes about half of all experts."""
        return float(self.top_k)

    def make_gate(self, dim: int, num_experts: int) -> LinearGate:
        return LinearGate(dim, num_experts, self.init_scale, self.gate_bias)

    def num_params(self, dim: int, num_experts: int) -> int:
        return (dim + self.gate_bias) * num_experts * (2 if self.dense_training else 1)
