"""Multi-task layers: experts that all tasks share, or own, and one gate per task that weights them."""

from __future__ import annotations

import re
from dataclasses import dataclass, replace
from typing import Any, cast

import torch
from torch import Tensor, nn

from .. import kernels
from ..contract import DenseRouting, RoutingContext
from ..dispatch import split_pairs
from ..experts import Experts, num_params
from ..experts.products import autocast_together, first_linear, next_linear
from ..routing.balance.balance import Balance
from ..routing.multi_gate import (
    DenseGates,
    ExpertGroups,
    GateRouters,
    dropped_experts,
)
from ..routing.router import Router, Tokens
from .base import MoELayer, check_valid

SHARED = "shared"
"""End of the entries' name for a shared representation's gate."""
ENDS = re.compile(rf"(level\d+\.)?(task\d+|category\d+|tasks|selection|{SHARED})")
"""Ends of the names of a layer's entries."""


@dataclass(frozen=True)
class Examples:
    """The input of a layer, brought to one form.

    Attributes:
        x_TD: (T, D), in its own dtype; padding is zero.
        x_BSD: the same as sequences: (T, 1, D) if the layer got (T, D).
        leading: shape of the examples.
        real_T: bool (T,), False for padding; None if every example is real.
        domain_T: int64 (T,); None if the layer knows no domains.
        context: as the layer got it, with ``valid_BS`` in the shape of ``x_BSD``.
    """

    x_TD: Tensor
    x_BSD: Tensor
    leading: torch.Size
    real_T: Tensor | None
    domain_T: Tensor | None
    context: RoutingContext | None


class MultiGateLayer(MoELayer):
    """Base of the multi-task layers: ``layer(x, context)`` makes (t, ..., D_out) of (..., D), an output a task.

    An entry of the tape is one gate's: ``<layer>.task0``, ``<layer>.task1``, and so on.

    Args:
        num_tasks: t.
        num_domains: number of domains whose id ``context.domain_ids_B`` holds; 0: the layer does not ask.
        balance: loss weights, for each gate.
        dim: width of the examples; None: as wide as the parts take them.
        expert_dropout: probability that a gate leaves an expert out in training, example by example.
    """

    def __init__(
        self,
        num_tasks: int,
        num_domains: int = 0,
        *,
        balance: Balance = Balance(),
        dim: int | None = None,
        expert_dropout: float = 0.0,
    ) -> None:
        super().__init__(balance, dim)
        self.num_tasks, self.num_domains, self.expert_dropout = num_tasks, num_domains, expert_dropout

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (B, D) examples, or (..., S, D) sequences of them.
            context: ``valid_BS`` marks the real examples, in the shape of ``x`` without D; ``domain_ids_B`` is (B,).

        Returns:
            (t, ..., D_out). Padding is zero.

        Raises:
            ValueError: ``x`` has one dimension or another width than ``dim``, ``valid_BS`` has another shape or is not
                bool, or the layer knows domains and ``domain_ids_B`` is missing, of another shape, or (on CPU) out of
                range.
        """
        examples = self._examples(x, context)
        y_tTD = self._compute(examples)
        if examples.real_T is not None:
            y_tTD = y_tTD.masked_fill(~examples.real_T[:, None], 0.0)
        return y_tTD.unflatten(1, examples.leading)

    def names_entry(self, end: str) -> bool:
        return ENDS.fullmatch(end) is not None

    def _compute(self, examples: Examples) -> Tensor:
        """Return the tasks' outputs, (t, T, D_out); rows of padding may be anything finite."""
        raise NotImplementedError

    def _examples(self, x: Tensor, context: RoutingContext | None) -> Examples:
        if x.ndim < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: a multi-gate layer needs at least (examples, dim)")
        self._check_width(x)
        x_BSD = x.unsqueeze(1) if x.ndim == 2 else x.flatten(0, -3)
        real_T = domain_T = None
        if context is not None and context.valid_BS is not None:
            valid = context.valid_BS
            check_valid(valid, (x.shape[:-1], x_BSD.shape[:2]), "examples")
            context = replace(context, valid_BS=valid.reshape(x_BSD.shape[:2]))
            real_T = valid.flatten()
            # Padding may hold NaN, which would reach the weight gradients.
            x_BSD = x_BSD.masked_fill(~real_T.reshape(x_BSD.shape[:2])[..., None], 0.0)
        if self.num_domains:
            if context is None or context.domain_ids_B is None:
                raise ValueError(f"{type(self).__name__} knows domains and needs context.domain_ids_B, which is None")
            tokens = Tokens.of(x_BSD, context)
            domain_T = tokens.to_tokens(tokens.ids("domain_ids_B", self.num_domains))
        return Examples(x_BSD.flatten(0, 1), x_BSD, x.shape[:-1], real_T, domain_T, context)


