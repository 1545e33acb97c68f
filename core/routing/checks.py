"""Checks that the router configs share: a ``ValueError`` of one line with the value and the rule."""

from __future__ import annotations

import torch
from torch import Tensor


def whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number")


def at_least_one(name: str, value: int) -> None:
    whole(name, value)
    if value < 1:
        raise ValueError(f"{name}={value} is not at least 1")


def positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} is not a positive number")


def not_negative(name: str, value: float) -> None:
    if not 0 <= value < float("inf"):
        raise ValueError(f"{name}={value} is not a finite number >= 0")


def below_one(name: str, value: float) -> None:
    if not 0 <= value < 1:
        raise ValueError(f"{name}={value} is not in [0, 1)")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(str(a) for a in allowed)}")


def divides(name: str, value: int, num_experts: int) -> None:
    if num_experts % value:
        raise ValueError(f"{name}={value} does not divide num_experts={num_experts}")


def at_most_experts(name: str, value: int | None, num_experts: int) -> None:
    """Refuse a value that exceeds the number of experts; None fits."""
    if value is not None and value > num_experts:
        raise ValueError(f"{name}={value} exceeds num_experts={num_experts}")


def check_tensor(name: str, value: object) -> None:
    if not isinstance(value, Tensor):
        raise ValueError(f"{name} is a {type(value).__name__}, not a tensor")


def clean_ids(ids: Tensor, shape: tuple[int, ...], real: Tensor | None, name: str, size: int) -> Tensor:
    """Return the ids of the context's field ``name`` as int64, with 0 in place of padding.

    Args:
        ids: the field.
        shape: the shape that the field must have.
        real: bool of this shape, False for padding; None: no padding.
        name: name of the field.
        size: number of ids. ``range(size)`` is checked on CPU alone, and not in compiled code.

    Raises:
        ValueError: the field is no tensor, has another shape, holds no integers, or an id is out of range.
    """
    check_tensor(f"context.{name}", ids)
    if ids.shape != shape:
        raise ValueError(f"context.{name} has shape {tuple(ids.shape)}, the tokens {shape}")
    if ids.is_floating_point() or ids.is_complex() or ids.dtype == torch.bool:
        raise ValueError(f"context.{name} is {ids.dtype}: ids are integers")
    if real is not None:
        ids = ids.masked_fill(~real, 0)
    # Reading an id back would stop the queue of a GPU.
    if ids.device.type == "cpu" and ids.numel() and not torch.compiler.is_compiling():
        low, high = (int(extreme) for extreme in ids.aminmax())
        if low < 0 or high >= size:
            raise ValueError(f"context.{name} holds {low if low < 0 else high}, which is not in range({size})")
    return ids.to(torch.int64)
