"""``replay``: layers take recorded experts, with gates of their own."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from typing import Any

import torch
from torch import Tensor, nn

from ..contract import Choices, Routing, Tape, unwrapped_modules
from ..kernels import choosing
from ..torch_internals import in_backward
from .base import MoELayer


@contextlib.contextmanager
def replay(model: nn.Module, choices: Choices | Tape) -> Iterator[None]:
    """Let each MoE layer take the recorded experts inside the ``with`` block, pass by pass.

    Gates are computed from the layer's own logits, so that gradients reach the router: for training on what a
    server chose, for recomputation, and for comparing two builds of a model.

    Args:
        model: any module with MoE layers that choose by top-k, also adopted ones.
        choices: of ``Choices.load``, or a tape of a model whose layers have the same names.

    Raises:
        ValueError: layers are missing on one side; or inside the block a layer runs more often than was recorded, on
            another number of tokens, or by a router whose choice cannot be given.

    Example::

        with core.record(model) as tape:
            model(batch)
        with core.replay(other, tape):
            other(batch)
    """
    choices = Choices.of(choices) if isinstance(choices, Tape) else choices
    layers = {name: m for name, m in unwrapped_modules(model) if isinstance(m, MoELayer)}
    for where, names, others in (("in the model", choices.experts, layers), ("recorded", layers, choices.experts)):
        missing = next((name for name in names if name not in others), None)
        if missing is not None:
            raise ValueError(f"layer {missing!r} is not {where}")
    handles = []
    try:
        for name, layer in layers.items():
            given = _Given(name, choices.experts[name])
            layer.__dict__["_given"] = given
            handles += [
                layer.register_forward_pre_hook(given.before, with_kwargs=True),
                layer.register_forward_hook(given.after, always_call=True),
            ]
        yield
    finally:
        for handle in handles:
            handle.remove()
        for layer in layers.values():
            layer.__dict__.pop("_given", None)


class _Given:
    """The choices of one layer, which hooks around its forward hand to its router."""

    def __init__(self, name: str, passes: tuple[Tensor, ...]) -> None:
        self.name, self.passes, self.next = name, passes, 0
        self.stack = contextlib.ExitStack()

    def before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if not in_backward():  # where an activation checkpoint repeats the pass
            self.next += 1
        if self.next > len(self.passes):
            raise ValueError(f"layer {self.name!r} runs more often than the {len(self.passes)} passes of the record")
        ids_TK = self.passes[self.next - 1]
        if ids_TK.shape[0] != x[..., 0].numel():
            raise ValueError(f"layer {self.name!r} got {x[..., 0].numel()} tokens, and {ids_TK.shape[0]} were recorded")
        if int(ids_TK.max()) >= layer.num_experts:
            raise ValueError(f"expert {int(ids_TK.max())} of the record is not among the {layer.num_experts} here")
        groups = getattr(layer.router, "num_groups", 1)
        self.stack.enter_context(choosing(ids_TK.to(x.device).clamp_min(0), layer.num_experts, groups))

    def after(self, layer: Any, args: Any, out: Any) -> None:
        self.stack.close()

    def check(self, routing: Any) -> None:
        """Raise a ``ValueError`` if a router's decision is not the given one."""
        ids_TK = self.passes[self.next - 1]
        E = routing.tokens_per_expert_E.shape[0]
        took = routing.expert_ids_N if isinstance(routing, Routing) and routing.top_k == ids_TK.shape[1] else None
        wanted_N = ids_TK.flatten().to(routing.tokens_per_expert_E.device)
        if took is None or not torch.equal(took[wanted_N >= 0], wanted_N[wanted_N >= 0]):
            raise ValueError(f"layer {self.name!r} does not choose by top-k of {E} experts: it takes no given choice")
