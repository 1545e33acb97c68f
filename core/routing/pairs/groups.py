"""Routers that see the experts as equal groups: prototypes, a hierarchy of gates, the members of an ensemble.

Group ``g`` of G holds the experts ``g * E / G`` to ``(g + 1) * E / G - 1``.
"""

from __future__ import annotations

from dataclasses import dataclass

import torch

from ...contract import Evidence
from ...contract.checks import divides
from ...fields import Count, Positive
from ...kernels import topk_gate
from ..balance.terms import SCORE_TERMS
from ..gates import LinearGate
from ..router import LinearGateConfig, PairRouter, RouterConfig, Tokens
from ..selection import Capacity, Choice
from .top_k import TopKConfig


class PrototypesRouter(PairRouter):
    """The router of ``Prototypes``: the best expert of each group."""

    config: Prototypes

    def choose(self, tokens: Tokens) -> Choice:
        logits_TE = tokens.logits(self.gate)
        scores_TGe = logits_TE.unflatten(-1, (self.config.num_prototypes, -1)).softmax(-1)
        best_TG = logits_TE.detach().unflatten(-1, (self.config.num_prototypes, -1)).argmax(-1)
        first_G = torch.arange(0, self.num_experts, scores_TGe.shape[-1], device=logits_TE.device)
        # They are not sorted: groups have no expert in common, so none is served before another.
        return Choice(
            best_TG + first_G,
            scores_TGe.gather(-1, best_TG.unsqueeze(-1)).squeeze(-1),
            Evidence(scores_TGe.flatten(-2) / self.config.num_prototypes, logits_TE),
        )


