"""``MultiGateConfig``: multi-task layers, whose every task has a gate of its own over shared and own experts."""

from __future__ import annotations

from dataclasses import dataclass, field, fields
from itertools import pairwise
from typing import Any, Literal

from ..experts import MLP, ExpertConfig, Mixed
from ..fields import Count, CountOrZero, Positive, ShareBelowOne, check_values
from ..kernels import Backend
from ..layers import MultiGateLayer, MultiGateMoE, PLELayer, SelectedMultiGateMoE, SparseMultiGateMoE
from ..layers.multi_gate import FeatureGate
from ..registry import OpenConfig
from ..routing.balance.balance import Balance
from ..routing.multi_gate import DenseGates, DomainEmbedding, ExpertGroups, expected_experts
from ..routing.pairs.smooth import DENSE_TERMS
from ..routing.router import RouterConfig
from ..routing.selection import Capacity
from .plain import from_plain, make, to_plain

DENSE_GATE_TERMS = DENSE_TERMS | {"router_z_loss"}


@dataclass(frozen=True)
class MultiGateConfig(OpenConfig):
    """Base of the multi-task layers' configs. ``build`` makes ``layer(x, context)``: (..., D) to (t, ..., D_out).

    Attributes:
        num_experts: experts that all tasks share.
        expert: kind of the experts: ``MLP(...)``, ``FFN(...)``, ``SwiGLU(...)``, ``GEGLU(...)``.
        expert_dropout: in training each gate leaves each expert out with this probability, example by example, and its
            other weights are brought to their sum; one expert always stays (Zhao et al., RecSys 2019: 0.1).
        feature_gate: rank of low-rank gates that give each expert its own input (HoME, arXiv 2408.05430); 0: none.
        self_gate: experts of each task outside its softmax, added to its output (HoME): one is weighted by a sigmoid,
            several by a softmax of their own; 0: none.
        num_domain_experts: experts per domain, in addition to the others in every task's gate (M3oE, arXiv 2404.18465);
            they compute their domain's examples only. Needs domains when it is built.
        gate_hidden_dims: widths of the hidden layers, with ReLU, of each gate; (): gates are linear.
        gate_bias: whether the gates' logits have a learned bias.
        init_scale: variance of the gates' initial weights times D.
        balance: weights of the balance losses of each gate; dense gates have ``importance``, ``mutual_information``,
            ``local_entropy``, ``global_entropy`` and ``router_z_loss``, all 0 as they are published.
        backend: kernels that compute: "auto", "eager", "cpu", "grouped" or "triton".

    Raises:
        ValueError: a value is out of its range, or two of them do not go together.
    """

    num_experts: Count = 8
    expert: ExpertConfig = MLP()
    expert_dropout: ShareBelowOne = field(default=0.0, kw_only=True)
    feature_gate: CountOrZero = field(default=0, kw_only=True)
    self_gate: CountOrZero = field(default=0, kw_only=True)
    num_domain_experts: CountOrZero = field(default=0, kw_only=True)
    gate_hidden_dims: tuple[Count, ...] = field(default=(), kw_only=True)
    gate_bias: bool = field(default=False, kw_only=True)
    init_scale: Positive = field(default=0.1, kw_only=True)
    balance: Balance = field(default=Balance(router_z_loss=0.0), kw_only=True)
    backend: Backend = field(default="auto", kw_only=True)

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.expert.layer_kind != "rows":
            raise ValueError(
                f"{type(self.expert).__name__} computes {self.expert.layer_kind}: not in multi-gate layers"
            )
        if isinstance(self.expert, Mixed):
            raise ValueError("Mixed experts are of several kinds: not in multi-gate layers, whose experts are alike")
        if self.balance.adaptive:
            raise ValueError("balance.adaptive=True follows the drop rate, which is 0: multi-gate layers are dropless")
        self.balance.check(self.terms, type(self).__name__)

    def check_no_gates(self, *own: str) -> None:
        """Raise a ``ValueError`` if options of gates are set, in a config that has none.

        Args:
            own: names of the fields that have a meaning for it.
        """
        for f in fields(self):
            if f.name not in own and getattr(self, f.name) != f.default:
                option, kind = f"{f.name}={getattr(self, f.name)!r}", type(self).__name__
                raise ValueError(f"{option} has no meaning for {kind}, which has no gates")

    @property
    def terms(self) -> frozenset[str]:
        """Return the names of the balance terms that apply."""
        return DENSE_GATE_TERMS

    @property
    def is_sparse(self) -> bool:
        """Whether an example is computed by few of the experts, and not by all."""
        return False

    def build(self, dim: int, num_tasks: int, num_domains: int = 0) -> MultiGateLayer:
        """Build the layer for examples of width ``dim``.

        Args:
            dim: D.
            num_tasks: t.
            num_domains: number of domains; the gates then see a learned vector of the example's, and the layer needs
                ``context.domain_ids_B``. 0: none.

        Raises:
            ValueError: a number is out of its range, or there are experts of domains and no domains.
        """
        groups = self.groups(num_tasks, num_domains)
        check_values(Count, dim=dim)
        layer = self._layer(dim, num_tasks, groups)
        layer.backend = self.backend
        return layer

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        return MultiGateMoE(
            self._gates(dim, groups),
            self.expert.build(groups.num_experts, dim),
            groups,
            num_tasks=num_tasks,
            feature_gate=FeatureGate(dim, groups.num_dense, self.feature_gate) if self.feature_gate else None,
            **self._options(dim),
        )

    def _options(self, dim: int) -> dict[str, Any]:
        """Return the options that all layers have."""
        return {"balance": self.balance, "expert_dropout": self.expert_dropout, "dim": dim}

    def _check_unused(self, why: str, *names: str) -> None:
        """Raise an error for options that the layer does not use, by default of gates on features, tasks and
        domains."""
        for name in names or ("feature_gate", "self_gate", "num_domain_experts"):
            if getattr(self, name):
                raise ValueError(f"{name}={getattr(self, name)} {why}")

    def groups(self, num_tasks: int, num_domains: int = 0) -> ExpertGroups:
        """Return how the experts of a level are shared out among tasks and domains.

        Raises:
            ValueError: as ``build``.
        """
        check_values(Count, num_tasks=num_tasks)
        check_values(CountOrZero, num_domains=num_domains)
        if self.num_domain_experts and not num_domains:
            raise ValueError(f"num_domain_experts={self.num_domain_experts} needs num_domains, which is 0")
        return self._groups(num_tasks, num_domains)

    def _groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        own = self._own_experts(num_tasks)
        return ExpertGroups(num_tasks, self.num_experts, own, self.self_gate, self.num_domain_experts, num_domains)

    def _own_experts(self, num_tasks: int) -> tuple[int, ...]:
        """Return the numbers of experts that belong to each task."""
        return (0,) * num_tasks

    def _gates(self, dim: int, groups: ExpertGroups, shared_gate: bool = False) -> DenseGates:
        return DenseGates(
            dim,
            groups,
            shared_gate=shared_gate,
            hidden_dims=self.gate_hidden_dims,
            bias=self.gate_bias,
            init_scale=self.init_scale,
            terms=self.terms,
        )

    def out_dim(self, dim: int) -> int:
        """Return D_out, the width of each task's output."""
        return self.expert.out_dim(self._levels(dim)[-1][0])

    def num_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the parameters of the layer, equal to the sum of ``numel`` of the built one."""
        groups = self.groups(num_tasks, num_domains)
        return self._params(dim, groups, groups.num_experts)

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the parameters that one example touches: all but other domains' experts."""
        groups = self.groups(num_tasks, num_domains)
        return self._params(dim, groups, groups.num_dense + groups.num_domain)

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        """Return the forward FLOPs of an example, for all tasks: two a multiply-add; gates and their sums included.

        If tasks choose among the experts, this is the cost on average if they choose independently.

        Args:
            dim: D.
            num_tasks: t.
            num_domains: as in ``build``.
            batch_size: examples of a call. Expert choice rounds its capacity up by it; nothing else asks.
        """
        groups, total = self.groups(num_tasks, num_domains), 0
        for width, shared_gate in self._levels(dim):
            weights = weights_per_example(groups, shared_gate)
            total += self._expert_flops(width, groups, groups.num_dense + groups.num_domain)
            # Each weight is a row of the gates' product, and then weights one output.
            total += self._gate_flops(width, groups, shared_gate) + 2 * weights * self.expert.out_dim(width)
        return total

    def _params(self, dim: int, groups: ExpertGroups, experts: int) -> int:
        """Return the parameters of all levels with this number of experts in each."""
        return sum(
            self._gate_params(width, groups, shared_gate) + self._expert_params(width, groups, experts)
            for width, shared_gate in self._levels(dim)
        )

    def _gate_params(self, width: int, groups: ExpertGroups, shared_gate: bool = False) -> int:
        """Return the parameters of a level's gates over inputs of this width."""
        weights = weights_per_example(groups, shared_gate)
        hidden = sum(i * o + o for i, o in self._gate_layers(width))
        total = weights * (self._gate_width(width) + self.gate_bias) + (groups.num_tasks + shared_gate) * hidden
        return total + width * groups.num_domains

    def _gate_flops(self, width: int, groups: ExpertGroups, shared_gate: bool = False) -> int:
        """Return the FLOPs of a level's gates, without the sums that they weight."""
        hidden = sum(i * o for i, o in self._gate_layers(width))
        weights = weights_per_example(groups, shared_gate)
        return 2 * weights * self._gate_width(width) + 2 * (groups.num_tasks + shared_gate) * hidden

    def _expert_params(self, width: int, groups: ExpertGroups, experts: int) -> int:
        """Return the parameters of this number of a level's experts, and of all feature gates."""
        return 2 * width * groups.num_dense * self.feature_gate + experts * self.expert.num_params(width)

    def _expert_flops(self, width: int, groups: ExpertGroups, experts: int) -> int:
        """Return the FLOPs of this number of a level's experts, and of all feature gates."""
        return 4 * width * groups.num_dense * self.feature_gate + experts * self.expert.flops_per_row(width)

    def _gate_width(self, width: int) -> int:
        """Return the input width of a gate's last linear layer."""
        return (width, *self.gate_hidden_dims)[-1]

    def _gate_layers(self, width: int) -> list[tuple[int, int]]:
        """Return the widths in and out of a gate's hidden layers."""
        return list(pairwise((width, *self.gate_hidden_dims)))

    def _levels(self, dim: int) -> list[tuple[int, bool]]:
        """Return the width of each level's input, and whether its shared representation continues."""
        return [(dim, False)]

    def to_dict(self) -> dict[str, Any]:
        """Return plain dicts, lists and numbers, as in YAML: ``{"class_path": ..., "init_args": {...}}``."""
        return to_plain(self)

    @classmethod
    def from_dict(cls, values: dict[str, Any]) -> MultiGateConfig:
        """Return the config that ``to_dict`` wrote; without a class it has the fields of this one.

        Raises:
            ValueError: an unknown field or class, or a class that is not this one's, naming it.
        """
        return from_plain(values, cls) if "class_path" in values else make(cls, values)


