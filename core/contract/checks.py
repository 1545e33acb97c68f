"""Checks that configs and contexts share: a ``ValueError`` of one line with the value and the rule."""

from __future__ import annotations

import torch
from torch import Tensor


def divides(name: str, value: int, num_experts: int) -> None:
    if num_experts % value:
        raise ValueError(f"{name}={value} does not divide num_experts={num_experts}")


def at_most_experts(name: str, value: int | None, num_experts: int) -> None:
    """Raise an error for a value that exceeds the number of experts; None fits."""
    if value is not None and value > num_experts:
        raise ValueError(f"{name}={value} exceeds num_experts={num_experts}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")


def clean_ids(ids: Tensor, name: str, size: int, of_sequences: tuple[int, int], valid_T: Tensor | None) -> Tensor:
    """Return the ids of the context's field ``name`` as int64, with 0 for padding and for sequences of only padding.

    Args:
        ids: the field, of shape (B, S) if its name ends in "BS", else (B,).
        name: name of the field.
        size: number of ids. ``range(size)`` is only checked on CPU: elsewhere nothing is read back.
        of_sequences: B and S.
        valid_T: bool (T,), False for padding; None: no padding.

    Raises:
        ValueError: the field is not a tensor, has another shape, holds no integers, or an id is out of range.
    """
    check_tensor(f"context.{name}", ids)
    is_of_tokens = name.endswith("BS")
    shape = of_sequences if is_of_tokens else of_sequences[:1]
    if ids.shape != shape:
        raise ValueError(f"context.{name} has shape {tuple(ids.shape)}, the tokens {shape}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"context.{name} is {ids.dtype}: ids are integers")
    if valid_T is not None:
        valid_BS = valid_T.unflatten(0, of_sequences)
        ids = ids.masked_fill(~(valid_BS if is_of_tokens else valid_BS.any(1)), 0)
    # Reading an id back would stop the queue of a GPU.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(extreme) for extreme in ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"context.{name} holds {low if low < 0 else high}, which is not in range({size})")
    return ids.to(torch.int64)