@dataclass(frozen=True)
class Prototypes(LinearGateConfig):
    """k top-1 routing (M6-T, arXiv 2105.15082): the experts are split into groups, and each token takes the best expert
    of every group. ``y = sum over groups g of p_g,e f_e(x)`` with ``e = argmax p_g`` and ``p_g`` the softmax over the
    group's own logits. As many pairs as top-k of ``k = num_prototypes``.

    In the losses a token's scores are ``p / num_prototypes``, so that they sum to 1.

    Attributes:
        num_prototypes: number of groups, and of experts per token.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2105.15082"
    router_class = PrototypesRouter
    terms = SCORE_TERMS | {"router_z_loss"}

    num_prototypes: Count = 2
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        divides("num_prototypes", self.num_prototypes, num_experts)
        if num_experts == self.num_prototypes > 1:
            raise ValueError(
                f"num_prototypes={self.num_prototypes} leaves one of num_experts={num_experts} to each group: "
                "every gate would be 1 and the router would get no gradient"
            )

    def pairs_per_token(self, num_experts: int) -> float:
        return float(self.num_prototypes)


class HierarchicalRouter(PairRouter):
    """The router of ``Hierarchical``: groups first, then experts of the chosen groups."""

    config: Hierarchical

    def __init__(self, dim: int, num_experts: int, config: Hierarchical, capacity: Capacity) -> None:
        super().__init__(dim, num_experts, config, capacity)
        self.group_gate = LinearGate(dim, config.num_groups, config.init_scale)
        self.gate = LinearGate(dim, num_experts, config.init_scale)

    def choose(self, tokens: Tokens) -> Choice:
        config = self.config
        groups = topk_gate(
            tokens.logits(self.group_gate), config.top_groups, normalize=config.top_groups > 1, backend=self.backend
        )
        logits_TGe = tokens.logits(self.gate).unflatten(-1, (config.num_groups, -1))
        size = logits_TGe.shape[-1]
        # The gates of groups that were not chosen stay out: they neither weigh in nor get a gradient.
        chosen = groups.expert_ids_TK.unsqueeze(-1)
        # Kernels take rows of logits: each chosen group of a token is one.
        of_chosen = logits_TGe.gather(1, chosen.expand(-1, -1, size)).flatten(0, 1)
        within = topk_gate(of_chosen, config.top_k, normalize=config.top_k > 1, backend=self.backend)
        ids_TGk, gates_TGk = (t.unflatten(0, (-1, config.top_groups)) for t in (within.expert_ids_TK, within.gates_TK))
        gates_TK = (groups.gates_TK.unsqueeze(-1) * gates_TGk).flatten(1)
        expert_ids_TK = (chosen * size + ids_TGk).flatten(1)
        best_first = gates_TK.detach().argsort(dim=-1, descending=True, stable=True)
        return Choice(
            expert_ids_TK.gather(-1, best_first),
            gates_TK.gather(-1, best_first),
            Evidence((groups.scores_TE.unsqueeze(-1) * logits_TGe.softmax(-1)).flatten(1)),
        )


@dataclass(frozen=True)
class Hierarchical(RouterConfig):
    """Two levels of gates (arXiv 1701.06538, appendix B): a primary gate takes ``top_groups`` groups of experts, and in
    each of them a secondary gate takes ``top_k`` experts. ``y = sum over (g, e) of G_g(x) G_g,e(x) f_e(x)``.

    A level's gates are the softmax of its chosen logits if it chooses several, and the chosen of the softmax over
    all if it chooses one, which would otherwise be 1 and without gradient. In the losses the score of an expert is
    its group's score times its own, the paper's importance with all experts in it. The paper's noise, and the load loss
    that needs it, are left out.

    Attributes:
        num_groups: number of equal groups of experts.
        top_groups: groups a token takes.
        top_k: experts per token in each of them; it takes ``top_groups * top_k`` in all.
        init_scale: variance of the gates' initial weights times D.
    """

    paper = "1701.06538"
    router_class = HierarchicalRouter
    terms = SCORE_TERMS  # no z-loss: two gates have no logits of all experts in common

    num_groups: Count = 4
    top_groups: Count = 2
    top_k: Count = 2
    init_scale: Positive = 0.1

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.top_groups > self.num_groups:
            raise ValueError(f"top_groups={self.top_groups} exceeds num_groups={self.num_groups}")

    def check(self, num_experts: int) -> None:
        divides("num_groups", self.num_groups, num_experts)
        size = num_experts // self.num_groups
        if self.top_k > size:
            raise ValueError(f"top_k={self.top_k} exceeds the {size} experts of a group")

    def pairs_per_token(self, num_experts: int) -> float:
        return float(self.top_groups * self.top_k)

    def num_params(self, dim: int, num_experts: int) -> int:
        return dim * (self.num_groups + num_experts)

    def flops_per_token(self, dim: int, num_experts: int) -> int:
        return 2 * dim * (self.num_groups + num_experts)


class EnsembleRouter(PairRouter):
    """The router of ``Ensemble``: top-k among the experts of a sequence's member."""

    config: Ensemble

    def choose(self, tokens: Tokens) -> Choice:
        config = self.config
        member_B = torch.arange(tokens.num_sequences, device=tokens.x_TD.device) % config.num_members
        member_T1 = tokens.to_tokens(member_B).unsqueeze(-1)
        logits_TGe = tokens.logits(self.gate).unflatten(-1, (config.num_members, -1))
        own = member_T1.unsqueeze(-1).expand(-1, -1, logits_TGe.shape[-1])
        logits_T1e = logits_TGe.gather(1, own)
        best = topk_gate(
            logits_T1e.squeeze(1),
            config.top_k,
            normalize=config.normalizes,
            valid_T=tokens.valid_T,
            backend=self.backend,
        )
        return Choice(
            member_T1 * own.shape[-1] + best.expert_ids_TK,
            best.gates_TK,
            Evidence(
                torch.zeros_like(logits_TGe).scatter(1, own, best.scores_TE.unsqueeze(1)).flatten(1),
                # Experts of another member are out of reach, for the z-loss too.
                torch.full_like(logits_TGe, -torch.inf).scatter(1, own, logits_T1e).flatten(1),
                # The kernel summed scores by place in the member, which no loss reads.
                sums=None if best.sums is None else {"square": best.sums["square"]},
            ),
        )


@dataclass(frozen=True)
class Ensemble(TopKConfig, LinearGateConfig):
    """A sparse ensemble in one layer (E3, arXiv 2110.03360): the experts are split into equal groups, one per member,
    and a token sees only its member's.

    Sequence ``b`` of a call belongs to member ``b % num_members``. Your model repeats each input for all members
    before the first such layer and averages their predictions at the end; else inputs take turns::

        x = x.repeat_interleave(num_members, 0)              # (B * M, S, D); valid_BS and the other fields as well
        p = logits.unflatten(0, (-1, num_members)).softmax(-1).mean(1)  # (B, classes)

    In training each member has its own loss, so the targets are repeated too.

    Attributes:
        num_members: number of groups of experts, M.
        top_k: experts per token, K.
        normalize: option as in ``TokenChoice``, over the experts of the member.
        init_scale: variance of the gate's initial weights times D.
    """

    paper = "2110.03360"
    router_class = EnsembleRouter
    terms = SCORE_TERMS | {"router_z_loss"}
    reads_batch_index = True  # the place of a sequence in the batch says its member

    num_members: Count = 2
    top_k: Count = 1
    normalize: bool | None = None
    init_scale: Positive = 0.1

    def check(self, num_experts: int) -> None:
        divides("num_members", self.num_members, num_experts)
        size = num_experts // self.num_members
        if self.top_k > size:
            raise ValueError(f"top_k={self.top_k} exceeds the {size} experts of a member")
