"""Gates of multi-task layers: for each task a softmax over all experts that the task may use."""

from __future__ import annotations

from dataclasses import dataclass
from itertools import pairwise

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import span
from ..kernels.eager import check_devices, outside_autocast, top_k_ids
from .gates import init_gate_
from .pairs.smooth import DENSE_TERMS
from .router import Router


@dataclass(frozen=True)
class ExpertGroups:
    """The numbers of a level's experts that belong to tasks and domains. The experts are ordered like this: the shared
    ones, then each task's own with its self-gate's, then each domain's own.

    Attributes:
        num_tasks: number of gates, t; 1 if all tasks share one.
        num_shared: number of experts that every gate may use.
        num_task: numbers of experts that belong to one task, one number per task.
        num_self: number of experts of each task outside its softmax (HoME's self-gate).
        num_domain: number of experts that belong to one domain.
        num_domains: number of domains; 0: the gates know no domain.
        owner: name prefix of the gates and of the experts that belong to one owner: "task", or "category" of tasks.
    """

    num_tasks: int
    num_shared: int
    num_task: tuple[int, ...]
    num_self: int = 0
    num_domain: int = 0
    num_domains: int = 0
    owner: str = "task"

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of experts that compute every example, by input: the shared ones, and each task's."""
        return (self.num_shared, *(n + self.num_self for n in self.num_task))

    @property
    def num_dense(self) -> int:
        """The number of experts that compute every example."""
        return sum(self.counts)

    @property
    def num_experts(self) -> int:
        """The number of all experts of the level."""
        return self.num_dense + self.num_domains * self.num_domain

    @property
    def is_even(self) -> bool:
        """Whether all tasks have the same number of experts of their own."""
        return len(set(self.num_task)) == 1

    @property
    def most_own(self) -> int:
        """The number of own experts of the task that has most."""
        return max(self.num_task)

    @property
    def per_gate(self) -> tuple[int, ...]:
        """The numbers of experts of the tasks' gates, one per task."""
        return tuple(self.num_shared + n + self.num_domain for n in self.num_task)

    @property
    def per_shared_gate(self) -> int:
        """The number of experts of the shared representation's gate (PLE): all but the self-gates'."""
        return self.num_shared + sum(self.num_task) + self.num_domain

    def padded(self, logits_TE: Tensor, task: int) -> Tensor:
        """Return the logits of one task's gate with -inf for the own experts that it has fewer than the task that has
        most: (T, E of the largest gate)."""
        end = self.num_shared + self.num_task[task]
        missing = logits_TE.new_full((logits_TE.shape[0], self.most_own - self.num_task[task]), -torch.inf)
        return torch.cat((logits_TE[:, :end], missing, logits_TE[:, end:]), 1)

    def unpadded(self, values_TtE: Tensor, task: int) -> Tensor:
        """Return what ``padded`` padded, of all tasks (T, t, E of the largest gate), for one of them: (T, 1, E)."""
        values_T1E, end = values_TtE[:, task : task + 1], self.num_shared + self.num_task[task]
        return torch.cat((values_T1E[..., :end], values_T1E[..., self.num_shared + self.most_own :]), -1)

    def names(self, task: int | None = None) -> tuple[str, ...]:
        """Return the names of the experts that one task's gate mixes, in the gate's order; with ``task=None`` the
        experts of the shared representation's gate."""
        tasks = range(self.num_tasks) if task is None else (task,)
        return (
            *(f"shared{i}" for i in range(self.num_shared)),
            *(f"{self.owner}{k}.{i}" for k in tasks for i in range(self.num_task[k])),
            *(f"domain.{i}" for i in range(self.num_domain)),
        )

    def all_names(self) -> tuple[str, ...]:
        """Return the names of all experts in their order, also of the self-gates and of every domain."""
        return (
            *(f"shared{i}" for i in range(self.num_shared)),
            *(name for k in range(self.num_tasks) for name in self._own_names(k)),
            *(f"domain{d}.{i}" for d in range(self.num_domains) for i in range(self.num_domain)),
        )

    def _own_names(self, task: int) -> tuple[str, ...]:
        """Return the names of one task's own experts and of its self-gate's."""
        own, start = range(self.num_task[task]), "self" if self.owner == "task" else f"{self.owner}-self"
        return (*(f"{self.owner}{task}.{i}" for i in own), *(f"{start}{task}.{i}" for i in range(self.num_self)))

    def gate_names(self, num_tasks: int) -> list[str]:
        """Return the names of the gates of a layer of ``num_tasks`` tasks, all of which may share one gate."""
        if self.owner == "task" and self.num_tasks < num_tasks:
            return ["tasks"]
        return [f"{self.owner}{k}" for k in range(self.num_tasks)]


