"""``MoELayer``, the layers of one router, and what a model's layers have in common: their counts and their capacity."""

from __future__ import annotations

import contextlib
import math
import warnings
import weakref
from collections.abc import Iterator
from dataclasses import replace
from typing import Any, ClassVar

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Decision, Entry, MergeRouting, Routing, RoutingContext, Rows, SlotRouting, Tape
from ..contract.checks import check_tensor
from ..dispatch import Dispatcher, LocalDispatcher, SlotDispatcher
from ..experts import Experts, check_merges, num_params
from ..flops import register_formulas
from ..kernels import check_backend, expert_of_rows, outside_autocast
from ..routing.balance.balance import Balance
from ..routing.balance.losses import contrast_losses
from ..routing.router import Router
from ..routing.soft.soft import in_segments
from ..torch_internals import in_backward
from .shared import SharedGate


def nothing(module: nn.Module, args: Any) -> None:
    """Do nothing before a layer's forward, but be a hook on it."""


UNRECORDED_PASSES = 50
"""Training passes without a tape after which a layer with balance losses warns."""
_warned: list[weakref.ref[MoELayer]] = []
"""The layer that has warned last."""


class MoELayer(nn.Module):
    """Base of the MoE layers: what ``record``, ``moe_layers`` and ``active_params`` look for.

    A layer of your own has a ``router`` and ``experts``, and calls ``record_pass`` in its forward; where it has several
    routers, ``routers`` names them.

    Args:
        balance: weights of the layer's balance losses.
        dim: width of the tokens; None: as wide as the parts take them.
        dispatcher: moves tokens to experts; None: one of ``default_dispatcher``.

    Attributes:
        router, experts, dispatcher: the parts.
        out_dim: width of the output, where ``MoEConfig`` built the layer; else None.
        load_balancing_weight: float32 () buffer where ``balance.adaptive``, else None.
    """

    router: Router
    experts: Experts
    balance: Balance
    load_balancing_weight: Tensor | None
    out_dim: int | None = None
    default_dispatcher: ClassVar[type[Dispatcher]] = LocalDispatcher
    own_terms: ClassVar[frozenset[str]] = frozenset()
    """Balance terms that apply by the layer, whatever its router."""
    splits_experts: ClassVar[bool] = False
    """Whether the routed experts may be on other ranks: tokens reach them through the dispatcher alone."""

    def __init__(
        self, balance: Balance = Balance(), dim: int | None = None, dispatcher: Dispatcher | None = None
    ) -> None:
        super().__init__()
        register_formulas()
        self.dim = dim
        self.dispatcher = self.default_dispatcher() if dispatcher is None else dispatcher
        self._tapes: tuple[tuple[str, Tape], ...] = ()
        self._unrecorded = 0
        self.balance = balance
        weight = torch.empty((), dtype=torch.float32) if balance.adaptive else None
        self.register_buffer("load_balancing_weight", weight)
        # ``nn.TransformerEncoderLayer`` computes its own feed-forward block in evaluation, whatever ``_ff_block`` says,
        # unless there is a hook on it or in it.
        self.register_forward_pre_hook(nothing)
        MoELayer.reset_parameters(self)  # a subclass's own parameters are not there yet

    def reset_parameters(self) -> None:
        """Set what the layer itself holds to its start. Router and experts have methods of their own."""
        if self.load_balancing_weight is not None:
            self.load_balancing_weight.fill_(self.balance.load_balancing)

    def _apply(self, fn: Any, recurse: bool = True) -> MoELayer:
        before = self.load_balancing_weight
        super()._apply(fn, recurse)
        after = self.load_balancing_weight
        if before is not None and after is not None and after.dtype != before.dtype:
            # In half precision steps of 1 % of a percent would vanish: keep the dtype, and the value unrounded.
            self.load_balancing_weight = before.to(after.device)
        return self

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle taken inside ``record`` is not recorded.
        return {**self.__dict__, "_tapes": (), "_unrecorded": 0}

    def _check_width(self, x: Tensor) -> None:
        """Raise a ``ValueError`` where tokens are not ``dim`` wide: not every gate and product would notice."""
        if x.is_nested:
            raise ValueError("x is a nested tensor: give nn.TransformerEncoder enable_nested_tensor=False")
        if self.dim is not None and x.shape[-1] != self.dim:
            raise ValueError(f"x has width {x.shape[-1]}, the layer is for dim={self.dim}")

    @property
    def row_dim(self) -> int | None:
        """The width of what the router sees: ``dim``, but for layers whose experts take several tokens at once."""
        return self.dim

    @property
    def backend(self) -> str:
        """The backend whose kernels route, move and compute. Setting it sets it for all parts of the layer."""
        return self.dispatcher.backend

    @backend.setter
    def backend(self, name: str) -> None:
        check_backend(name)
        self.dispatcher.backend = name
        for part in self.modules():
            if isinstance(part, (Router, Experts)):
                part.backend = name

    def routers(self) -> dict[str, Router]:
        """Return the routers by the ends of their entries' names: a decision is recorded as ``<layer>.<end>``."""
        return {"": self.router}

    @property
    def is_recorded(self) -> bool:
        """True while a tape listens. Without one, what is made for it alone can be left out."""
        return len(self._tapes) > 0  # of a tuple, which torch 2.10 does not trace as bool

    def record_pass(
        self,
        routing: Decision,
        context: RoutingContext | None = None,
        *,
        end: str = "",
        router: Router | None = None,
        shared_gate: SharedGate | None = None,
        shared_gate_T: Tensor | None = None,
        terms: frozenset[str] | None = None,
    ) -> None:
        """Put one entry on each tape that listens. A layer calls it once in a forward for each decision of a router.

        Then the balance losses, the selection biases and the statistics know the layer. Outside ``core.record``, and
        where an activation checkpoint repeats the forward, nothing happens.

        Args:
            routing: what the router decided.
            context: what the layer got, for the losses that read it.
            end: end of the entry's name, ``<layer>.<end>``, in a layer with several routers: a key of ``routers()``.
            router: which of them decided; None: ``self.router``.
            shared_gate: the gate on the shared experts, where there is one.
            shared_gate_T: float32 (T,), the gate of each token.
            terms: names of the balance terms that apply; None: the router's and the layer's own.
        """
        if not self._tapes:
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._count_unrecorded()
            return
        if not torch.compiler.is_compiling() and in_backward():
            return  # an activation checkpoint repeats the forward inside the backward: counted already
        router = self.router if router is None else router
        terms = router.terms | self.own_terms if terms is None else terms
        pulled = list(router.parameters())
        if self.balance.contrast and self.own_terms:
            pulled = [*pulled, *self.experts.parameters()]
        if shared_gate is not None:
            terms = terms | shared_gate.terms
            if self.balance.gate_budget:
                pulled = [*pulled, *shared_gate.parameters()]
        needs_grad = self.training and any(p.requires_grad for p in pulled)
        for name, tape in self._tapes:
            entry = Entry(
                name=entry_name(name, end),
                routing=routing,
                context=context,
                balance=self.balance,
                terms=terms,
                needs_grad=needs_grad and tape.grad_wanted,
                has_grad=torch.is_grad_enabled(),
                extra_weights={**router.extra_weights, **router.moving_weights()},
                load_balancing_weight=self.load_balancing_weight,
                shared_gate_T=shared_gate_T,
            )
            tape.append(entry)

    def balance_weights(self) -> dict[str, float]:
        """Return the weights above 0 of the balance losses that apply to the layer, by name."""
        parts = [m for m in self.modules() if isinstance(m, (Router, SharedGate))]
        given = {**self.balance.weights(), **{k: v for m in parts for k, v in getattr(m, "extra_weights", {}).items()}}
        terms = self.own_terms.union(*(m.terms for m in parts))
        return {name: weight for name, weight in given.items() if name in terms and weight > 0}

    def _count_unrecorded(self) -> None:
        """Count a training pass that no tape records, and warn once for a model whose balance losses are lost so."""
        self._unrecorded += 1
        if self._unrecorded != UNRECORDED_PASSES:
            return
        # Where the layer that warned has not run since, this one is of the same model, in the same step.
        warned = _warned[0]() if _warned else None
        if warned is not None and warned._unrecorded == UNRECORDED_PASSES:
            return
        weights = self.balance_weights()
        if weights and any(p.requires_grad for router in self.routers().values() for p in router.parameters()):
            _warned[:] = [weakref.ref(self)]
            warnings.warn(
                f"MoE layers have trained for {UNRECORDED_PASSES} steps without their balance losses "
                f"({', '.join(f'{name}={weight:g}' for name, weight in weights.items())}), so that a few experts may "
                "take all tokens. Write `with core.record(model) as tape: loss = ...`, then "
                "`(loss + core.aux_loss(tape)).backward()`; or set the weights of Balance to 0",
                stacklevel=2,
            )

    def shares_sums(self) -> torch.device | None:
        """Return the layer's device if its balance losses depend on the tokens of all ranks, else None."""
        if self.balance.scope != "global" or not self.balance_weights():
            return None
        tensors = (*self.parameters(), *self.buffers())
        return tensors[0].device if tensors else torch.device("cpu")

    def names_entry(self, end: str) -> bool:
        """Return whether an entry of this layer may have a name with this end."""
        return end in self.routers()

    def active_expert_params(self) -> int:
        """Return the parameters of the routed experts that one token touches, of all ranks."""
        raise NotImplementedError

    def all_expert_params(self) -> int:
        """Return the parameters of the routed experts, of all ranks: a ``DTensor`` counts as whole."""
        return num_params(self.experts)


