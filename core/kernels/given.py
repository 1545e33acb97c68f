"""Choices that are given to a layer, in place of the ones that its router would make (``core.replay``)."""

from __future__ import annotations

import contextlib
from collections.abc import Iterator
from contextvars import ContextVar
from typing import Any

import torch
from torch import Tensor
from torch.overrides import TorchFunctionMode

from .eager import SCORE_FUNCS, TopK, gates_of

_GIVEN: ContextVar[Tensor | None] = ContextVar("given_ids_TK", default=None)


@contextlib.contextmanager
def choosing(ids_TK: Tensor, num_experts: int, num_groups: int = 1) -> Iterator[None]:
    """Let ``topk_gate``, and ``topk`` and ``argmax`` over the experts, choose these experts inside the block.

    If experts are chosen in groups, ``topk`` over the groups chooses the ones that have them.
    """
    token = _GIVEN.set(ids_TK)
    try:
        with _Chosen(ids_TK, num_experts, num_groups):
            yield
    finally:
        _GIVEN.reset(token)


def given_gate(
    logits_TE: Tensor, top_k: int, *, score_func: str = "softmax", normalize: bool = True, scale: float = 1.0, **_: Any
) -> TopK | None:
    """Return ``eager.topk_gate`` with the given choice; None if none is given, or one of another shape."""
    ids_TK = None if torch.compiler.is_compiling() else _GIVEN.get()
    if ids_TK is None or ids_TK.shape != (logits_TE.shape[0], top_k):
        return None
    scores_TE = SCORE_FUNCS[score_func](logits_TE)
    return TopK(scores_TE, ids_TK, gates_of(logits_TE, scores_TE, ids_TK, score_func, normalize) * scale)


class _Chosen(TorchFunctionMode):
    """Replaces the places that torch finds over the experts: for routers of other libraries."""

    def __init__(self, ids_TK: Tensor, num_experts: int, num_groups: int) -> None:
        super().__init__()
        self.ids_TK, self.num_experts, self.num_groups, self.taken = ids_TK, num_experts, num_groups, 0

    def __torch_function__(self, func: Any, types: Any, args: Any = (), kwargs: Any = None) -> Any:
        name, kwargs = getattr(func, "__name__", ""), kwargs or {}
        of: Any = args[0] if args else None
        if name == "topk" and 1 < self.num_groups == of.shape[-1]:
            has_TG = torch.zeros_like(of).scatter_(-1, self.ids_TK // (self.num_experts // self.num_groups), 1.0)
            return func(has_TG, *args[1:], **kwargs)
        if name not in ("topk", "argmax") or of.shape[-1] != self.num_experts:
            return func(*args, **kwargs)
        if name == "argmax":  # the first choice, then the second
            place, self.taken = self.taken, self.taken + 1
            return self.ids_TK[:, min(place, self.ids_TK.shape[1] - 1)].view(of.shape[:-1])
        if (args[1] if len(args) > 1 else kwargs["k"]) != self.ids_TK.shape[1]:
            return func(*args, **kwargs)
        ids = self.ids_TK.view(*of.shape[:-1], -1)
        return torch.return_types.topk((of.gather(-1, ids), ids))