@dataclass(frozen=True)
class CategoryGroups(ExpertGroups):
    """The experts of a level whose tasks fall into categories: a task's gate sees the shared ones, its category's and
    its own. They are ordered like this: the shared ones, then for each category its own and, task by task, the tasks'
    own and their self-gates'.

    Attributes:
        categories: category of each task, from 0.
        num_category: number of experts that the tasks of one category share.
    """

    categories: tuple[int, ...] = ()
    num_category: int = 0

    @property
    def num_categories(self) -> int:
        return max(self.categories) + 1

    @property
    def counts(self) -> tuple[int, ...]:
        """The numbers of experts by input: the shared ones, and each category's with its tasks'."""
        by_task = super().counts[1:]
        return (self.num_shared, *(self.num_category + sum(by_task[k] for k in own) for own in self._tasks()))

    @property
    def per_gate(self) -> tuple[int, ...]:
        return tuple(self.num_shared + self.num_category + n for n in self.num_task)

    def names(self, task: int | None = None) -> tuple[str, ...]:
        assert task is not None, "there is no gate of a shared representation"
        own = [name for name in self._own_names(task) if name.startswith(self.owner)]
        return (*(f"shared{i}" for i in range(self.num_shared)), *self._category_names(self.categories[task]), *own)

    def all_names(self) -> tuple[str, ...]:
        names = [f"shared{i}" for i in range(self.num_shared)]
        for category, tasks in enumerate(self._tasks()):
            names += self._category_names(category)
            for task in tasks:
                names += self._own_names(task)
        return tuple(names)

    def _category_names(self, category: int) -> tuple[str, ...]:
        return tuple(f"category{category}.{i}" for i in range(self.num_category))

    def _tasks(self) -> list[list[int]]:
        """Return the tasks of each category."""
        return [[k for k, c in enumerate(self.categories) if c == own] for own in range(self.num_categories)]

    def expert_ids(self, task: int) -> list[int]:
        """Return the places of the experts that a task's gate and its self-gate weight, in the gates' order."""
        place = {name: i for i, name in enumerate(self.all_names())}
        return [place[name] for name in (*self.names(task), *(f"self{task}.{i}" for i in range(self.num_self)))]


@dataclass(frozen=True)
class GateLogits:
    """The logits of a level's gates for T examples, in float32.

    Attributes:
        task_TtE: (T, t, E), logits of the tasks' gates; padded if tasks have other numbers of own experts.
        self_TtL: (T, t, L), logits of the self-gates; None without them.
        shared_TE: (T, E of all), logits of the shared representation's gate; None without it.
    """

    task_TtE: Tensor
    self_TtL: Tensor | None
    shared_TE: Tensor | None


@dataclass(frozen=True)
class SelectedGates:
    """float32 (R, t) weights of each row: ``clean_Rt`` without expert dropout, ``used_Rt`` with it."""

    clean_Rt: Tensor
    used_Rt: Tensor


