"""Configs of the multi-task layers that know categories of tasks or domains of examples: HoME, M3oE and STAR."""

from __future__ import annotations

from dataclasses import dataclass, field
from typing import ClassVar

from ..experts import MLP, ExpertConfig, StarExperts
from ..fields import Count, CountOrZero
from ..layers import HoMELayer, M3oELayer, MultiGateLayer, STARLayer
from ..layers.multi_gate import FeatureGate
from ..layers.scenarios import DomainNorm
from ..routing.multi_gate import CategoryGroups, ExpertGroups
from ..routing.pairs.smooth import DENSE_TERMS
from .multi_gate import MultiGateConfig, weights_per_example


@dataclass(frozen=True)
class HoME(MultiGateConfig):
    """Hierarchy of multi-gate experts (HoME, arXiv 2408.05430). Tasks fall into categories, as clicks and watch times.

    A first level of meta experts makes a shared representation z_s and one of each category, z_c, as a level of PLE
    does with categories in the place of tasks. In the second level the shared experts read z_s, a category's and its
    tasks' experts z_c, and task k of category c has ``y_k = sum_e softmax(W_k [z_s, z_c])_e f_e + self-gate`` over the
    shared experts, its category's and its own.

    The default expert is the paper's, with Swish and batch norm; ``feature_gate`` adds its feature-gates.

    Attributes:
        num_experts: shared experts of each level.
        num_category_experts: experts of each category, in each level.
        num_task_experts: experts that belong to one task, in the second level.
        categories: category of each task, from 0 without a gap, such as [0, 0, 1]; empty: all tasks have one.
        self_gate: as in ``MultiGateConfig``, of the categories in the first level and of the tasks in the second.
    """

    num_experts: Count = 2
    expert: ExpertConfig = MLP(activation="silu", norm="batch")
    num_category_experts: Count = 1
    num_task_experts: CountOrZero = 1
    categories: tuple[int, ...] = ()
    self_gate: CountOrZero = field(default=1, kw_only=True)

    num_levels: ClassVar[int] = 2

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.categories and set(self.categories) != set(range(len(set(self.categories)))):
            raise ValueError(f"categories={list(self.categories)} must count from 0 without a gap")
        self._check_unused("has no meaning for HoME: see M3oE", "num_domain_experts")

    def _groups(self, num_tasks: int, num_domains: int) -> CategoryGroups:
        categories = self.categories or (0,) * num_tasks
        if len(categories) != num_tasks:
            raise ValueError(f"categories={list(categories)} has {len(categories)} numbers for {num_tasks} tasks")
        return CategoryGroups(
            num_tasks,
            self.num_experts,
            (self.num_task_experts,) * num_tasks,
            self.self_gate,
            num_domains=num_domains,
            categories=categories,
            num_category=self.num_category_experts,
        )

    def _meta_groups(self, groups: ExpertGroups) -> ExpertGroups:
        """Return how the meta experts are shared out among the categories, given the second level's groups."""
        assert isinstance(groups, CategoryGroups)
        count = groups.num_categories
        own, domains = (self.num_category_experts,) * count, groups.num_domains
        return ExpertGroups(count, self.num_experts, own, self.self_gate, num_domains=domains, owner="category")

    def _levels(self, dim: int) -> list[tuple[int, bool]]:
        return [(dim, True), (self.expert.out_dim(dim), False)]

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        assert isinstance(groups, CategoryGroups)
        meta, width = self._meta_groups(groups), self.expert.out_dim(dim)
        feature_gates = None
        if self.feature_gate:
            first = FeatureGate(dim, meta.num_dense, self.feature_gate)
            feature_gates = (first, FeatureGate(width, groups.num_dense, self.feature_gate))
        return HoMELayer(
            (self._gates(dim, meta, shared_gate=True), self._gates(2 * width, groups)),
            (self.expert.build(meta.num_experts, dim), self.expert.build(groups.num_experts, width)),
            meta,
            groups,
            feature_gates,
            **self._options(dim),
        )

    def _params(self, dim: int, groups: ExpertGroups, experts: int) -> int:
        meta, width = self._meta_groups(groups), self.expert.out_dim(dim)
        # The second level's gates read two representations.
        gates = self._gate_params(dim, meta, shared_gate=True) + self._gate_params(2 * width, groups)
        return gates + self._expert_params(dim, meta, meta.num_dense) + self._expert_params(width, groups, experts)

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        groups = self.groups(num_tasks, num_domains)
        meta, width = self._meta_groups(groups), self.expert.out_dim(dim)
        gates = self._gate_flops(dim, meta, shared_gate=True) + self._gate_flops(2 * width, groups)
        experts = self._expert_flops(dim, meta, meta.num_dense) + self._expert_flops(width, groups, groups.num_dense)
        # The second level's sums run over the experts that the mask leaves out, too.
        weights = weights_per_example(meta, True) * width
        return gates + experts + 2 * (weights + num_tasks * groups.num_experts * self.expert.out_dim(width))