@dataclass(frozen=True)
class LevelOutputs:
    """The outputs of a level: ``task_tTH`` (t, T, H), and ``shared_TH`` (T, H) if it has a gate for it."""

    task_tTH: Tensor
    shared_TH: Tensor | None


class FeatureGate(nn.Module):
    """An input of its own for each expert: ``x * 2 sigmoid(x A_e B_e)`` with A_e (D, r) and B_e (r, D) (HoME, arXiv
    2408.05430, the feature-gate, with one low-rank gate per expert; the paper mixes a few). It starts at ``x``.

    Parameters: ``down`` (n, D, r), ``up`` (n, r, D).
    """

    def __init__(self, dim: int, num_experts: int, rank: int) -> None:
        super().__init__()
        self.down = nn.Parameter(torch.empty(num_experts, dim, rank))
        self.up = nn.Parameter(torch.empty(num_experts, rank, dim))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        bound = self.down.shape[1] ** -0.5
        nn.init.uniform_(self.down, -bound, bound)
        nn.init.zeros_(self.up)

    def forward(self, x_GTD: Tensor, counts: tuple[int, ...]) -> Tensor:
        """Return each expert's input, (n, T, D), from (G, T, D) inputs of ``counts`` experts each."""
        kernels.check_devices(x_GTD, type(self).__name__, self._parameters)
        x_GTD, down, up = autocast_together(x_GTD, self.down, self.up)
        gate_nTD = next_linear(first_linear(x_GTD, down, None, counts), up, None).transpose(0, 1)
        x_nTD = torch.cat([x.expand(count, -1, -1) for x, count in zip(x_GTD, counts, strict=True)])
        return x_nTD * (2 * gate_nTD.sigmoid())


class DenseGatesLayer(MultiGateLayer):
    """Base of the layers whose gates are softmaxes over experts that compute every example."""

    def routers(self) -> dict[str, Router]:
        return {}  # nothing of theirs moves but by the gradient


class MultiGateMoE(DenseGatesLayer):
    """One level of experts under softmax gates (MMoE, OMoE, CGC): ``y_k = sum_e g_k(x)_e f_e(x)``, over the shared
    experts and task k's own, ``+ sum_l s_k(x)_l f_l(x)`` over its self-gate's. Every expert computes every example.

    A domain's own experts only compute its examples, and are part of the gates of all tasks.

    Args:
        gates: the gates of the level.
        experts: its experts, in the order of ``groups``.
        groups: how the experts are shared out among tasks and domains.
        num_tasks: t; ``groups.num_tasks`` is 1 if one gate serves all.
        feature_gate: inputs of the experts' own.
        options: ``balance``, ``expert_dropout`` and ``dim``, as in ``MultiGateLayer``.
    """

    router: DenseGates

    def __init__(
        self,
        gates: DenseGates,
        experts: Experts,
        groups: ExpertGroups,
        *,
        num_tasks: int,
        feature_gate: FeatureGate | None = None,
        **options: Any,
    ) -> None:
        super().__init__(num_tasks, groups.num_domains, **options)
        self.router, self.experts, self.groups, self.feature_gate = gates, experts, groups, feature_gate

    def _compute(self, examples: Examples) -> Tensor:
        x_GTD = examples.x_TD.unsqueeze(0)
        mixed = mix_level(self, self.router, self.experts, self.feature_gate, x_GTD, examples)
        return mixed.task_tTH.expand(self.num_tasks, -1, -1)

    def active_expert_params(self) -> int:
        return _active_params(self.experts, self.groups)


