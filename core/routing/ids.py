"""Ids from the context, checked and with padding made harmless, for gates that look up tables."""

from __future__ import annotations

from torch import Tensor

from .checks import clean_ids
from .router import Tokens


def token_ids(tokens: Tokens, name: str, size: int) -> Tensor:
    """Return the context's field ``name`` of shape (B, S) as int64 (T,), with 0 for padding.

    Args:
        tokens: tokens of the call.
        name: name of a field of ``RoutingContext`` that the router needs.
        size: number of ids, which are in ``range(size)``.

    Raises:
        ValueError: the field has another shape or no integers, or, on CPU, an id of a real token is out of range.
            On a GPU and in compiled code nothing is read back: there the indexing kernel stops.
    """
    shape = (tokens.num_sequences, tokens.length)
    real_BS = None if tokens.valid_T is None else tokens.valid_T.unflatten(0, shape)
    return clean_ids(getattr(tokens.context, name), shape, real_BS, name, size).flatten()


def sequence_ids(tokens: Tokens, name: str, size: int) -> Tensor:
    """Return the context's field ``name`` of shape (B,) as int64, with 0 for sequences without a real token."""
    shape = (tokens.num_sequences,)
    real_B = None
    if tokens.valid_T is not None:
        real_B = tokens.valid_T.unflatten(0, (tokens.num_sequences, tokens.length)).any(1)
    return clean_ids(getattr(tokens.context, name), shape, real_B, name, size)