def weights_per_example(groups: ExpertGroups, shared_gate: bool = False) -> int:
    """Return how many weights a level's gates have for an example."""
    tasks = sum(groups.per_gate) + groups.num_tasks * groups.num_self
    return tasks + (groups.per_shared_gate if shared_gate else 0)


@dataclass(frozen=True)
class MMoE(MultiGateConfig):
    """Multi-gate mixture of experts: ``y_k = sum_e softmax(W_k x)_e f_e(x)``, one gate per task over all experts (Ma et
    al., KDD 2018, eq. 6-7). Every expert computes every example.

    With a ``router`` an example is computed by few of many small experts:

    - ``selection="task"``: each task has a router of this config, and an example is computed by the experts that the
      tasks chose for it, once by each.
    - ``selection="shared"``: one router selects the experts of an example for all tasks, each computed once, and each
      task has a softmax gate over the selected: ``g_k,e = P p_e exp(w_k,e x) / sum_j p_j exp(w_k,j x)`` with the
      router's gates p and their sum P.

    Without limit of capacity; the routers' tokens are the batch's examples.

    Attributes:
        router: any that chooses pairs (``TokenChoice``, ``DSelectK``, ``ExpertChoice``, ``Threshold``, ...); None:
            softmax gates over all experts. Not together with ``feature_gate``, ``self_gate``, ``num_domain_experts``,
            ``gate_hidden_dims``, ``gate_bias``; ``expert_dropout`` applies to the gates of "shared".
        selection: "task" or "shared".
    """

    router: RouterConfig | None = None
    selection: Literal["task", "shared"] = "task"

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.router is not None:
            self._check_router(self.router)
        elif self.selection != "task":
            raise ValueError(f"selection={self.selection!r} needs a router")

    def _check_router(self, router: RouterConfig) -> None:
        if router.layer_kind != "pairs":
            raise ValueError(f"router {router.source()} chooses no experts for an example, it mixes: not for MMoE")
        router.check(self.num_experts)
        router.check_group("batch")
        options = ["feature_gate", "self_gate", "num_domain_experts", "gate_hidden_dims", "gate_bias"]
        more = () if self.selection == "shared" else ("expert_dropout",)
        self._check_unused("does not apply with a router", *options, *more)
        if self.selection == "shared" and getattr(router, "gates_on", "output") == "input":
            raise ValueError("gates_on='input' does not apply with selection='shared': experts compute for all tasks")

    @property
    def terms(self) -> frozenset[str]:
        if self.router is None:
            return DENSE_GATE_TERMS
        return self.router.terms | (DENSE_TERMS if self.selection == "shared" else frozenset())

    @property
    def is_sparse(self) -> bool:
        return self.router is not None

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        if self.router is None:
            return super()._layer(dim, num_tasks, groups)
        E, num_domains = self.num_experts, groups.num_domains
        # The whole batch competes: an example is a sequence of its own.
        capacity, pairs = Capacity(group="batch"), self.router.pairs_per_token(E)
        experts = self.expert.build(E, dim)
        routers = [self.router.build(dim, E, capacity) for _ in range(self._choices(num_tasks))]
        if self.selection == "shared":
            return SelectedMultiGateMoE(
                routers[0],
                DenseGates(dim, groups, init_scale=self.init_scale, terms=DENSE_TERMS),
                experts,
                groups,
                pairs,
                **self._options(dim),
            )
        domain = DomainEmbedding(num_domains, dim) if num_domains else None
        return SparseMultiGateMoE(routers, experts, pairs, domain, num_domains=num_domains, **self._options(dim))

    def num_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        if self.router is None:
            return super().num_params(dim, num_tasks, num_domains)
        return self._router_params(dim, num_tasks, num_domains) + self.num_experts * self.expert.num_params(dim)

    def active_params(self, dim: int, num_tasks: int, num_domains: int = 0) -> int:
        """Return the parameters that one example touches; with a router on average, see ``expected_experts``."""
        if self.router is None:
            return super().active_params(dim, num_tasks, num_domains)
        E = self.num_experts
        taken = expected_experts(E, self.router.pairs_per_token(E), self._choices(num_tasks)) / E
        experts = round(E * self.expert.num_params(dim) * taken)
        return self._router_params(dim, num_tasks, num_domains) + experts

    def flops_per_token(self, dim: int, num_tasks: int, num_domains: int = 0, *, batch_size: int | None = None) -> int:
        if self.router is None:
            return super().flops_per_token(dim, num_tasks, num_domains)
        self.groups(num_tasks, num_domains)
        E, choices = self.num_experts, self._choices(num_tasks)
        rows = self.router.rows_per_token(E, batch_size)
        is_shared = getattr(self.router, "gates_on", "output") == "output"
        rows = expected_experts(E, rows, choices) if is_shared else choices * rows
        gates = 2 * dim * E * num_tasks if self.selection == "shared" else 0
        return choices * self.router.flops_per_token(dim, E) + gates + round(rows * self.expert.flops_per_row(dim))

    def _choices(self, num_tasks: int) -> int:
        """Return how often an example is routed."""
        return 1 if self.selection == "shared" else num_tasks

    def _router_params(self, dim: int, num_tasks: int, num_domains: int) -> int:
        assert self.router is not None
        self.groups(num_tasks, num_domains)
        gates = num_tasks * self.num_experts if self.selection == "shared" else 0
        routers = self._choices(num_tasks) * self.router.num_params(dim, self.num_experts)
        return routers + dim * (gates + num_domains)


