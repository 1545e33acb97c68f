"""FFN widths with which a dense model costs what a sparse one does."""

from __future__ import annotations

from typing import NamedTuple


class SolvedWidth(NamedTuple):
    """FFN hidden dim of a dense baseline; ``problem`` says why there is none."""

    width: int
    problem: str = ""


def ffn_widths(
    prefix: str, dim: int, flops: float, params: float, tolerance: float, each: str = ""
) -> dict[str, SolvedWidth]:
    """Hidden dims F of FFNs with biases, which take ``4 D F`` FLOPs a token and have ``2 D F + F + D`` parameters.

    Args:
        prefix: of the names.
        dim: D.
        flops, params: to come to.
        tolerance: relative difference beyond which a width does not count as equal.
        each: what they are of, for the message, as " a block".

    Returns:
        "<prefix>_equal_flops" and "<prefix>_equal_params".
    """
    solved = {}
    for what, target, cost, width in (
        ("flops", flops, lambda f: 4 * dim * f, flops / (4 * dim)),
        ("params", params, lambda f: 2 * dim * f + f + dim, (params - dim) / (2 * dim + 1)),
    ):
        hidden = max(1, round(width))
        off = abs(cost(hidden) - target) / target
        problem = f"no whole FFN hidden dim comes within {tolerance:.0%} of {target:.0f} {what}{each}"
        solved[f"{prefix}_equal_{what}"] = SolvedWidth(hidden, problem if off > tolerance else "")
    return solved


def same_width(a: int, b: int) -> bool:
    """Within 1 %: another run of the same model."""
    return abs(a - b) <= 0.01 * max(a, b)