class PLELayer(DenseGatesLayer):
    """Progressive layered extraction (PLE, RecSys 2020): levels of shared and task experts. Each task's representation
    and the shared one pass from level to level; the gate of the shared one, which the last level lacks, sees all
    experts.

    Entries of the tape: ``<layer>.level0.task0``, ..., ``<layer>.level0.shared``, ``<layer>.level1.task0``, ...

    Args:
        gates, experts, feature_gates: of each level.
        groups, options: as in ``MultiGateMoE``.
    """

    router: GateRouters
    experts: nn.ModuleList  # type: ignore[assignment]

    def __init__(
        self,
        gates: list[DenseGates],
        experts: list[Experts],
        groups: ExpertGroups,
        feature_gates: list[FeatureGate] | None = None,
        **options: Any,
    ) -> None:
        super().__init__(groups.num_tasks, groups.num_domains, **options)
        self.router, self.experts, self.groups = GateRouters(list(gates)), nn.ModuleList(experts), groups
        self.feature_gates = None if feature_gates is None else nn.ModuleList(feature_gates)

    def _compute(self, examples: Examples) -> Tensor:
        x_GTD = examples.x_TD.unsqueeze(0)
        for i, experts in enumerate(self.experts):
            feature_gate = None if self.feature_gates is None else cast(FeatureGate, self.feature_gates[i])
            gates = cast(DenseGates, self.router[i])
            mixed = mix_level(self, gates, cast(Experts, experts), feature_gate, x_GTD, examples, f"level{i}")
            if mixed.shared_TH is not None:
                x_GTD = torch.cat((mixed.shared_TH.unsqueeze(0), mixed.task_tTH))
        return mixed.task_tTH

    def active_expert_params(self) -> int:
        return sum(_active_params(cast(Experts, experts), self.groups) for experts in self.experts)


def _active_params(experts: Experts, groups: ExpertGroups) -> int:
    """Return a level's expert parameters that an example touches: all but other domains' experts."""
    total = num_params(experts)
    return total * (groups.num_dense + groups.num_domain) // groups.num_experts


def mix_level(
    layer: DenseGatesLayer,
    gates: DenseGates,
    experts: Experts,
    feature_gate: FeatureGate | None,
    x_GTD: Tensor,
    examples: Examples,
    prefix: str = "",
) -> LevelOutputs:
    """Compute one level: all experts compute, all gates weight.

    Args:
        layer: the layer, for its tape, its dispatcher and its dropout.
        gates: the gates, for their groups of experts.
        x_GTD: (1, T, D), one input for all, or (1 + t, T, D): the shared representation, then the tasks'.
        prefix: start of the entries' ends.
    """
    groups, s = gates.groups, gates.groups.num_shared
    logits = gates(x_GTD, examples.domain_T)
    h_TnH, h_TdH = expert_outputs(layer, groups, experts, feature_gate, x_GTD, examples)
    # Weighted sums in float32 at least: half precision would round each gate.
    dtype = h_TnH.dtype
    h_TnH = h_TnH.to(torch.promote_types(dtype, torch.float32))

    with kernels.outside_autocast(x_GTD.device):
        gates_TtE = gate_weights(layer, gates, logits.task_TtE, examples, prefix).to(h_TnH.dtype)
        y_TtH = torch.bmm(gates_TtE[..., :s], h_TnH[:, :s])
        own_TtL = gates_TtE[..., s : s + groups.most_own]
        if groups.most_own + groups.num_self:
            self_TtL = None if logits.self_TtL is None else self_weights(logits.self_TtL).to(h_TnH.dtype)
            y_TtH = y_TtH + _own_sums(own_TtL, self_TtL, h_TnH[:, s:], groups)
        if h_TdH is not None:
            h_TdH = h_TdH.to(h_TnH.dtype)
            y_TtH = y_TtH + torch.bmm(gates_TtE[..., s + groups.most_own :], h_TdH)
        shared_TH = None
        if logits.shared_TE is not None:
            seen = [h_TnH[:, :s]]
            h_own = h_TnH[:, s:].split(groups.counts[1:], 1)
            seen += [h_TlH[:, :n] for h_TlH, n in zip(h_own, groups.num_task, strict=True) if n]
            if h_TdH is not None:
                seen.append(h_TdH)
            gates_T1E = gate_weights(layer, gates, logits.shared_TE.unsqueeze(1), examples, prefix, is_shared=True)
            shared_TH = torch.bmm(gates_T1E.to(h_TnH.dtype), torch.cat(seen, 1)).squeeze(1).to(dtype)
        return LevelOutputs(y_TtH.to(dtype).transpose(0, 1), shared_TH)


