"""Checks that configs and contexts share: a ``ValueError`` of one line with the value and the rule."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import fields
from typing import Any

import torch
from torch import Tensor

_KINDS: dict[str, tuple[str, Callable[[Any], bool]]] = {
    "int": ("a whole number", lambda value: isinstance(value, int) and not isinstance(value, bool)),
    "float": ("a number", lambda value: isinstance(value, (int, float)) and not isinstance(value, bool)),
    "str": ("text", lambda value: isinstance(value, str)),
    "bool": ("True or False", lambda value: isinstance(value, bool)),
    "None": ("None", lambda value: value is None),
}


def check_kinds(config: Any, prefix: str = "") -> None:
    """Raise a ``ValueError`` where a field of a config is not of the kind that its annotation says.

    Args:
        config: a dataclass. Fields of other kinds than numbers, text, booleans and None are left to the config.
        prefix: text before the names of the fields in the message.
    """
    for f in fields(config):
        value, kind = getattr(config, f.name), f.type if isinstance(f.type, str) else getattr(f.type, "__name__", "")
        names = kind.split(" | ")
        if all(name in _KINDS for name in names) and not any(_KINDS[name][1](value) for name in names):
            allowed = " or ".join(_KINDS[name][0] for name in names)
            raise ValueError(f"{prefix}{f.name}={value!r} is not {allowed}")


def check_part(name: str, value: object, kind: type, example: str) -> None:
    """Raise a ``ValueError`` where a field that holds a config holds another thing; ``example`` is one that fits."""
    if not isinstance(value, kind):
        raise ValueError(f"{name}={value!r} is not a config of its kind, as {example} is")


def whole(name: str, value: int) -> None:
    if isinstance(value, bool) or not isinstance(value, int):
        raise ValueError(f"{name}={value!r} is not a whole number")


def number(name: str, value: object) -> None:
    if isinstance(value, bool) or not isinstance(value, (int, float)):
        raise ValueError(f"{name}={value!r} is not a number")


def sequence(name: str, value: object) -> None:
    """Raise a ``ValueError`` where ``value`` is neither a tuple nor a list."""
    if not isinstance(value, (tuple, list)):
        raise ValueError(f"{name}={value!r} is not a list")


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


def clean_ids(ids: Tensor, name: str, size: int, of_sequences: tuple[int, int], valid_T: Tensor | None) -> Tensor:
    """Return the ids of the context's field ``name`` as int64, with 0 for padding and for sequences of padding alone.

    Args:
        ids: the field, of shape (B, S) where its name ends in "BS", else (B,).
        name: name of the field.
        size: number of ids. ``range(size)`` is checked on CPU alone: elsewhere nothing is read back.
        of_sequences: B and S.
        valid_T: bool (T,), False for padding; None: no padding.

    Raises:
        ValueError: the field is no tensor, has another shape, holds no integers, or an id is out of range.
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
