"""Checks that the router configs share: a ``ValueError`` of one line with the value and the rule."""

from __future__ import annotations


def at_least_one(name: str, value: int) -> None:
    if value < 1:
        raise ValueError(f"{name}={value} is not at least 1")


def positive(name: str, value: float) -> None:
    if not 0 < value < float("inf"):
        raise ValueError(f"{name}={value} is not a positive number")


def one_of(name: str, value: object, allowed: tuple[object, ...]) -> None:
    if value not in allowed:
        raise ValueError(f"{name}={value!r} is not one of {', '.join(str(a) for a in allowed)}")


def divides(name: str, value: int, num_experts: int) -> None:
    if num_experts % value:
        raise ValueError(f"{name}={value} does not divide num_experts={num_experts}")


def at_most_experts(name: str, value: int | None, num_experts: int) -> None:
    """None is no number, and fits."""
    if value is not None and value > num_experts:
        raise ValueError(f"{name}={value} exceeds num_experts={num_experts}")