def check_valid(valid: Tensor, shapes: tuple[torch.Size, ...], noun: str) -> None:
    """Raise a ``ValueError`` where ``context.valid_BS`` is not bool, or of none of the shapes that it may have."""
    check_tensor("context.valid_BS", valid)
    if valid.shape not in shapes:
        raise ValueError(f"context.valid_BS has shape {tuple(valid.shape)}, the {noun} {tuple(shapes[0])}")
    if valid.dtype != torch.bool:
        raise ValueError(f"context.valid_BS is {valid.dtype}: it must be bool, True for real {noun}")


def entry_name(layer: str, end: str) -> str:
    """Return the name of the entry of one router, given the layer's name and the router's end."""
    return ".".join(part for part in (layer, end) if part)


class MoE(MoELayer):
    """Sparse mixture of experts: ``y_t = sum over its experts of gate * f_e(x_t)``, plus the shared experts.

    The path of a token: the router decides (float32), the dispatcher indexes, the experts compute, the dispatcher sums.
    A token no expert computes comes out zero (plus the shared experts): the block's residual carries it. With a
    ``shared_gate`` the two are weighted against each other.

    Args:
        router, experts: the parts, for the same E.
        balance, dispatcher, dim: as in ``MoELayer``.
        shared_experts: experts that every token takes.
        shared_gate: gate between them and the routed output; None: their sum.
        expert_output_masking: probability in training that a pair's output is left out; the others are divided by
            1 minus it.
        bias_dim: width of a bias that is added to every token's output; None: there is none.
        pairs_per_token: experts a token takes, for ``active_params``; None: as the router's config says.

    Raises:
        ValueError: a part is no router or no experts; the router chooses among another number of experts than there
            are, those of other ranks included; or ``balance.contrast`` with experts that gather statistics, since it
            computes some rows twice.
    """

    own_terms = frozenset({"contrast"})
    splits_experts = True

    def __init__(
        self,
        router: Router,
        experts: Experts,
        balance: Balance = Balance(),
        dispatcher: Dispatcher | None = None,
        shared_experts: Experts | None = None,
        *,
        shared_gate: SharedGate | None = None,
        expert_output_masking: float = 0.0,
        bias_dim: int | None = None,
        pairs_per_token: float | None = None,
        dim: int | None = None,
    ) -> None:
        if not isinstance(router, Router) or not isinstance(experts, Experts):
            raise ValueError(
                f"MoE({router!r}, {experts!r}) is made of a router and experts: a layer of 8 experts for tokens of "
                "width 64 is core.MoEConfig(num_experts=8, router=core.TokenChoice(top_k=2)).build(64)"
            )
        super().__init__(balance, dim, dispatcher)
        self.router, self.experts = router, experts
        self.shared_experts, self.shared_gate = shared_experts, shared_gate
        self.expert_output_masking = expert_output_masking
        self.num_experts = experts.num_experts
        config: Any = getattr(router, "config", None)  # a router of the user's own may have none
        if pairs_per_token is None:
            if config is None:
                raise ValueError(f"pairs_per_token=None: {type(router).__name__} has no config that says it")
            pairs_per_token = config.pairs_per_token(self.num_experts)
        self.pairs_per_token = pairs_per_token
        chosen_among = getattr(router, "num_experts", self.num_experts)
        if chosen_among != self.num_experts:
            raise ValueError(f"the router chooses among {chosen_among} experts, and there are {self.num_experts}")
        if balance.contrast and any(True for _ in experts.buffers()):
            name = type(experts).__name__
            raise ValueError(f"balance.contrast={balance.contrast} computes rows twice, and {name} gathers statistics")
        self.output_bias = None if bias_dim is None else nn.Parameter(torch.zeros(bias_dim))

    def reset_parameters(self) -> None:
        super().reset_parameters()
        if self.output_bias is not None:
            nn.init.zeros_(self.output_bias)

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        """Run the layer.

        Args:
            x: (..., S, D), at least two dimensions; (S, D) is one sequence.
            context: what the gate may know beside ``x``; its (B, S) fields have ``x``'s leading shape flattened to B.

        Returns:
            (..., S, D_out).

        Raises:
            ValueError: ``x`` has one dimension or another width than ``dim``, or ``valid_BS`` is of another shape or
                not bool.
        """
        x_BSD = self._sequences(x, context)
        valid_BS = None if context is None else context.valid_BS
        routing = self.router(x_BSD, context)
        if self.shared_experts is not None and valid_BS is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x = x.masked_fill(~valid_BS.reshape(*x.shape[:-1], 1), 0.0)
        gate = None if self.shared_gate is None else self.shared_gate(x)
        gate_T = None if gate is None else gate.flatten()
        if self.training and self.balance.contrast:
            routing = self._contrasted(x_BSD, routing, context)
        self.record_pass(routing, context, shared_gate=self.shared_gate, shared_gate_T=gate_T)
        rows = shared = None
        if self.shared_experts is not None:
            rows = self._dispatched(x_BSD, routing, context) if self.dispatcher.travels else None
            shared = self.shared_experts(x, "dense")
        y_BSD = self._compute(x_BSD, routing, context) if rows is None else self._computed(rows, x_BSD)
        y = y_BSD.reshape(*x.shape[:-1], y_BSD.shape[-1])
        if shared is not None:
            y = y + shared if self.shared_gate is None or gate is None else self.shared_gate.combine(gate, y, shared)
        return y if self.output_bias is None else y + self.output_bias.to(y.dtype)

    def _sequences(self, x: Tensor, context: RoutingContext | None) -> Tensor:
        """Return the tokens as (B, S, D), checked with the padding's shape."""
        if x.ndim < 2:
            raise ValueError(f"x has shape {tuple(x.shape)}: an MoE layer needs at least (tokens, dim)")
        self._check_width(x)
        x_BSD = x.unsqueeze(0) if x.ndim == 2 else x.flatten(0, -3)
        if context is not None and context.valid_BS is not None:
            check_valid(context.valid_BS, (x_BSD.shape[:2],), "tokens")
        return x_BSD

    def _compute(self, x_BSD: Tensor, routing: Any, context: RoutingContext | None) -> Tensor:
        """Return (B, S, D) tokens after the routed experts, (B, S, D_out)."""
        return self._computed(self._dispatched(x_BSD, routing, context), x_BSD)

    def _computed(self, rows: Rows, x_BSD: Tensor) -> Tensor:
        """Return the sums of the experts' rows by token, (B, S, D_out)."""
        if self.training and self.expert_output_masking:
            # On the rows and not in the routing: losses, loads and capacity are those of the choice.
            rows = replace(rows, gates_R=F.dropout(rows.gates_R, self.expert_output_masking))
        return self.dispatcher.combine(self.experts(rows)).unflatten(0, x_BSD.shape[:2])

    def _dispatched(self, x_BSD: Tensor, routing: Routing, context: RoutingContext | None) -> Rows:
        """Return the experts' rows of (B, S, D) tokens."""
        rows = self.dispatcher.dispatch(x_BSD.flatten(0, 1), routing)
        if self.experts.reads_context:
            rows = replace(rows, context=RoutingContext() if context is None else context)
        return rows.weighted_input() if self.router.gates_on == "input" else rows

    def _contrasted(self, x_BSD: Tensor, routing: Routing, context: RoutingContext | None) -> Routing:
        """Return the routing with the sums of the term ``contrast`` in its evidence, which are of a sample of rows.

        The sample is computed by itself, since kernels that sum the experts' outputs at once hand no row out.
        """
        sample, kept_S = self._dispatched(x_BSD, routing, context).sampled(self.balance.contrast_rows)
        expert_S = expert_of_rows(sample.gates_R, sample.offsets_E)
        y_SD = self.experts(sample).x
        with outside_autocast(x_BSD.device):
            loss_S, has_loss_S = contrast_losses(y_SD, expert_S, kept_S, self.balance.contrast_temperature)
        sums = {"contrast": loss_S.sum().reshape(1), "num_contrasts": has_loss_S.sum().to(loss_S.dtype).reshape(1)}
        evidence = replace(routing.evidence, sums={**(routing.evidence.sums or {}), **sums})
        return replace(routing, evidence=evidence)

    def active_expert_params(self) -> int:
        return round(self.all_expert_params() * min(self.pairs_per_token / self.num_experts, 1.0))


