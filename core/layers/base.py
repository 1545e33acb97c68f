"""What every layer with experts is: recorded, sharded, counted."""

from __future__ import annotations

import warnings
import weakref
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Decision, Entry, RoutingContext, Tape
from ..contract.checks import check_tensor
from ..dispatch import Dispatcher, LocalDispatcher
from ..experts import Experts, num_params
from ..flops import register_formulas
from ..kernels import check_backend
from ..routing.balance.balance import Balance
from ..routing.router import Router
from ..torch_internals import in_backward
from .shared import SharedGate

UNRECORDED_PASSES = 50
"""Training passes without a tape after which a layer with balance losses warns."""
_warned: list[weakref.ref[MoELayer]] = []
"""The layer that has warned last."""


def nothing(module: nn.Module, args: Any) -> None:
    """Do nothing before a layer's forward, but be a hook on it."""


class MoELayer(nn.Module):
    """Base of the MoE layers: what ``record``, ``moe_layers`` and ``active_params`` look for.

    A layer of your own has a ``router`` and ``experts``, and calls ``record_pass`` in its forward; if it has several
    routers, ``routers`` names them.

    Args:
        balance: weights of the layer's balance losses.
        dim: width of the tokens; None: as wide as the parts take them.
        dispatcher: moves tokens to experts; None: one of ``default_dispatcher``.

    Attributes:
        router, experts, dispatcher: the parts.
        out_dim: width of the output, if ``MoEConfig`` built the layer; else None.
        load_balancing_weight: float32 () buffer if ``balance.adaptive``, else None.
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
        """Initialize the layer's own parameters and buffers. Router and experts have methods of their own."""
        if self.load_balancing_weight is not None:
            self.load_balancing_weight.fill_(self.balance.load_balancing_loss)

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
        """Raise a ``ValueError`` if tokens are not ``dim`` wide: not every gate and matmul would notice."""
        if x.is_nested:
            raise ValueError("x is a nested tensor: give nn.TransformerEncoder enable_nested_tensor=False")
        if self.dim is not None and x.shape[-1] != self.dim:
            raise ValueError(f"x has width {x.shape[-1]}, the layer is for dim={self.dim}")

    @property
    def row_dim(self) -> int | None:
        """The width of the router's input: ``dim``, but for layers whose experts take several tokens at once."""
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
        """True while a tape listens."""
        return len(self._tapes) > 0  # of a tuple, which torch 2.10 does not trace as bool

    @property
    def keeps_evidence(self) -> bool:
        """False if values that only a tape reads can be left out. With gradients they cannot: an activation checkpoint
        repeats the forward after the tape is closed, and has to save as many tensors."""
        return self.is_recorded or torch.is_grad_enabled()

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
            routing: the router's decision.
            context: the layer's context, for the losses that read it.
            end: end of the entry's name, ``<layer>.<end>``, in a layer with several routers: a key of ``routers()``.
            router: which of them decided; None: ``self.router``.
            shared_gate: the gate on the shared experts, if there is one.
            shared_gate_T: float32 (T,), the gate of each token.
            terms: names of the balance terms that apply; None: the router's and the layer's own.
        """
        given = self.__dict__.get("_given")
        if given is not None:
            given.check(routing)
        if not torch.compiler.is_compiling() and in_backward():
            return  # an activation checkpoint repeats the forward inside the backward: counted already
        if not self._tapes:
            if self.training and torch.is_grad_enabled() and not torch.compiler.is_compiling():
                self._count_unrecorded()
            return
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
        # If the layer that warned has not run since, this one belongs to the same model, in the same step.
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
    """Raise a ``ValueError`` if ``context.valid_BS`` is not bool, or of none of the shapes that it may have."""
    check_tensor("context.valid_BS", valid)
    if valid.shape not in shapes:
        raise ValueError(f"context.valid_BS has shape {tuple(valid.shape)}, the {noun} {tuple(shapes[0])}")
    if valid.dtype != torch.bool:
        raise ValueError(f"context.valid_BS is {valid.dtype}: it must be bool, True for real {noun}")


def entry_name(layer: str, end: str) -> str:
    """Return the name of the entry of one router, given the layer's name and the router's end."""
    return ".".join(part for part in (layer, end) if part)


def moe_layers(model: nn.Module) -> dict[str, MoELayer]:
    """Return the MoE layers of a model by dotted name, in the order of its modules."""
    return {name: m for name, m in model.named_modules() if isinstance(m, MoELayer)}


def active_params(model: nn.Module) -> int:
    """Return the parameters that one token touches at most: all but the routed experts it does not take.

    Sharded parameters (``DTensor``) count in full: the figure covers the whole model, on every rank.
    """
    idle: dict[int, int] = {}
    for layer in moe_layers(model).values():
        # Experts that several layers share are there once, and a token may take others of them in each.
        before = idle.get(id(layer.experts), layer.all_expert_params())
        idle[id(layer.experts)] = max(before - layer.active_expert_params(), 0)
    return num_params(model) - sum(idle.values())
