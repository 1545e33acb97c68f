"""Multi-task layers that know categories of tasks or domains of examples: HoME, M3oE and STAR."""

from __future__ import annotations

from dataclasses import replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..contract import DenseRouting
from ..experts import Experts, StarExperts, batch_norm_rows, num_params
from ..index_buffers import IndexBuffers
from ..kernels import expert_of_rows
from ..routing.balance.balance import Balance
from ..routing.given.per_sequence import Domain
from ..routing.multi_gate import CategoryGroups, DenseGates, ExpertGroups, GateRouters
from ..routing.router import Router
from .multi_gate import (
    DenseGatesLayer,
    Examples,
    FeatureGate,
    MultiGateLayer,
    expert_outputs,
    gate_weights,
    mix_level,
    self_weights,
    with_dropout,
)


class HoMELayer(IndexBuffers, DenseGatesLayer):
    """Hierarchy of multi-gate experts (HoME, arXiv 2408.05430): a level of meta experts makes a representation of each
    category of tasks and a shared one; in the second level a task's gate sees the shared experts, its category's and
    its own.

    Entries of the tape: ``<layer>.level0.category0``, ..., ``<layer>.level0.shared``, ``<layer>.level1.task0``, ...

    Args:
        gates, experts, feature_gates: of the two levels.
        meta_groups: the meta experts; its owners are the categories.
        groups: the second level's experts.
        options: as in ``MultiGateMoE``.
    """

    router: GateRouters
    experts: nn.ModuleList  # type: ignore[assignment]
    _ids_tV: Tensor
    _categories_t: Tensor

    def __init__(
        self,
        gates: tuple[DenseGates, DenseGates],
        experts: tuple[Experts, Experts],
        meta_groups: ExpertGroups,
        groups: CategoryGroups,
        feature_gates: tuple[FeatureGate, FeatureGate] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups.num_tasks, groups.num_domains, **options)
        self.router, self.experts = GateRouters(list(gates)), nn.ModuleList(experts)
        self.groups = (meta_groups, groups)
        self.feature_gates = None if feature_gates is None else nn.ModuleList(feature_gates)
        ids_tV = [list(groups.expert_ids(k)) for k in range(groups.num_tasks)]
        self.keep_indices(_ids_tV=ids_tV, _categories_t=list(groups.categories))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        self.fill_indices()

    def _compute(self, examples: Examples) -> Tensor:
        feature_gates: Any = self.feature_gates or (None, None)
        meta_gates, gates = (cast(DenseGates, router) for router in (self.router[0], self.router[1]))
        meta_experts, experts = (cast(Experts, level) for level in self.experts)
        x_1TD = examples.x_TD.unsqueeze(0)
        meta = mix_level(self, meta_gates, meta_experts, feature_gates[0], x_1TD, examples, "level0")
        assert meta.shared_TH is not None
        z_GTH = torch.cat((meta.shared_TH.unsqueeze(0), meta.task_tTH))

        groups = self.groups[1]
        h_TnH, _ = expert_outputs(self, groups, experts, feature_gates[1], z_GTH, examples)
        # A gate reads the shared representation and its category's; ``DenseGates`` leaves the first input out.
        seen_cTW = torch.cat((z_GTH[:1].expand_as(meta.task_tTH), meta.task_tTH), -1)
        seen_GTW = torch.cat((seen_cTW[:1], seen_cTW.index_select(0, self._categories_t)))
        logits = gates(seen_GTW, examples.domain_T)
        dtype = h_TnH.dtype
        h_TnH = h_TnH.to(torch.promote_types(dtype, torch.float32))
        with kernels.outside_autocast(x_1TD.device):
            weights_TtV = gate_weights(self, gates, logits.task_TtE, examples, "level1")
            if logits.self_TtL is not None:
                weights_TtV = torch.cat((weights_TtV, self_weights(logits.self_TtL)), -1)
            weights_TtV = weights_TtV.to(h_TnH.dtype)
            # The hierarchy's mask: 0 for the experts of other categories and tasks.
            T, t, _ = weights_TtV.shape
            masked_Ttn = weights_TtV.new_zeros(T, t, groups.num_experts)
            masked_Ttn = masked_Ttn.scatter(-1, self._ids_tV.expand(T, -1, -1), weights_TtV)
            return torch.bmm(masked_Ttn, h_TnH).to(dtype).transpose(0, 1)

    def active_expert_params(self) -> int:
        return self.all_expert_params()