class SoftMoE(MoE):
    """Soft mixture of experts (arXiv 2308.00951): the experts compute slots, weighted means of a sequence's tokens, and
    a token is a weighted mean of what came out. Built by ``MoEConfig`` from ``SoftSlots``; every kind of experts works.
    """

    default_dispatcher = SlotDispatcher
    own_terms = frozenset()
    splits_experts = False

    def _compute(self, x_BSD: Tensor, routing: SlotRouting, context: RoutingContext | None) -> Tensor:
        return self.dispatcher.combine(self.experts(self.dispatcher.dispatch(x_BSD, routing)))


class MergedMoE(MoE):
    """One merged expert for each sequence, or segment of one: ``y = f(x; sum_e p_e W_e)``. Built from ``Merge``.

    Nothing is dispatched, and the experts' backend is not asked.
    """

    own_terms = frozenset()
    splits_experts = False

    def _compute(self, x_BSD: Tensor, routing: MergeRouting, context: RoutingContext | None) -> Tensor:
        B, S, D = x_BSD.shape
        J, L = routing.groups_per_sequence, routing.tokens_per_group
        real_BS1 = None if routing.valid_T is None else routing.valid_T.unflatten(0, (B, S)).unsqueeze(-1)
        if real_BS1 is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x_BSD = x_BSD.masked_fill(~real_BS1, 0.0)
        if routing.in_segments:
            x_GLD = in_segments(x_BSD, J, L).reshape(B * J, L, D)
            y_GLD = self.experts(x_GLD, "merged", routing.weights_GE)
            # Without what fills up the last segment: token s of sequence b is row b * J * L + s.
            row_BS = torch.arange(B, device=x_BSD.device)[:, None] * (J * L) + torch.arange(S, device=x_BSD.device)
            y_TD = y_GLD.reshape(B * J * L, y_GLD.shape[-1]).index_select(0, row_BS.reshape(B * S))
            y_BSD = y_TD.unflatten(0, (B, S))
        else:
            y_BSD = self.experts(x_BSD, "merged", routing.weights_GE)
        return y_BSD if real_BS1 is None else y_BSD.masked_fill(~real_BS1, 0.0)


