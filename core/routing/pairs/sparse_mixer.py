"""``SparseMixer``: two experts, each sampled in training among the experts whose logits are close to the best."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

import torch
from torch import Tensor

from ...contract import Evidence
from ...fields import Bounds, Positive
from ...kernels.eager import top_k_ids
from ..balance.terms import CHOICE_TERMS, SCORE_TERMS
from ..router import LinearGateConfig, PairRouter, Tokens
from ..selection import Choice

WHOLE = 0.25
"""Probability that the gate of a sampled expert that is not the best counts whole, and not by a third (Heun's rule)."""


class SparseMixerRouter(PairRouter):
    """The router of ``SparseMixer``: one expert after the other, each among those close to the best."""

    config: SparseMixer

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = tokens.logits(self.gate)
        left_TE, ids, gates = logits_TE, [], []
        for _ in range(2):
            id_T1, gate_T1 = self._take(logits_TE.detach(), left_TE)
            left_TE = left_TE.scatter(-1, id_T1, -torch.inf)
            ids.append(id_T1)
            gates.append(gate_T1)
        return Choice(torch.cat(ids, -1), torch.cat(gates, -1), Evidence(logits_TE.softmax(-1), logits_TE))

    def _take(self, logits_TE: Tensor, left_TE: Tensor) -> tuple[Tensor, Tensor]:
        """Return the next expert of each token and its gate, both (T, 1); experts taken before are -inf in ``left``."""
        best_T1 = top_k_ids(left_TE.detach(), 1)
        top_T1 = left_TE.detach().gather(-1, best_T1)
        # 0 / 0, if all logits are 0, is NaN and not far.
        far_TE = (top_T1 - logits_TE) / logits_TE.abs().maximum(top_T1) > 2 * self.config.jitter_eps
        near_TE = left_TE.masked_fill(far_TE, -torch.inf)
        share_TE = near_TE.softmax(-1)
        if not self.training:
            return best_T1, share_TE.gather(-1, best_T1)
        gumbel_TE = -torch.empty_like(logits_TE).exponential_().log()
        drawn_T1 = top_k_ids(near_TE.detach() + gumbel_TE, 1)
        gate_T1 = share_TE.gather(-1, drawn_T1)
        whole_T1 = (drawn_T1 == best_T1) | (torch.rand_like(gate_T1) < WHOLE)
        # Only the value is a third: the gradient is the whole gate's.
        return drawn_T1, gate_T1 - torch.where(whole_T1, 0.0, 2 / 3) * gate_T1.detach()


@dataclass(frozen=True)
class SparseMixer(LinearGateConfig):
    """SparseMixer (arXiv 2310.00811) as PhiMoE has it: of two experts the first is, in evaluation, the best, at the
    softmax over the experts that are close to it, i.e. with ``(l_best - l_e) / max(|l_e|, l_best) <= 2 jitter_eps``;
    the second is the best of the others, in the same way. So the gates of a token sum to up to 2.

    In training each is sampled from that softmax. The gate of a sampled expert that is not the best counts by a third,
    with probability 3/4, and has the gradient of the whole: Heun's third-order rule for the gradient of a sampled
    choice.

    Attributes:
        jitter_eps: half of the relative distance up to which logits are close: PhiMoE has 0.01.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2310.00811"
    router_class = SparseMixerRouter
    terms = SCORE_TERMS | CHOICE_TERMS | {"router_z_loss"}
    has_exact_gradient = False  # in training gates count by a third at the gradient of the whole

    jitter_eps: Annotated[float, Bounds(0, 1, "()")] = 0.1
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        if num_experts < 2:
            raise ValueError(f"SparseMixer takes 2 experts, num_experts={num_experts} has no second one")

    def pairs_per_token(self, num_experts: int) -> float:
        return 2.0
