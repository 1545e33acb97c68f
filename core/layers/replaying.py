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
    server chose, for recomputation, and for comparing two builds of a model. A backward through activation checkpoints
    may come after the block, before the model runs again.

    Args:
        model: any module with MoE layers that choose by top-k, also adopted ones.
        choices: of ``Choices.load``, or a tape of a model whose layers have the same names.

    Raises:
        ValueError: layers are missing on one side; or inside the block a layer runs more often than was recorded, on
            another number of tokens, or by a router whose choice cannot be given; an activation checkpoint repeats
            one of several passes, and its tokens do not say which; or the model is inside another ``replay``.

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
    given: list[_Given] = []
    try:
        for name, layer in layers.items():
            given.append(_Given(name, layer, choices.experts[name]))
        yield
    finally:
        for of_layer in given:
            of_layer.is_over = True


class _Given:
    """The choices of one layer, which hooks around its forward hand to its router.

    After the block they stay for the checkpoints that the backward repeats, until the layer's next forward.
    """

    def __init__(self, name: str, layer: MoELayer, passes: tuple[Tensor, ...]) -> None:
        self.name, self.passes, self.now, self.is_over = name, passes, -1, False
        self.sums: list[Tensor] = []
        """The sum of the tokens of each pass so far, by which a repeated one is known."""
        self.stack = contextlib.ExitStack()
        before = layer.__dict__.get("_given")
        if before is not None and not before.is_over:
            raise ValueError(f"layer {name!r} is inside another core.replay")
        if before is not None:
            before.remove(layer)
        layer.__dict__["_given"] = self
        self.handles = (
            layer.register_forward_pre_hook(self.before, with_kwargs=True),
            layer.register_forward_hook(self.after, always_call=True),
        )

    def remove(self, layer: MoELayer) -> None:
        """Let the layer choose by itself again."""
        for handle in self.handles:
            handle.remove()
        del layer.__dict__["_given"]

    def before(self, layer: Any, args: tuple[Any, ...], kwargs: dict[str, Any]) -> None:
        x = args[0] if args else next(iter(kwargs.values()))
        if self.is_over and not in_backward():
            self.remove(layer)
            return
        self.now = self._repeated(x) if in_backward() else len(self.sums)
        if self.now == len(self.passes):
            raise ValueError(f"layer {self.name!r} runs more often than the {len(self.passes)} passes of the record")
        if not in_backward():
            self.sums.append(_sum_of(x))
        ids_TK = self.passes[self.now]
        if ids_TK.shape[0] != x[..., 0].numel():
            raise ValueError(f"layer {self.name!r} got {x[..., 0].numel()} tokens, and {ids_TK.shape[0]} were recorded")
        if int(ids_TK.max()) >= layer.num_experts:
            raise ValueError(f"expert {int(ids_TK.max())} of the record is not among the {layer.num_experts} here")
        groups = getattr(layer.router, "num_groups", 1)
        self.stack.enter_context(choosing(ids_TK.to(x.device).clamp_min(0), layer.num_experts, groups))

    def after(self, layer: Any, args: Any, out: Any) -> None:
        self.stack.close()

    def _repeated(self, x: Tensor) -> int:
        """Return the pass whose forward an activation checkpoint repeats: the one that had the same tokens."""
        if len(self.sums) == 1:
            return 0
        ids = self.passes
        same = [p for p, sum_D in enumerate(self.sums) if torch.equal(sum_D, _sum_of(x))]
        if not same or any(not torch.equal(ids[p], ids[same[0]]) for p in same):
            raise ValueError(
                f"layer {self.name!r}: an activation checkpoint repeats one of {len(self.sums)} replayed passes, and "
                f"its tokens are those of {len(same)} of them: call backward after each pass"
            )
        return same[0]

    def check(self, routing: Any) -> None:
        """Raise a ``ValueError`` if a router's decision is not the given one."""
        ids_TK = self.passes[self.now]
        E = routing.tokens_per_expert_E.shape[0]
        took = routing.expert_ids_N if isinstance(routing, Routing) and routing.top_k == ids_TK.shape[1] else None
        wanted_N = ids_TK.flatten().to(routing.tokens_per_expert_E.device)
        if took is None or not torch.equal(took[wanted_N >= 0], wanted_N[wanted_N >= 0]):
            raise ValueError(f"layer {self.name!r} does not choose by top-k of {E} experts: it takes no given choice")


def _sum_of(x: Tensor) -> Tensor:
    return x.detach().reshape(-1, x.shape[-1]).sum(0, dtype=torch.float32)