class AveragedMoE(MoE):
    """Experts by pairs in training, and in evaluation one whose parameters are the mean of theirs (AdaMix, arXiv
    2205.12410). Built from ``Random(evaluation="merged")``.

    The mean is taken once a call; ``core.average_experts`` takes it for good.

    Raises:
        ValueError: the experts cannot be merged.
    """

    splits_experts = False

    def __init__(self, router: Router, experts: Experts, *args: Any, **options: Any) -> None:
        check_merges(experts)
        super().__init__(router, experts, *args, **options)

    def _compute(self, x_BSD: Tensor, routing: Any, context: RoutingContext | None) -> Tensor:
        if isinstance(routing, Routing):
            return super()._compute(x_BSD, routing, context)
        valid_T = routing.valid_T
        x_1TD = x_BSD.flatten(0, 1).unsqueeze(0)
        if valid_T is not None:
            # Padding may hold NaN, which would reach the weight gradients.
            x_1TD = x_1TD.masked_fill(~valid_T[:, None], 0.0)
        E = self.num_experts
        y_1TD: Tensor = self.experts(x_1TD, "merged", x_1TD.new_full((1, E), 1.0 / E, dtype=torch.float32))
        if valid_T is not None:
            y_1TD = y_1TD.masked_fill(~valid_T[:, None], 0.0)
        return y_1TD.unflatten(1, x_BSD.shape[:2])[0]


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers of a model by dotted name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}


