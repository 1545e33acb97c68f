"""Routers whose experts get equally many tokens in training: an assignment, exact (BASE) or relaxed (Sinkhorn)."""

from __future__ import annotations

import math
from dataclasses import dataclass
from typing import Literal

from torch import Tensor

from ...contract import Evidence
from ...fields import Count, Positive
from ...kernels.assign import balanced_assignment
from ...kernels.eager import top_k_ids
from ..router import FixedKConfig, LinearGateConfig, PairRouter, Tokens
from ..selection import Choice


class BaseRouter(PairRouter):
    """The router of ``Base``: one expert per token, equally many tokens per expert in training."""

    config: Base

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = tokens.logits(self.gate)
        if self.training:
            ids_T = balanced_assignment(logits_TE.detach(), tokens.valid_T)
        else:
            ids_T = logits_TE.argmax(-1)
        scores_TE = logits_TE.sigmoid()
        # Padding has the id E, and its gate is not read.
        gates_T1 = scores_TE.gather(-1, ids_T.clamp_max(self.num_experts - 1)[:, None])
        return Choice(ids_T[:, None], gates_T1, Evidence(scores_TE, logits_TE))


@dataclass(frozen=True)
class Base(LinearGateConfig):
    """BASE layer (arXiv 2103.16716): one expert per token. In training the tokens of a call are assigned so that the
    sum of their logits ``x_t . w_e`` is largest and every expert gets ``floor(n / E)`` or ``ceil(n / E)`` of the n
    non-padding tokens. In evaluation each token takes its best expert. The gate is ``sigmoid(x_t . w_e)``.

    In training the other tokens of the batch change which expert a token gets, later ones of its sequence too; in
    evaluation they do not. The assignment is made for each call and each rank; the paper also shuffles tokens over
    ranks first. It needs no balance loss: the load is balanced by construction.

    Attributes:
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2103.16716"
    router_class = BaseRouter
    is_causal = False  # in training: in evaluation a token decides by itself
    depends_on = "token"

    init_scale: Positive = 0.1

    def pairs_per_token(self, num_experts: int) -> float:
        return 1.0


def sinkhorn(logits_TE: Tensor, real_T: Tensor | None, iterations: int, temperature: float = 1.0) -> Tensor:
    """Return the logarithm of the Sinkhorn-normalized ``exp(logits / temperature)``, in log space throughout.

    Iterations bring the columns to equal sums over the non-padding tokens, then each row to sum 1: the plan of the
    assignment relaxed by an entropy (arXiv 2202.01169).

    Args:
        logits_TE: float (T, E).
        real_T: bool (T,), False for padding, which has no mass; None: every token is real.
        iterations: number of times that both are normalized.
        temperature: divisor of the logits; the smaller, the closer to a hard assignment, and the more iterations.

    Returns:
        (T, E), rows of log probabilities; the columns of the non-padding tokens sum to about n / E each.
    """
    # With experts first, sums over many tokens run along the memory.
    z_ET = (logits_TE / temperature).T.contiguous()
    mask_T = z_ET.new_ones(z_ET.shape[1]) if real_T is None else real_T.to(z_ET.dtype)
    log_mask_T, num_tokens = mask_T.log(), mask_T.sum().clamp_min(1.0)
    # Any scaling of the columns leads to the same plan; dividing by their means removes a skew of all tokens at once.
    log_p_ET = (z_ET - (z_ET @ mask_T / num_tokens)[:, None]).log_softmax(0)
    target = num_tokens.log() - math.log(logits_TE.shape[1])
    for _ in range(iterations):
        # Without real tokens the sums are -inf, and with large logits a column may be empty: hence the floor.
        load_E1 = (log_p_ET + log_mask_T).logsumexp(1, keepdim=True).clamp_min(-1e30)
        log_p_ET = (log_p_ET - (load_E1 - target)).log_softmax(0)
    return log_p_ET.T


class SinkhornRouter(PairRouter):
    """The router of ``Sinkhorn``: top-k of Sinkhorn-normalized logits in training, of the logits in evaluation."""

    config: Sinkhorn

    def choose(self, tokens: Tokens) -> Choice:
        config = self.config
        logits_TE = tokens.logits(self.gate)
        scores_TE = logits_TE.sigmoid() if config.scores == "sigmoid" else logits_TE.softmax(-1)
        choice_TE = logits_TE.detach()
        if self.training:
            choice_TE = sinkhorn(choice_TE, tokens.valid_T, config.iterations, config.temperature)
        ids_TK = top_k_ids(choice_TE, config.top_k)
        return Choice(ids_TK, scores_TE.gather(-1, ids_TK), Evidence(scores_TE, logits_TE))


@dataclass(frozen=True)
class Sinkhorn(FixedKConfig, LinearGateConfig):
    """S-BASE (arXiv 2202.01169): in training a token takes the ``top_k`` largest entries of its row of the
    Sinkhorn-normalized logits, whose columns have equal sums; in evaluation the ``top_k`` largest logits. The gates are
    the scores of the logits themselves, not of the normalized ones, and are not brought to sum 1 (as in Megatron-LM).

    The sums of the columns are equal, the numbers of tokens only about: ``docs/reference/routers/assignment.md`` says
    how far. ``Base`` is exact. In training the other tokens of the batch change which experts a token gets, later ones
    of its sequence too.

    Attributes:
        top_k: experts per token, K.
        iterations: normalizations of columns and rows.
        temperature: divisor of the logits; a lower one is closer to an exact assignment and takes more iterations.
        score_func: "sigmoid", "softmax" over all E, or None: sigmoid for K = 1 and softmax for K > 1 (Megatron-LM).
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2202.01169"
    router_class = SinkhornRouter
    terms = frozenset({"router_z_loss"})  # the choice is always balanced; large logits are held down as in Megatron-LM
    is_causal = False  # in training: in evaluation a token decides by itself
    depends_on = "token"

    top_k: Count = 1
    iterations: Count = 16
    temperature: Positive = 1.0
    score_func: Literal["sigmoid", "softmax"] | None = None
    init_scale: Positive = 0.1

    @property
    def scores(self) -> str:
        """The value of ``score_func`` with its default filled in."""
        return self.score_func or ("sigmoid" if self.top_k == 1 else "softmax")