class M3oELayer(DenseGatesLayer):
    """Mixture of shared, domain and task experts in two steps of fusion (M3oE, arXiv 2404.18465): see ``core.M3oE``.

    The entry ``<layer>.task0`` of the tape has the weight that the task's output gives each expert, over their sum.

    Parameters in addition to the gates' and the experts': ``fusion`` (4,), logits of the weight of the task experts, of
    the share of a task's own one in it, and of the same two of the domains.

    Args:
        gates: gates over the shared experts, which know the domains.
        experts: the experts in the order of ``groups``; all compute every example.
        groups: shared experts, and one of each task and each domain.
        options: as in ``MultiGateMoE``.
    """

    router: DenseGates

    def __init__(self, gates: DenseGates, experts: Experts, groups: ExpertGroups, **options: Any) -> None:
        super().__init__(groups.num_tasks, groups.num_domains, **options)
        self.router, self.experts, self.groups = gates, experts, groups
        self.fusion = nn.Parameter(torch.empty(4))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        super().reset_parameters()
        nn.init.zeros_(self.fusion)

    def _compute(self, examples: Examples) -> Tensor:
        assert examples.domain_T is not None
        groups, x_1TD = self.groups, examples.x_TD.unsqueeze(0)
        logits_TtE = self.router(x_1TD, examples.domain_T).task_TtE
        h_TnH = self.experts(x_1TD, "each", (groups.num_experts,), examples.real_T)
        dtype = h_TnH.dtype
        h_TnH = h_TnH.to(torch.promote_types(dtype, torch.float32))
        with kernels.outside_autocast(x_1TD.device):
            clean_TtE = logits_TtE.softmax(-1)
            fused_tn, fused_dn = self._fused(logits_TtE.dtype)
            by_task_tN = torch.cat((fused_tn, fused_tn.new_zeros(groups.num_tasks, groups.num_domains)), 1)
            by_domain_dN = torch.cat((fused_dn.new_zeros(groups.num_domains, groups.num_tasks), fused_dn), 1)
            own_TtN = by_task_tN + by_domain_dN.index_select(0, examples.domain_T)[:, None]
            if self.keeps_evidence:
                self._record(torch.cat((clean_TtE, own_TtN), -1), examples)
            weights_Ttn = torch.cat((with_dropout(self, clean_TtE, logits_TtE), own_TtN), -1)
            return torch.bmm(weights_Ttn.to(h_TnH.dtype), h_TnH).to(dtype).transpose(0, 1)

    def _fused(self, dtype: torch.dtype) -> tuple[Tensor, Tensor]:
        """Return the weights of the task experts for each task, (t, t), and of the domain experts for each domain."""
        task, own_task, domain, own_domain = self.fusion.to(dtype).sigmoid()
        return (
            task * shared_out(own_task, self.groups.num_tasks),
            domain * shared_out(own_domain, self.groups.num_domains),
        )

    def _record(self, weights_Ttn: Tensor, examples: Examples) -> None:
        groups, real_T = self.groups, examples.real_T
        gates_Ttn = weights_Ttn / weights_Ttn.sum(-1, keepdim=True)
        if real_T is not None:
            gates_Ttn = gates_Ttn.masked_fill(~real_T[:, None, None], 0.0)
        for k in range(groups.num_tasks):
            T, names = gates_Ttn.shape[0], groups.all_names()
            routing = DenseRouting(gates_Ttn, k, T, None, real_T, names, examples.x_BSD.shape[0])
            self.record_pass(routing, examples.context, end=f"task{k}", router=self.router)

    def active_expert_params(self) -> int:
        return self.all_expert_params()