def active_params(model: nn.Module) -> int:
    """Return the parameters that one token touches at most: all but the routed experts it does not take.

    Sharded parameters (``DTensor``) count as whole: the figure is that of the whole model, on every rank.
    """
    idle: dict[int, int] = {}
    for layer in moe_layers(model).values():
        # Experts that several layers share are there once, and a token may take others of them in each.
        before = idle.get(id(layer.experts), layer.all_expert_params())
        idle[id(layer.experts)] = max(before - layer.active_expert_params(), 0)
    return num_params(model) - sum(idle.values())


@contextlib.contextmanager
def set_capacity_factor(model: nn.Module, factor: float | None, priority: str | None = None) -> Iterator[None]:
    """Change the evaluation capacity of every layer inside the ``with`` block; None is dropless.

    Routers without such a capacity (expert choice has its own, soft slots and merged experts have none) go on as they
    are.

    Args:
        model: any module with MoE layers.
        factor: as ``MoEConfig.eval_capacity_factor``, but None means no limit. Training keeps its own.
        priority: as ``MoEConfig.priority``; None keeps each layer's own.
    """
    before = [(r, r.capacity) for m in moe_layers(model).values() for r in m.routers().values()]
    for router, old in before:
        evaluation = math.inf if factor is None else factor
        router.capacity = replace(old, eval_factor=evaluation, priority=priority or old.priority)
    try:
        yield
    finally:
        for router, old in before:
            router.capacity = old