class DomainEmbedding(nn.Module):
    """A learned vector for each domain, added to the gates' input. It starts at zero, where domains do not matter."""

    def __init__(self, num_domains: int, dim: int) -> None:
        super().__init__()
        self.weight = nn.Parameter(torch.empty(num_domains, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        nn.init.zeros_(self.weight)

    def forward(self, x: Tensor, domain_T: Tensor) -> Tensor:
        """Return ``x`` (..., T, D) plus the vectors of the domains, int64 (T,)."""
        check_devices(x, type(self).__name__, self._parameters)
        return x + F.embedding(domain_T, self.weight).to(x.dtype)


class DenseGates(Router):
    """All softmax gates of a level: ``g_k(x) = softmax(W_k (x + e_domain))`` (MMoE, KDD 2018; PLE, RecSys 2020).

    With hidden layers a gate is a small network: ``g_k(x) = softmax(W_k relu(H_k x + c_k) + b_k)``.

    Parameters, with W the width of the last hidden layer, or D: ``weight`` (t, E, W), or (sum of the gates' E, W) if
    the tasks have other numbers of own experts; ``self_weight`` (t, L, W) with self-gates; ``shared_weight``
    (E of all, W) with a gate of the shared representation; ``bias``, as ``weight`` without W, ``self_bias`` (t, L) and
    ``shared_bias`` (E of all) with biases; ``hidden_weight_i`` (gates, in, out) and ``hidden_bias_i`` (gates, out) of
    hidden layer i, the shared representation's gate last; ``domain.weight`` (domains, D) if domains are known.

    Args:
        dim: D.
        groups: numbers of shared, tasks' and domains' experts.
        shared_gate: whether the shared representation has a gate.
        hidden_dims: widths of each gate's hidden layers.
        bias: whether the logits have a bias.
        init_scale: variance of the initial weights times D.
        terms: names of the balance terms that apply.
    """

    def __init__(
        self,
        dim: int,
        groups: ExpertGroups,
        *,
        shared_gate: bool = False,
        hidden_dims: tuple[int, ...] = (),
        bias: bool = False,
        init_scale: float = 0.1,
        terms: frozenset[str] = DENSE_TERMS | {"router_z_loss"},
    ) -> None:
        super().__init__()
        self.groups, self.terms, self.init_scale, self.num_hidden = groups, terms, init_scale, len(hidden_dims)
        weights = (groups.num_tasks, groups.per_gate[0]) if groups.is_even else (sum(groups.per_gate),)
        t, L, num_gates, W = groups.num_tasks, groups.num_self, groups.num_tasks + shared_gate, (dim, *hidden_dims)[-1]
        for i, (width, out) in enumerate(pairwise((dim, *hidden_dims))):
            self.register_parameter(f"hidden_weight_{i}", nn.Parameter(torch.empty(num_gates, width, out)))
            self.register_parameter(f"hidden_bias_{i}", nn.Parameter(torch.empty(num_gates, out)))
        self.weight = nn.Parameter(torch.empty(*weights, W))
        self.self_weight = nn.Parameter(torch.empty(t, L, W)) if L else None
        self.shared_weight = nn.Parameter(torch.empty(groups.per_shared_gate, W)) if shared_gate else None
        self.bias = nn.Parameter(torch.empty(*weights)) if bias else None
        self.self_bias = nn.Parameter(torch.empty(t, L)) if bias and L else None
        self.shared_bias = nn.Parameter(torch.empty(groups.per_shared_gate)) if bias and shared_gate else None
        self.domain = DomainEmbedding(groups.num_domains, dim) if groups.num_domains else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        for weight in (self.weight, self.self_weight, self.shared_weight):
            if weight is not None:
                init_gate_(weight, self.init_scale)
        for bias in (self.bias, self.self_bias, self.shared_bias):
            if bias is not None:
                nn.init.zeros_(bias)
        for w, b in self._hidden():
            bound = w.shape[1] ** -0.5  # as nn.Linear
            nn.init.uniform_(w, -bound, bound)
            nn.init.uniform_(b, -bound, bound)
        super().reset_parameters()

    def _hidden(self) -> list[tuple[Tensor, Tensor]]:
        return [
            (getattr(self, f"hidden_weight_{i}"), getattr(self, f"hidden_bias_{i}")) for i in range(self.num_hidden)
        ]

    @span("moe.router")
    def forward(self, x_GTD: Tensor, domain_T: Tensor | None = None) -> GateLogits:  # type: ignore[override]
        """Return the logits, computed outside autocast and at least in float32.

        Args:
            x_GTD: (1, T, D), one input for all; or (1 + t, T, D), the shared representation's and each task's.
            domain_T: int64 (T,), the domain of each example.
        """
        with outside_autocast(x_GTD.device):
            check_devices(x_GTD, type(self).__name__, self._parameters)
            x_GTD = x_GTD if x_GTD.dtype == torch.float64 else x_GTD.float()
            if self.domain is not None:
                assert domain_T is not None
                x_GTD = self.domain(x_GTD, domain_T)
            if self.num_hidden:
                x_GTD = self._through_hidden(x_GTD)
            return self._logits(x_GTD)

    def _through_hidden(self, x_GTD: Tensor) -> Tensor:
        """Return each gate's last hidden layer, (1 + t, T, W): the shared representation's gate comes first."""
        num_gates = self._hidden()[0][0].shape[0]
        has_shared = self.shared_weight is not None
        if x_GTD.shape[0] == 1:
            h_gTW = x_GTD.expand(num_gates, -1, -1)
        else:
            h_gTW = torch.cat((x_GTD[1:], x_GTD[:1])) if has_shared else x_GTD[1:]
        for w, b in self._hidden():
            h_gTW = torch.baddbmm(b.to(h_gTW.dtype)[:, None], h_gTW, w.to(h_gTW.dtype)).relu()
        # Without a gate of the shared representation nobody reads the first place.
        return torch.cat((h_gTW[-1:], h_gTW[:-1])) if has_shared else torch.cat((h_gTW[:1], h_gTW))

    def _logits(self, x_GTD: Tensor) -> GateLogits:
        if not self.groups.is_even:
            return self._uneven_logits(x_GTD)
        w_tED = self.weight if self.self_weight is None else torch.cat((self.weight, self.self_weight), 1)
        (t, E, _), per_gate, shared_TE = w_tED.shape, self.weight.shape[1], None
        if x_GTD.shape[0] == 1:
            w = w_tED.flatten(0, 1)
            w = w if self.shared_weight is None else torch.cat((w, self.shared_weight))
            logits = F.linear(x_GTD[0], w.to(x_GTD.dtype))
            logits_TtE = logits[:, : t * E].unflatten(1, (t, E))
            shared_TE = None if self.shared_weight is None else logits[:, t * E :]
        else:
            logits_TtE = torch.bmm(x_GTD[1:], w_tED.to(x_GTD.dtype).transpose(1, 2)).transpose(0, 1)
            if self.shared_weight is not None:
                shared_TE = F.linear(x_GTD[0], self.shared_weight.to(x_GTD.dtype))
        self_TtL = None if self.self_weight is None else _plus(logits_TtE[..., per_gate:], self.self_bias)
        shared_TE = None if shared_TE is None else _plus(shared_TE, self.shared_bias)
        return GateLogits(_plus(logits_TtE[..., :per_gate], self.bias), self_TtL, shared_TE)

    def _uneven_logits(self, x_GTD: Tensor) -> GateLogits:
        """Return the logits of gates of several sizes: one matmul per task."""
        groups, dtype = self.groups, x_GTD.dtype
        x_kTD = x_GTD.expand(1 + groups.num_tasks, -1, -1)  # the shared representation's first
        biases = [None] * groups.num_tasks if self.bias is None else self.bias.to(dtype).split(groups.per_gate)
        task_TtE, self_TtL, shared_TE = [], [], None
        for k, (w, b) in enumerate(zip(self.weight.to(dtype).split(groups.per_gate), biases, strict=True)):
            task_TtE.append(groups.padded(_plus(F.linear(x_kTD[1 + k], w), b), k))
            if self.self_weight is not None:
                self_TtL.append(F.linear(x_kTD[1 + k], self.self_weight[k].to(dtype)))
        if self.shared_weight is not None:
            shared_TE = _plus(F.linear(x_kTD[0], self.shared_weight.to(dtype)), self.shared_bias)
        own_TtL = _plus(torch.stack(self_TtL, 1), self.self_bias) if self_TtL else None
        return GateLogits(torch.stack(task_TtE, 1), own_TtL, shared_TE)


def _plus(logits: Tensor, bias: Tensor | None) -> Tensor:
    return logits if bias is None else logits + bias.to(logits.dtype)


class GateRouters(Router):
    """The routers of a layer that has several: one for each level's gates, or one for each task."""

    def __init__(self, routers: list[Router], domain: DomainEmbedding | None = None) -> None:
        super().__init__()
        self.routers = nn.ModuleList(routers)
        self.domain = domain

    def __getitem__(self, i: int) -> Router:
        router: Router = self.routers[i]  # type: ignore[assignment]
        return router

    def __len__(self) -> int:
        return len(self.routers)


def dropped_experts(weights: Tensor, rate: float) -> Tensor:
    """Return which experts each gate leaves out in training, bool (..., E); at least one with a weight above 0 stays in
    every row (Zhao et al., RecSys 2019).

    Args:
        weights: (..., E), weights of the gates; an expert of weight 0 is out already.
        rate: probability that a row leaves out an expert.
    """
    draw = torch.rand_like(weights).masked_fill(weights <= 0, -1.0)
    return (draw < rate) & (draw < draw.amax(-1, keepdim=True))


def joint_choice(gates_TtE: Tensor, shared_top_k: int, private_top_k: int) -> Tensor:
    """Return the experts of each task, int64 (T, t, shared_top_k + private_top_k): first the ones with the highest mean
    gate over the tasks, the same for all, then each task's highest gates among the others.

    Args:
        gates_TtE: (T, t, E), the tasks' gates, not negative.
        shared_top_k, private_top_k: numbers of experts; together at most E.
    """
    gates_TtE = gates_TtE.detach()
    shared_TtK = top_k_ids(gates_TtE.mean(1), shared_top_k)[:, None].expand(-1, gates_TtE.shape[1], -1)
    if not private_top_k:
        return shared_TtK
    private_TtK = top_k_ids(gates_TtE.scatter(-1, shared_TtK, -1.0), private_top_k)
    return torch.cat((shared_TtK, private_TtK), -1)


def expected_experts(num_experts: int, per_task: float, num_tasks: int) -> float:
    """Return how many of E experts at least one task chooses on average, if each of t tasks chooses ``per_task`` of
    them evenly and independently of the others: ``E (1 - (1 - per_task / E)^t)``. Tasks that agree choose fewer."""
    return num_experts * (1 - (1 - min(per_task / num_experts, 1.0)) ** num_tasks)


def selected_softmax(
    logits_Rt: Tensor, prior_R: Tensor, example_R: Tensor, num_examples: int, dropout: float = 0.0
) -> SelectedGates:
    """Return ``P p_e exp(l_e) / sum_j p_j exp(l_j)`` with ``P = sum_j p_j``, the sums over the rows of an example: a
    softmax over the experts that another gate selected, which starts from that gate's weights and keeps their sum, so
    that both learn.

    Args:
        logits_Rt: float32 (R, t); -inf where nothing is computed.
        prior_R: float32 (R,), the other gate's weights p; 0 where nothing is computed.
        example_R: int64 (R,), the example of each row.
        num_examples: T.
        dropout: rate of expert dropout among the rows of an example.
    """

    def softmax(kept_Rt: Tensor) -> Tensor:
        highest_Tt = largest_of_example(logits_Rt.detach().masked_fill(~kept_Rt, -torch.inf), example_R, num_examples)
        highest_Tt = torch.where(highest_Tt.isfinite(), highest_Tt, 0.0)
        shifted_Rt = (logits_Rt - highest_Tt.index_select(0, example_R)).masked_fill(~kept_Rt, -torch.inf)
        weights_Rt = prior_R[:, None] * shifted_Rt.exp()
        zeros_Tt = weights_Rt.new_zeros(num_examples, weights_Rt.shape[1])
        sum_Tt = zeros_Tt.index_add(0, example_R, weights_Rt)
        prior_T1 = zeros_Tt[:, :1].index_add(0, example_R, prior_R[:, None])
        # The sum's largest term is a prior: small at times, 0 where nothing is computed.
        return weights_Rt * (prior_T1 / sum_Tt.clamp_min(1e-30)).index_select(0, example_R)

    live_Rt = (prior_R > 0)[:, None].expand_as(logits_Rt)
    clean_Rt = softmax(live_Rt)
    if not dropout:
        return SelectedGates(clean_Rt, clean_Rt)
    draw_Rt = torch.rand_like(logits_Rt).masked_fill(~live_Rt, -1.0)
    stays_Tt = largest_of_example(draw_Rt, example_R, num_examples)
    dropped_Rt = (draw_Rt < dropout) & (draw_Rt < stays_Tt.index_select(0, example_R))
    return SelectedGates(clean_Rt, softmax(live_Rt & ~dropped_Rt))


def largest_of_example(value_Rt: Tensor, example_R: Tensor, num_examples: int) -> Tensor:
    """Return the largest value among the rows of each example, (T, t); -inf without rows."""
    start_Tt = value_Rt.new_full((num_examples, value_Rt.shape[1]), -torch.inf)
    return start_Tt.scatter_reduce(0, example_R[:, None].expand_as(value_Rt), value_Rt, "amax")
