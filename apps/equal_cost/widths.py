"""Widths of experts and FFNs with which one model costs what another does."""

from __future__ import annotations

import dataclasses
from collections.abc import Callable
from typing import Any, NamedTuple

import core


class SolvedWidth(NamedTuple):
    """FFN hidden dim of a dense baseline; ``problem`` says why there is none."""

    width: int
    problem: str = ""


TOLERANCE = 0.05
"""Relative difference of two costs beyond which they do not count as equal."""


def equal_widths(
    prefix: str, dense: core.DenseFFN, dim: int, flops: float, params: float, each: str = ""
) -> dict[str, SolvedWidth]:
    """Return the hidden dims with which ``dense`` costs so much.

    Args:
        prefix: of the names.
        dense: its kind; the hidden dim is not asked.
        dim: D.
        flops, params: to come to, of a token.
        each: what they are of, for the message, as " a block".

    Returns:
        "<prefix>_equal_flops" and "<prefix>_equal_params".
    """

    def at(width: int) -> core.DenseFFN:
        return dataclasses.replace(dense, hidden_dim=width)

    return {
        f"{prefix}_equal_flops": solve_width(lambda width: at(width).flops_per_token(dim), flops, f"flops{each}"),
        f"{prefix}_equal_params": solve_width(lambda width: at(width).num_params(dim), params, f"params{each}"),
    }


def solve_width(cost: Callable[[int], float], target: float, what: str) -> SolvedWidth:
    """Return the width whose cost comes nearest to ``target``; too far from it is a problem.

    Args:
        cost: of a width, with which it grows.
        target: to come to.
        what: it is, for the message, such as "flops".
    """
    width = nearest_width(cost, target)
    if abs(cost(width) - target) <= TOLERANCE * target:
        return SolvedWidth(width)
    return SolvedWidth(width, f"no whole width comes within {TOLERANCE:.0%} of {target:,.0f} {what}")


def same_width(a: int, b: int) -> bool:
    """Within 1 %: another run of the same model."""
    return abs(a - b) <= 0.01 * max(a, b)


def widened(expert: core.ExpertConfig, width: int, times: int = 1) -> core.ExpertConfig:
    """``expert`` with another hidden dim; an ``MLP`` with another first width, all its layers wider by one factor.

    Args:
        expert: of a layer.
        width: the new one.
        times: of the layers of an ``MLP``, one after the other.

    Raises:
        ValueError: it has neither ``hidden_dims`` nor ``hidden_dim``.
    """
    made: Any = expert
    if isinstance(expert, core.MLP):
        first = expert.hidden_dims[0]
        dims = tuple(max(1, round(width * w / first)) for w in expert.hidden_dims * times)
        return dataclasses.replace(expert, hidden_dims=dims)
    if not hasattr(expert, "hidden_dim"):
        raise ValueError(f"{type(expert).__name__} has neither hidden_dims nor hidden_dim to widen")
    return dataclasses.replace(made, hidden_dim=width)  # type: ignore[no-any-return]


def nearest_width(cost: Callable[[int], float], target: float) -> int:
    """The whole number from 1 on whose cost, which grows with it, comes nearest to ``target``."""
    low, high = 1, 2
    while cost(high) < target:
        low, high = high, 2 * high
    while high - low > 1:
        middle = (low + high) // 2
        low, high = (middle, high) if cost(middle) < target else (low, middle)
    return min((low, high), key=lambda width: abs(cost(width) - target))