def shared_out(own: Tensor, count: int) -> Tensor:
    """Return (count, count) rows that give ``own`` to their own place and the rest in equal parts to the others; a
    lone place has 1."""
    if count == 1:
        return own.new_ones(1, 1)
    eye = torch.eye(count, dtype=own.dtype, device=own.device)
    return eye * own + (1 - eye) * ((1 - own) / (count - 1))


class DomainNorm(nn.Module):
    """Partitioned normalization (STAR, arXiv 2101.11427, eq. 4-5): rows are normalized over the rows of their domain,
    ``(g g_d) (x - mean_d) / sqrt(var_d + eps) + b + b_d``, by the batch in training and by running statistics in
    evaluation, as batch norm in ``MLPExperts``.

    Parameters: ``weight`` and ``bias`` (D,), ``domain_weight`` and ``domain_bias`` (domains, D). Buffers:
    ``running_mean`` and ``running_var`` (domains, D).
    """

    running_mean: Tensor
    running_var: Tensor

    def __init__(self, num_domains: int, dim: int) -> None:
        super().__init__()
        self.weight, self.bias = nn.Parameter(torch.empty(dim)), nn.Parameter(torch.empty(dim))
        self.domain_weight = nn.Parameter(torch.empty(num_domains, dim))
        self.domain_bias = nn.Parameter(torch.empty(num_domains, dim))
        self.register_buffer("running_mean", torch.empty(num_domains, dim))
        self.register_buffer("running_var", torch.empty(num_domains, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for tensor in (self.weight, self.domain_weight, self.running_var):
            nn.init.ones_(tensor)
        for tensor in (self.bias, self.domain_bias, self.running_mean):
            nn.init.zeros_(tensor)

    def no_weight_decay(self) -> set[str]:
        """Return the parameters, none of which decays, as in other norms."""
        return {name for name, _ in self.named_parameters()}

    def forward(self, x_RD: Tensor, domain_R: Tensor) -> Tensor:
        """Normalize rows (R, D) of the domains ``domain_R`` (R,)."""
        weight, bias = self.weight * self.domain_weight, self.bias + self.domain_bias
        running = self.running_mean, self.running_var
        return batch_norm_rows(x_RD, domain_R, running, weight, bias, self.training)


class STARLayer(MultiGateLayer):
    """Star topology (STAR, arXiv 2101.11427): each domain's network is the product of a shared one and its own. All
    tasks get the same output. An example is computed only by its domain's network, all of them in one dispatch.

    The layer's entry of the tape has its own name, and its experts are the domains.

    Args:
        experts: the networks, one per domain.
        num_tasks: t.
        dim: D.
        norm: normalization of the input by domain; None: none.
    """

    experts: StarExperts

    def __init__(self, experts: StarExperts, num_tasks: int, dim: int, norm: DomainNorm | None = None) -> None:
        num_domains = experts.num_experts
        super().__init__(num_tasks, num_domains, balance=Balance(router_z_loss=0.0), dim=dim)
        self.router, self.experts, self.norm = Domain(num_domains).build(dim, num_domains), experts, norm

    def _compute(self, examples: Examples) -> Tensor:
        routing = self.router(examples.x_BSD, examples.context)
        self.record_pass(routing, examples.context)
        rows = self.dispatcher.dispatch(examples.x_TD, routing)
        if self.norm is not None:
            rows = rows.materialized()
            rows = replace(rows, x=self.norm(rows.x, expert_of_rows(rows.x, rows.offsets_E)))
        y_TH = self.dispatcher.combine(self.experts(rows))
        return y_TH.expand(self.num_tasks, -1, -1)

    @property
    def expert_names(self) -> tuple[str, ...]:
        """The names of the experts, which are the domains."""
        return tuple(f"domain{d}" for d in range(self.num_domains))

    def routers(self) -> dict[str, Router]:
        return {}

    def names_entry(self, end: str) -> bool:
        return not end

    def active_expert_params(self) -> int:
        own = num_params(self.experts) - num_params(self.experts.centre)
        return self.all_expert_params() - own + own // self.experts.num_experts
