"""The tape, which keeps the decisions of a model's MoE layers, pass by pass, outside the model."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator, Mapping, Sequence
from dataclasses import dataclass, field, replace
from typing import Any

import torch
import torch.distributed as dist
from torch import Tensor, nn

from .evidence import detached
from .routing import Loads, RoutingContext


@dataclass(frozen=True)
class Entry:
    """One pass of one layer.

    Attributes:
        name: the layer's dotted name in the recorded model.
        routing: the router's decision.
        context: the context that the layer got.
        balance: the layer's own loss weights.
        terms: the balance terms that apply to its router.
        needs_grad: whether the router trains and gradients were wanted when the tape was opened.
        has_grad: whether gradients were on during the pass.
        load_balancing_weight: the layer's adaptive weight of that term, (); None if ``balance`` has it.
        extra_weights: the router's weights of losses of its own; weights that change between steps are tensors, ().
        shared_gate_T: float32 (T,), the gate between the routed path and the shared experts, without dropout; padding
            may hold any finite value. None: the layer has no such gate.
    """

    name: str
    routing: Any
    context: RoutingContext | None
    balance: Any
    terms: frozenset[str] = frozenset()
    needs_grad: bool = False
    has_grad: bool = True
    load_balancing_weight: Tensor | None = None
    extra_weights: Mapping[str, float | Tensor] = field(default_factory=dict)
    shared_gate_T: Tensor | None = None

    def detach(self) -> Entry:
        """Return the pass without its graph."""
        kept = {name: detached(getattr(self, name)) for name in ("routing", "context", "shared_gate_T")}
        return replace(self, needs_grad=False, **kept)

    def loads(self) -> Entry:
        """Return the pass with only its loads."""
        routing = self.routing
        counts = routing.counts if isinstance(routing, Loads) else routing.evidence.counts
        loads = Loads(routing.tokens_per_expert_E, routing.chosen_per_expert_E, counts)
        return replace(self, routing=loads, context=None, needs_grad=False, shared_gate_T=None)


WRAPPED = frozenset({"_orig_mod", "_checkpoint_wrapped_module", "_fsdp_wrapped_module", "_dmp_wrapped_module"})
"""Names that ``torch.compile``, checkpoint wrappers, FSDP1 and TorchRec give the module that they wrap."""


def unwrapped_modules(model: nn.Module) -> Iterator[tuple[str, nn.Module]]:
    """Yield the modules of a model by dotted name, without the levels that wrappers add.

    A level ``module`` is a wrapper's (DDP) if it is at the root and its parent's only child.
    """
    while len(model._modules) == 1 and not model._parameters:
        ((name, inner),) = model._modules.items()
        if inner is None or name not in WRAPPED | {"module"}:
            break
        model = inner
    for name, module in model.named_modules():
        yield ".".join(part for part in name.split(".") if part not in WRAPPED), module


class Tape:
    """The passes of a model's MoE layers, in their order. See ``record``.

    Attributes:
        grad_wanted: whether gradients were on when it was opened.
        shared_on: device of the model on which ranks add up the sums of its layers; None: no layer has sums to share.
        layers: names of the layers that are recorded, whether they run or not.
    """

    def __init__(
        self,
        entries: tuple[Entry, ...] = (),
        shared_on: torch.device | None = None,
        layers: tuple[str, ...] = (),
    ) -> None:
        self._entries: list[Entry] = list(entries)
        self.grad_wanted = torch.is_grad_enabled()
        self.shared_on = shared_on
        self.layers = layers

    @property
    def entries(self) -> tuple[Entry, ...]:
        return tuple(self._entries)

    def __len__(self) -> int:
        return len(self._entries)

    def silent_layers(self) -> tuple[str, ...]:
        """Return the names of the recorded layers without a pass: layers that the forward did not reach, by intent as
        in a part of a model, or because something else computed in their place."""
        ran = tuple(entry.name for entry in self._entries)

        def is_silent(layer: str) -> bool:  # a pass of a layer with several routers is named "<layer>.<router>"
            return not any(not layer or name == layer or name.startswith(f"{layer}.") for name in ran)

        return tuple(layer for layer in self.layers if is_silent(layer))

    def append(self, entry: Entry) -> None:
        self._entries.append(entry)

    def detach(self) -> Tape:
        """Return the passes without their graphs. Across micro-batches keep ``loads``, which is smaller."""
        return Tape(tuple(e.detach() for e in self._entries), self.shared_on, self.layers)

    def loads(self) -> Tape:
        """Return the passes with only the experts' loads, to be kept across the micro-batches of a step for
        ``update_expert_bias``. Losses and statistics need the tape itself."""
        return Tape(tuple(e.loads() for e in self._entries), layers=self.layers)

    def merge(self, other: Tape) -> Tape:
        """Return both tapes' passes as one tape, this one's first."""
        layers = tuple(dict.fromkeys(self.layers + other.layers))
        return Tape(self.entries + other.entries, self.shared_on or other.shared_on, layers)


def several_ranks(group: dist.ProcessGroup | None = None) -> bool:
    """Return whether there is a process group of more than one rank; None: the group of all ranks."""
    return dist.is_available() and dist.is_initialized() and dist.get_world_size(group) > 1


def device_of_ranks(group: dist.ProcessGroup | None = None) -> torch.device:
    """Return a device on which the ranks can add up."""
    return torch.device("cuda" if "nccl" in dist.get_backend(group) else "cpu")


def sum_over_ranks(tensors: Sequence[Tensor], group: dist.ProcessGroup | None = None) -> list[Tensor]:
    """Return the sums of tensors of one dtype over the ranks, in one collective; each keeps the gradient of this
    rank's part."""
    local = torch.cat([t.reshape(-1) for t in tensors])
    total = local.detach().clone()
    dist.all_reduce(total, group=group)
    added = (local + (total - local.detach())).split([t.numel() for t in tensors])
    return [part.reshape(t.shape) for part, t in zip(added, tensors, strict=True)]


@contextlib.contextmanager
def record(model: nn.Module) -> Iterator[Tape]:
    """Collect one ``Entry`` per pass of each MoE layer of ``model`` inside the ``with`` block.

    Layers hold a reference to the tape only inside the block: a forward leaves nothing behind in a module.
    A pass that an activation checkpoint repeats during the backward is not collected again.

    Example::

        with core.record(model) as tape:
            loss = task_loss(model(x), y)
        (loss + core.aux_loss(tape)).backward()
    """
    tape = Tape()
    listening: list[Any] = []
    for name, module in unwrapped_modules(model):
        if hasattr(module, "_tapes"):
            listening.append(module)
            listening[-1]._tapes = (*listening[-1]._tapes, (name, tape))
            tape.layers = (*tape.layers, name)
    if several_ranks():
        # A rank that records no pass of a layer takes part in the sums of those that do.
        tape.shared_on = next((device for m in listening if (device := m.shares_sums()) is not None), None)
    try:
        yield tape
    finally:
        for module in listening:
            module._tapes = tuple(t for t in module._tapes if t[1] is not tape)