@dataclass(frozen=True)
class OMoE(MultiGateConfig):
    """One gate for all tasks, which get the same output: the one-gate mixture that MMoE is measured against (KDD 2018).

    A self-gate is one for all tasks too. The gate's entry of the tape is ``<layer>.tasks``.
    """

    def _groups(self, num_tasks: int, num_domains: int) -> ExpertGroups:
        return super()._groups(1, num_domains)


@dataclass(frozen=True)
class CGC(MultiGateConfig):
    """Customized gate control: ``y_k = sum_e softmax(W_k x)_e f_e(x)`` over the shared experts and task k's own (Tang
    et al., RecSys 2020, eq. 1-3).

    Attributes:
        num_task_experts: experts that belong to one task: one number for all tasks, or a list with one per task. 0:
            this is MMoE.
    """

    num_experts: Count = 4
    num_task_experts: CountOrZero | tuple[CountOrZero, ...] = 2

    def _own_experts(self, num_tasks: int) -> tuple[int, ...]:
        if isinstance(self.num_task_experts, int):
            return (self.num_task_experts,) * num_tasks
        if len(self.num_task_experts) != num_tasks:
            counts = list(self.num_task_experts)
            raise ValueError(f"num_task_experts={counts} has {len(counts)} numbers for {num_tasks} tasks")
        return self.num_task_experts


@dataclass(frozen=True)
class PLE(CGC):
    """Progressive layered extraction: CGC stacked (Tang et al., RecSys 2020, eq. 4-6). Each task's representation and
    the shared one pass from level to level; the shared one's gate sees all experts of its level.

    Attributes:
        num_levels: 1: this is CGC.
    """

    num_levels: Count = 2

    def _levels(self, dim: int) -> list[tuple[int, bool]]:
        dims = [dim]
        for _ in range(self.num_levels - 1):
            dims.append(self.expert.out_dim(dims[-1]))
        return [(width, i + 1 < self.num_levels) for i, width in enumerate(dims)]

    def _layer(self, dim: int, num_tasks: int, groups: ExpertGroups) -> MultiGateLayer:
        levels = self._levels(dim)
        gates = [self._gates(width, groups, shared_gate) for width, shared_gate in levels]
        feature_gates = [FeatureGate(width, groups.num_dense, self.feature_gate) for width, _ in levels]
        return PLELayer(
            gates,
            [self.expert.build(groups.num_experts, width) for width, _ in levels],
            groups,
            feature_gates if self.feature_gate else None,
            **self._options(dim),
        )
