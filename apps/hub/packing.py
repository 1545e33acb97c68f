"""Documents in rows of equal length, and whether a model keeps those of a row apart."""

from __future__ import annotations

import bisect
from collections.abc import Callable, Sequence

import torch
from torch import Tensor, nn

from core.convert.read.calls import evaluating, hooked

Piece = tuple[int, int, int]
"""A document, its first token in a row and the end."""


def pieces(lengths: Sequence[int], size: int) -> list[Piece]:
    """Cut documents of these numbers of tokens into pieces of at most ``size``."""
    return [(d, start, min(start + size, n)) for d, n in enumerate(lengths) for start in range(0, n, size)]


def packed(lengths: Sequence[int], size: int) -> list[list[Piece]]:
    """Pack documents into rows of at most ``size`` tokens, the longest first, each into the fullest row that has room.

    Args:
        lengths: tokens of each document; longer ones are cut into parts of ``size``.
        size: tokens of a row.

    Returns:
        the pieces of each row.
    """
    rows: list[list[Piece]] = []
    free: list[tuple[int, int]] = []  # tokens left and the row, sorted
    for piece in sorted(pieces(lengths, size), key=lambda piece: piece[1] - piece[2]):
        length = piece[2] - piece[1]
        at = bisect.bisect_left(free, (length, -1))
        left, row = free.pop(at) if at < len(free) else (size, len(rows))
        if row == len(rows):
            rows.append([])
        rows[row].append(piece)
        bisect.insort(free, (left - length, row))
    return rows


def keeps_apart(model: nn.Module, logits_of: Callable[[Tensor, Tensor], Tensor], embedding: nn.Module) -> bool:
    """Return whether no token of a row's second document depends on the first, by its gradient.

    Args:
        model: the model, whose parameters take no gradient meanwhile.
        logits_of: maps ids and positions (1, S) to logits (1, S, V).
        embedding: maps ids to the model's inputs.
    """
    trained, inputs = [p for p in model.parameters() if p.requires_grad], list[Tensor]()

    def as_leaf(module: nn.Module, args: object, out: Tensor) -> Tensor:
        inputs.append(out.detach().requires_grad_())
        return inputs[-1]

    tokens_1S = torch.arange(8, device=next(model.parameters()).device)[None]
    try:
        for p in trained:
            p.requires_grad_(False)
        eager = torch.compiler.set_stance("force_eager")  # a graph of so short a row would serve nothing else
        with eager, evaluating(model), torch.enable_grad(), hooked([embedding.register_forward_hook(as_leaf)]):
            second = logits_of(tokens_1S, tokens_1S % 4)[:, 4:].float().sum()
            (grad_1SD,) = torch.autograd.grad(second, inputs)
    finally:
        for p in trained:
            p.requires_grad_(True)
    return not grad_1SD[:, :4].any()
