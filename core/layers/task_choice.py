"""Multi-task layers in which an example is computed by few experts: a router a task, or one for all tasks."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Any, cast

import torch
from torch import Tensor

from .. import kernels
from ..contract import DenseRouting, Routing
from ..dispatch import join_tasks, split_pairs, unique_pairs
from ..experts import Experts
from ..routing.multi_gate import (
    DenseGates,
    DomainEmbedding,
    ExpertGroups,
    GateRouters,
    expected_experts,
    selected_softmax,
)
from ..routing.router import Router
from .multi_gate import Examples, MultiGateLayer


class SparseMultiGateMoE(MultiGateLayer):
    """A router a task chooses its few experts among the shared ones: ``y_k = sum over its experts of g_k,e f_e(x)``.

    The tasks' choices are computed in one dispatch, and nothing else is. An expert that two tasks chose for an example
    computes it once, but if gates scale the experts' input, which then differs by task.

    Args:
        routers: one per task.
        experts: E experts.
        pairs_per_token: experts per example for a task, for ``active_params``.
        domain: adds the example's domain to the routers' input.
        options: ``num_domains``, ``balance`` and ``dim``, as in ``MultiGateLayer``.
    """

    splits_experts = True

    router: GateRouters

    def __init__(
        self,
        routers: list[Router],
        experts: Experts,
        pairs_per_token: float,
        domain: DomainEmbedding | None = None,
        **options: Any,
    ) -> None:
        super().__init__(len(routers), **options)
        self.router, self.experts = GateRouters(routers, domain), experts
        self.pairs_per_token = pairs_per_token

    def _compute(self, examples: Examples) -> Tensor:
        seen_BSD = _with_domain(examples, self.router.domain)
        routings = []
        for end, router in self.routers().items():
            routings.append(router(seen_BSD, examples.context))
            self.record_pass(routings[-1], examples.context, end=end, router=router)
        if len(routings) == 1 and self.router[0].gates_on != "input":  # no choice is shared with another task
            rows = self.dispatcher.dispatch(examples.x_TD, routings[0])
            return self.dispatcher.combine(self.experts(rows)).unsqueeze(0)
        if self.router[0].gates_on == "input":
            rows = self.dispatcher.dispatch(examples.x_TD, join_tasks(routings)).weighted_input()
            return self.dispatcher.combine(self.experts(rows)).unflatten(0, (self.num_tasks, examples.x_TD.shape[0]))
        return each_once(self, examples.x_TD, routings).y_tTH

    def routers(self) -> dict[str, Router]:
        return {f"task{k}": self.router[k] for k in range(self.num_tasks)}

    def active_expert_params(self) -> int:
        """Return the parameters that one example touches on average; see ``expected_experts``."""
        return round(self.all_expert_params() * self._experts_of_an_example() / self.experts.num_experts)

    def _experts_of_an_example(self) -> float:
        return expected_experts(self.experts.num_experts, self.pairs_per_token, self.num_tasks)

    @property
    def share_computed(self) -> float | None:
        """Rows that the experts compute over pairs that are chosen, if tasks choose independently; None: all are."""
        if self.num_tasks == 1 or self.router[0].gates_on == "input":
            return None
        return self._experts_of_an_example() / (self.pairs_per_token * self.num_tasks)


@dataclass(frozen=True)
class EachOnce:
    """The output of experts that compute an example once, whatever the number of tasks that chose them.

    Attributes:
        y_tTH: (t, T, H), the weighted sum of each task's experts.
        pairs, first_N: the pairs that were computed, and the index of the computed pair of each pair; see
            ``unique_pairs``.
    """

    y_tTH: Tensor
    pairs: Routing
    first_N: Tensor


def each_once(layer: MultiGateLayer, x_TD: Tensor, routings: list[Routing]) -> EachOnce:
    """Compute the tasks' chosen experts, each expert once per example, and sum each task's part.

    Args:
        layer: the layer, for its dispatcher and its experts.
        x_TD: (T, D) examples.
        routings: one per task.
    """
    joined, T = join_tasks(routings), x_TD.shape[0]
    pairs, first_N = unique_pairs(joined, T)
    y_NH = layer.dispatcher.combine(layer.experts(layer.dispatcher.dispatch(x_TD, pairs)))
    sum_dtype = kernels.accumulate_dtype(y_NH.dtype)
    weighted_NH = joined.gates_N.to(sum_dtype)[:, None] * y_NH.index_select(0, first_N).to(sum_dtype)
    y_VH = weighted_NH.new_zeros(joined.num_tokens, y_NH.shape[1]).index_add(0, joined.token_index_N, weighted_NH)
    return EachOnce(y_VH.to(y_NH.dtype).unflatten(0, (len(routings), T)), pairs, first_N)


class SelectedMultiGateMoE(MultiGateLayer):
    """One router selects an example's experts for all tasks, each computed once; a softmax gate per task weights them:
    ``y_k = sum over the selected of g_k,e f_e(x)``, ``g_k,e = P p_e exp(w_k,e x) / sum_j p_j exp(w_k,j x)`` with the
    router's gates p and their sum P (1 if they are normalized).

    Entries of the tape: ``<layer>.selection`` of the router, ``<layer>.task0`` and so on of the gates.

    Args:
        router: chooses the experts of an example.
        gates: the tasks' gates.
        experts: E experts.
        groups: E shared ones.
        pairs_per_token: experts selected for an example, for ``active_params``.
        options: as in ``MultiGateMoE``; a gate drops experts among the selected.
    """

    splits_experts = True

    router: GateRouters

    def __init__(
        self,
        router: Router,
        gates: DenseGates,
        experts: Experts,
        groups: ExpertGroups,
        pairs_per_token: float,
        **options: Any,
    ) -> None:
        super().__init__(groups.num_tasks, groups.num_domains, **options)
        self.router, self.experts, self.groups = GateRouters([router, gates]), experts, groups
        self.pairs_per_token = pairs_per_token

    def _compute(self, examples: Examples) -> Tensor:
        selection, gates = self.router[0], cast(DenseGates, self.router[1])
        x_TD, (T, E) = examples.x_TD, (examples.x_TD.shape[0], self.groups.num_shared)
        routing = selection(_with_domain(examples, gates.domain), examples.context)
        self.record_pass(routing, examples.context, end="selection", router=selection)
        # Each pair's output by itself, for every task weights it in its own way.
        example_N, expert_ids_N = routing.token_index_N, routing.expert_ids_N
        pairs = split_pairs(example_N, expert_ids_N, routing.tokens_per_expert_E)
        y_NH = self.dispatcher.combine(self.experts(self.dispatcher.dispatch(x_TD, pairs)))

        logits_TtE = gates(x_TD.unsqueeze(0), examples.domain_T).task_TtE
        # Pairs that are not computed have the id E and no weight.
        index_N, is_left_out_N = expert_ids_N.clamp_max(E - 1), expert_ids_N == E
        logits_Nt = logits_TtE[example_N, :, index_N].masked_fill(is_left_out_N[:, None], -torch.inf)
        prior_N = routing.gates_N.masked_fill(is_left_out_N, 0.0).to(logits_Nt.dtype)
        dropout = self.expert_dropout if self.training else 0.0
        weights = selected_softmax(logits_Nt, prior_N, example_N, T, dropout)
        if self.keeps_evidence:
            # The gates of all experts are only for the tape.
            gates_TEt = weights.clean_Rt.new_zeros(T, E, self.num_tasks)
            gates_TEt = gates_TEt.index_put((example_N, index_N), weights.clean_Rt, accumulate=True)
            for k in range(self.num_tasks):
                names = self.groups.names(k)
                dense = DenseRouting(
                    gates_TEt.transpose(1, 2), k, T, None, examples.real_T, names, examples.x_BSD.shape[0]
                )
                self.record_pass(dense, examples.context, end=f"task{k}", router=gates)

        sum_dtype = kernels.accumulate_dtype(y_NH.dtype)
        weighted_NtH = weights.used_Rt.to(sum_dtype)[:, :, None] * y_NH.to(sum_dtype)[:, None, :]
        y_TtH = weighted_NtH.new_zeros(T, *weighted_NtH.shape[1:]).index_add(0, example_N, weighted_NtH)
        return y_TtH.to(y_NH.dtype).transpose(0, 1)

    def routers(self) -> dict[str, Router]:
        return {"selection": self.router[0]}

    def active_expert_params(self) -> int:
        return round(self.all_expert_params() * min(self.pairs_per_token / self.groups.num_shared, 1.0))


def _with_domain(examples: Examples, domain: DomainEmbedding | None) -> Tensor:
    """Return a router's input (B, S, D): the examples, with their domains if it knows them."""
    if domain is None or examples.domain_T is None:
        return examples.x_BSD
    return domain(examples.x_TD, examples.domain_T).unflatten(0, examples.x_BSD.shape[:2])
