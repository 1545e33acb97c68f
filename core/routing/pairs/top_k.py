"""Bases of the routers that take the ``top_k`` best experts by the softmax of logits."""

from __future__ import annotations

from dataclasses import replace
from typing import cast

import torch
from torch import Tensor

from ...contract import Evidence
from ...kernels import topk_gate
from ..balance.terms import CHOICE_TERMS, SCORE_TERMS
from ..router import FixedKConfig, PairRouter, Tokens
from ..selection import Choice


class TopKConfig(FixedKConfig):
    """Base of their configs, which have the fields ``top_k`` and ``normalize``, as in ``TokenChoice``."""

    normalize: bool | str | None

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_k == 1 and self.normalize and self.normalize != "unit":
            raise ValueError(
                f"normalize={self.normalize!r} with top_k=1 makes every gate 1: the router would get no gradient"
            )

    @property
    def normalizes(self) -> bool:
        """Whether gates are normalized to sum to 1: ``normalize``, by default True for K > 1 and False for K = 1."""
        return self.top_k > 1 if self.normalize is None else bool(self.normalize) and self.normalize != "unit"

    @property
    def terms(self) -> frozenset[str]:
        return SCORE_TERMS | CHOICE_TERMS | {"router_z_loss"}


def without_some(logits_TE: Tensor, rate: float, keep: int) -> Tensor:
    """Return the logits with each one at -inf with probability ``rate``; at least ``keep`` of a token's stay."""
    draw_TE = torch.rand_like(logits_TE)
    least_T1 = draw_TE.topk(keep, dim=-1).values[:, -1:]
    return logits_TE.masked_fill((draw_TE < rate) & (draw_TE < least_T1), -torch.inf)


class TopKRouter(PairRouter):
    """Each token takes the ``top_k`` experts of its highest logits, which ``gate`` computes from it."""

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = tokens.logits(self.gate)
        if not (self.training and self.expert_dropout):
            return self.choose_from(logits_TE, tokens.valid_T)
        top_k = cast(TopKConfig, self.config).top_k
        choice = self.choose_from(without_some(logits_TE, self.expert_dropout, top_k), tokens.valid_T)
        assert choice.evidence is not None
        scores_TE = choice.evidence.scores_TE
        assert scores_TE is not None
        # The losses see the clean logits, as under noise.
        return replace(choice, evidence=Evidence(logits_TE.softmax(-1), logits_TE), priority_T=scores_TE.amax(-1))

    def choose_from(self, logits_TE: Tensor, valid_T: Tensor | None = None) -> Choice:
        """Return the choice of each row of logits; ``valid_T`` marks the real ones."""
        config = cast(TopKConfig, self.config)
        best = topk_gate(logits_TE, config.top_k, normalize=config.normalizes, valid_T=valid_T, backend=self.backend)
        evidence = Evidence(best.scores_TE, logits_TE, sums=best.sums)
        return Choice(best.expert_ids_TK, best.gates_TK, evidence, chosen_per_expert_E=best.chosen_per_expert_E)


class SequenceTopKRouter(TopKRouter):
    """A router that decides once for each sequence, for all its tokens."""

    def sequence_logits(self, tokens: Tokens) -> Tensor:
        """Return the logits of the sequences, (B, E)."""
        raise NotImplementedError

    def choose(self, tokens: Tokens) -> Choice:
        # K experts of B rows are chosen, not of T.
        logits_BE = self.sequence_logits(tokens)
        of_sequence = self.choose_from(logits_BE)
        assert of_sequence.evidence is not None
        scores_BE = of_sequence.evidence.scores_TE
        assert scores_BE is not None
        return Choice(
            tokens.to_tokens(of_sequence.expert_ids_TK),
            tokens.to_tokens(of_sequence.gates_TK),
            Evidence(tokens.to_tokens(scores_BE), tokens.to_tokens(logits_BE)),
        )
