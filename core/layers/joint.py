"""``JointMultiGateMoE``: the tasks' gates choose experts together, a few for all tasks and a few for each (SMES)."""

from __future__ import annotations

from dataclasses import replace
from typing import Any

import torch
from torch import Tensor

from .. import kernels
from ..contract import Evidence, Routing
from ..experts import Experts
from ..routing.multi_gate import DenseGates, ExpertGroups, dropped_experts, joint_choice
from ..routing.router import Router
from ..routing.selection import Capacity, Choice, select_pairs
from .multi_gate import Examples, MultiGateLayer
from .task_choice import EachOnce, each_once

_DROPLESS = Capacity()


class JointMultiGateMoE(MultiGateLayer):
    """``y_k = sum over S and P_k of g_k,e f_e(x)``: S holds the experts with the highest mean gate over the tasks, P_k
    the ones with task k's highest gates among the others, and ``g_k`` is the softmax of task k's logits over both
    (SMES, arXiv 2602.09386). An expert that several tasks chose computes an example once.

    Entries of the tape: ``<layer>.selection`` has the computed pairs, the mean of the tasks' scores and the balance
    losses, one of each for all gates together; ``<layer>.task0`` and so on have the tasks' choices, and no losses.

    Args:
        gates: the tasks' gates.
        experts: E experts.
        groups: E shared ones.
        shared_top_k: number of experts in S.
        private_top_k: number of experts in P_k.
        dense_training: whether in training half of the examples, chosen at random, take all experts.
        options: as in ``MultiGateMoE``; a gate drops experts among a task's choices.
    """

    splits_experts = True

    router: DenseGates

    def __init__(
        self,
        gates: DenseGates,
        experts: Experts,
        groups: ExpertGroups,
        *,
        shared_top_k: int,
        private_top_k: int,
        dense_training: bool = False,
        **options: Any,
    ) -> None:
        super().__init__(groups.num_tasks, groups.num_domains, **options)
        self.router, self.experts, self.groups = gates, experts, groups
        self.shared_top_k, self.private_top_k, self.dense_training = shared_top_k, private_top_k, dense_training

    def _compute(self, examples: Examples) -> Tensor:
        with kernels.outside_autocast(examples.x_TD.device):
            logits_TtE = self.router(examples.x_TD.unsqueeze(0), examples.domain_T).task_TtE
            scores_TtE = logits_TtE.softmax(-1)
            E, S, is_dense = self.groups.num_shared, self.shared_top_k, self.training and self.dense_training
            ids_TtK = joint_choice(scores_TtE, S, E - S if is_dense else self.private_top_k)
            logits_TtK = logits_TtE.gather(-1, ids_TtK)
            if is_dense:
                is_beyond_E = torch.arange(E, device=ids_TtK.device) >= S + self.private_top_k
                is_left_out_T1E = is_beyond_E & (torch.rand_like(scores_TtE[:, :1, :1]) < 0.5)
                ids_TtK = ids_TtK.masked_fill(is_left_out_T1E, E)
                logits_TtK = logits_TtK.masked_fill(is_left_out_T1E, -torch.inf)
            gates_TtK = logits_TtK.softmax(-1)
            choices = []
            for k, (ids_TK, gates_TK) in enumerate(zip(ids_TtK.unbind(1), gates_TtK.unbind(1), strict=True)):
                evidence = Evidence(scores_TtE[:, k], logits_TtE[:, k])
                choices.append(self._routing(Choice(ids_TK, gates_TK, evidence), examples))
            used = choices
            if self.training and self.expert_dropout:
                is_dropped_TtK = dropped_experts(gates_TtK, self.expert_dropout)
                used_TtK = logits_TtK.masked_fill(is_dropped_TtK, -torch.inf).softmax(-1)
                used = [replace(r, gates_N=g.flatten()) for r, g in zip(choices, used_TtK.unbind(1), strict=True)]
        computed = each_once(self, examples.x_TD, used)
        if self.keeps_evidence:
            self._record(examples, choices, scores_TtE.mean(1), computed)
        return computed.y_tTH

    def _routing(self, choice: Choice, examples: Examples) -> Routing:
        return select_pairs(
            choice,
            num_experts=self.groups.num_shared,
            num_sequences=examples.x_BSD.shape[0],
            valid_T=examples.real_T,
            limit=_DROPLESS,
            training=self.training,
            backend=self.backend,
        )

    def _record(self, examples: Examples, choices: list[Routing], scores_TE: Tensor, computed: EachOnce) -> None:
        pairs, gates_N = computed.pairs, torch.cat([choice.gates_N for choice in choices]) / self.num_tasks
        assert pairs.input_index_N is not None
        # An expert that two tasks chose counts for both gates in the losses, and once among the computed pairs.
        chosen_E = torch.stack([choice.chosen_per_expert_E for choice in choices]).sum(0)
        selection = replace(
            pairs,
            token_index_N=pairs.input_index_N,
            gates_N=torch.zeros_like(gates_N).index_add(0, computed.first_N, gates_N),
            num_tokens=choices[0].num_tokens,
            top_k=None,
            input_index_N=None,
            valid_T=choices[0].valid_T,
            num_sequences=choices[0].num_sequences,
            evidence=Evidence(scores_TE, balance_chosen=chosen_E),
        )
        self.record_pass(selection, examples.context, end="selection")
        for k, choice in enumerate(choices):
            self.record_pass(choice, examples.context, end=f"task{k}", terms=frozenset())

    def routers(self) -> dict[str, Router]:
        return {}  # nothing of theirs moves but by the gradient

    def active_expert_params(self) -> int:
        """Return the most that one example touches, when no two tasks take the same private expert."""
        most = min(self.shared_top_k + self.num_tasks * self.private_top_k, self.groups.num_shared)
        return self.all_expert_params() * most // self.groups.num_shared