@dataclass(frozen=True)
class M3oE(MultiGateConfig):
    """Mixture of shared, domain and task experts (M3oE, arXiv 2404.18465), for several domains and several tasks.

    ``y_k = sum_e softmax(W_k (x + v_d))_e f_e(x) + a_T (b_T f_k + (1 - b_T) mean of the other tasks' experts)
    + a_D (b_D f_d + (1 - b_D) mean of the other domains' experts)`` for an example of domain d, with shared experts
    f_e, one of each task and one of each domain. The four fusion weights a and b lie between 0 and 1, start at 1/2 and
    are learned with the rest; the paper learns them on validation examples, and has a gate for each domain where the
    gates here see its vector v_d.

    Every expert computes every example, also of other domains. Needs domains when it is built.

    Attributes:
        num_experts: shared experts.
    """

    num_experts: Count = 4

    def __post_init__(self) -> None:
        super().__post_init__()
        self._check_unused("has no meaning for M3oE: a domain has one expert")

    @property
    def terms(self) -> frozenset[str]:
        return DENSE_TERMS

    def _groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        if not num_domains:
            raise ValueError("M3oE needs num_domains, which is 0")
        return ExpertGroups(num_tasks, self.num_experts, (1,) * num_tasks, num_domain=1, num_domains=num_domains)

    def _gate_groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        """Return the groups that the gates choose among: the shared experts."""
        return ExpertGroups(num_tasks, self.num_experts, (0,) * num_tasks, num_domains=num_domains)

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        gates = self._gates(dim, self._gate_groups(num_tasks, groups.num_domains))
        return M3oELayer(gates, self.expert.build(groups.num_experts, dim), groups, **self._options(dim))

    def _params(self, dim: int, groups: ExpertGroups, experts: int) -> int:
        gates, fusion = self._gate_params(dim, self._gate_groups(groups.num_tasks, groups.num_domains)), 4
        # Also other domains' experts: every expert computes every example.
        return gates + fusion + self._expert_params(dim, groups, groups.num_experts)

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        groups = self.groups(num_tasks, num_domains)
        gates = self._gate_flops(dim, self._gate_groups(num_tasks, num_domains))
        sums = 2 * num_tasks * groups.num_experts * self.expert.out_dim(dim)
        return gates + sums + self._expert_flops(dim, groups, groups.num_experts)


@dataclass(frozen=True)
class STAR(MultiGateConfig):
    """Star topology (STAR, arXiv 2101.11427): a network for each domain, ``h_i = act((w_i * w_i,d) h_{i-1} + b_i +
    b_i,d)`` with shared w and b and domain d's own. All tasks get the same output.

    An example is only computed by its domain's network, all domains in one dispatch. A domain's weights start at 1 and
    its biases at 0. Needs domains when it is built. The paper's auxiliary network of the domain is
    ``HeadConfig.domain_dim`` in ``apps.recsys``.

    Attributes:
        num_experts: 1: there are as many networks as domains.
        expert: layers of a network, an ``MLP``.
        norm: whether the input is normalized over the examples of its domain (partitioned normalization).
    """

    num_experts: Count = 1
    expert: ExpertConfig = MLP((128,))
    norm: bool = True

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.num_experts != 1:
            raise ValueError(f"num_experts={self.num_experts}: STAR has one network a domain, as wide as its expert")
        self.check_no_gates("num_experts", "expert", "backend", "norm")
        if not isinstance(self.expert, MLP):
            raise ValueError(f"expert={type(self.expert).__name__}: STAR multiplies the layers of an MLP")

    @property
    def is_sparse(self) -> bool:
        return True

    @property
    def terms(self) -> frozenset[str]:
        return frozenset()

    def _groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        if not num_domains:
            raise ValueError("STAR needs num_domains, which is 0")
        return ExpertGroups(num_tasks, 0, (0,) * num_tasks, num_domain=1, num_domains=num_domains)

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        assert isinstance(self.expert, MLP)
        norm = DomainNorm(groups.num_domains, dim) if self.norm else None
        return STARLayer(StarExperts(groups.num_domains, dim, self.expert), num_tasks, dim, norm)

    def num_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        self.groups(num_tasks, num_domains)
        return (1 + num_domains) * self.expert.num_params(dim) + self._norm_params(dim, num_domains)

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the shared parameters, one domain's network, and all of the norm."""
        self.groups(num_tasks, num_domains)
        return 2 * self.expert.num_params(dim) + self._norm_params(dim, num_domains)

    def _norm_params(self, dim: int, num_domains: int) -> int:
        return 2 * dim * (1 + num_domains) if self.norm else 0

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        self.groups(num_tasks, num_domains)
        return self.expert.flops_per_row(dim)
