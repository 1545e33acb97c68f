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


def ffn_widths(
    prefix: str,
    dim: int,
    flops: float,
    params: float,
    tolerance: float,
    each: str = "",
    *,
    gated: bool = False,
    bias: bool = True,
) -> dict[str, SolvedWidth]:
    """Hidden dims F of FFNs, which take ``2 M D F`` FLOPs a token and have ``M D F`` parameters in M = 2 matrices, 3
    where gated, and ``(M - 1) F + D`` in biases.

    Args:
        prefix: of the names.
        dim: D.
        flops, params: to come to.
        tolerance: relative difference beyond which a width does not count as equal.
        each: what they are of, for the message, as " a block".
        gated: the FFN is ``(act(x w_gate) * (x w_in)) w_out``.
        bias: it has biases.

    Returns:
        "<prefix>_equal_flops" and "<prefix>_equal_params".
    """
    matrices = 3 if gated else 2
    wide, fixed = (matrices - 1, dim) if bias else (0, 0)  # biases of each hidden unit, and of the output
    solved = {}
    for what, target, cost, width in (
        ("flops", flops, lambda f: 2 * matrices * dim * f, flops / (2 * matrices * dim)),
        (
            "params",
            params,
            lambda f: (matrices * dim + wide) * f + fixed,
            (params - fixed) / (matrices * dim + wide),
        ),
    ):
        hidden = max(1, round(width))
        off = abs(cost(hidden) - target) / target
        problem = f"no whole FFN hidden dim comes within {tolerance:.0%} of {target:.0f} {what}{each}"
        solved[f"{prefix}_equal_{what}"] = SolvedWidth(hidden, problem if off > tolerance else "")
    return solved


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