def gate_weights(
    layer: DenseGatesLayer,
    gates: DenseGates,
    logits_TtE: Tensor,
    examples: Examples,
    prefix: str = "",
    is_shared: bool = False,
) -> Tensor:
    """Return the softmax over the last axis, with expert dropout in training, and record the softmax without it.

    Args:
        layer: the layer, for its tape and its dropout.
        gates: the gates whose logits they are.
        logits_TtE: (T, t, E), or (T, 1, E) of the shared representation's gate.
        prefix: start of the entries' ends.
        is_shared: whether it is the shared representation's gate.
    """
    groups, T, real_T = gates.groups, logits_TtE.shape[0], examples.real_T
    clean = logits_TtE.softmax(-1)
    of_real = clean if real_T is None else clean.masked_fill(~real_T[:, None, None], 0.0)
    for k, name in enumerate([SHARED] if is_shared else groups.gate_names(layer.num_tasks)):
        names = groups.names(None if is_shared else k)
        routing = DenseRouting(of_real, k, T, logits_TtE, real_T, names, examples.x_BSD.shape[0])
        if not is_shared and not groups.is_even:
            gates_T1E, logits_T1E = groups.unpadded(of_real, k), groups.unpadded(logits_TtE, k)
            routing = replace(routing, gates_BtE=gates_T1E, gate=0, logits_BtE=logits_T1E)
        layer.record_pass(routing, examples.context, end=f"{prefix}.{name}".lstrip("."), router=gates)
    return with_dropout(layer, clean, logits_TtE)


def with_dropout(layer: DenseGatesLayer, clean: Tensor, logits: Tensor) -> Tensor:
    """Return the softmax ``clean`` of ``logits``, in training without the experts that expert dropout leaves out."""
    if not (layer.training and layer.expert_dropout):
        return clean
    return logits.masked_fill(dropped_experts(clean, layer.expert_dropout), -torch.inf).softmax(-1)


def self_weights(logits_TtL: Tensor) -> Tensor:
    """Return the weights of self-gates from their logits: one expert is switched, several are mixed."""
    return logits_TtL.sigmoid() if logits_TtL.shape[-1] == 1 else logits_TtL.softmax(-1)


def _own_sums(own_TtL: Tensor, self_TtL: Tensor | None, h_TlH: Tensor, groups: ExpertGroups) -> Tensor:
    """Return the weighted sums of each task's own experts and its self-gate's, (T, t, H).

    Args:
        own_TtL: weights of the own experts, padded to the most that a task has.
        self_TtL: weights of the self-gates' experts; None without them.
        h_TlH: outputs of all tasks' own experts and their self-gates', task by task.
        groups: numbers of experts.
    """
    if groups.is_even:
        weights_TtL = own_TtL if self_TtL is None else torch.cat((own_TtL, self_TtL), -1)
        return torch.matmul(weights_TtL.unsqueeze(2), h_TlH.unflatten(1, (groups.num_tasks, -1))).squeeze(2)
    sums = []
    for k, (n, h_TLH) in enumerate(zip(groups.num_task, h_TlH.split(groups.counts[1:], 1), strict=True)):
        own_TL = own_TtL[:, k, :n]
        weights_TL = own_TL if self_TtL is None else torch.cat((own_TL, self_TtL[:, k]), -1)
        sums.append(torch.bmm(weights_TL.unsqueeze(1), h_TLH).squeeze(1))
    return torch.stack(sums, 1)


def expert_outputs(
    layer: DenseGatesLayer,
    groups: ExpertGroups,
    experts: Experts,
    feature_gate: FeatureGate | None,
    x_GTD: Tensor,
    examples: Examples,
) -> tuple[Tensor, Tensor | None]:
    """Return (T, n, H) of the experts that compute every example, and (T, d, H) of its domain's experts."""
    # With one input for all the experts are one group.
    counts = groups.counts if x_GTD.shape[0] > 1 else (groups.num_dense,)
    if feature_gate is None:
        h_TnH = experts(x_GTD, "each", counts, examples.real_T)
    else:
        h_TnH = experts(feature_gate(x_GTD, counts), "each", (1,) * groups.num_dense, examples.real_T)
    if not groups.num_domain:
        return h_TnH, None
    assert examples.domain_T is not None
    T, d, E, device = x_GTD.shape[1], groups.num_domain, groups.num_experts, x_GTD.device
    expert_ids_Td = groups.num_dense + examples.domain_T[:, None] * d + torch.arange(d, device=device)
    if examples.real_T is not None:
        expert_ids_Td = expert_ids_Td.masked_fill(~examples.real_T[:, None], E)
    expert_ids_N = expert_ids_Td.flatten()
    token_index_N = torch.arange(T, device=device).repeat_interleave(d)
    pairs = split_pairs(token_index_N, expert_ids_N, kernels.count_experts(expert_ids_N, E))
    rows = experts(layer.dispatcher.dispatch(x_GTD[0], pairs))
    return h_TnH, layer.dispatcher.combine(rows).unflatten(0, (T, d))
