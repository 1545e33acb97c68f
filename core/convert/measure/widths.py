"""Hidden widths of experts and dense networks at which two models cost the same."""

from __future__ import annotations

import bisect
import dataclasses
from collections.abc import Callable
from typing import NamedTuple

from ...experts import MLP, ExpertConfig, Mixed


class SolvedWidth(NamedTuple):
    """The hidden dim of a model of equal cost; ``problem`` says why no width fits."""

    width: int
    problem: str = ""


TOLERANCE = 0.05
"""Relative difference of two costs beyond which they do not count as equal."""


def solve_width(cost: Callable[[int], float], target: float, what: str) -> SolvedWidth:
    """Return the width whose cost comes nearest to ``target``, with a problem if it is not near enough.

    ``cost`` grows with the width; ``what`` is its unit in the message, such as "flops".
    """
    width = nearest_width(cost, target)
    if abs(cost(width) - target) <= TOLERANCE * target:
        return SolvedWidth(width)
    return SolvedWidth(width, f"no whole width comes within {TOLERANCE:.0%} of {target:,.0f} {what}")


def nearest_width(cost: Callable[[int], float], target: float) -> int:
    """Return the integer from 1 on whose cost, which grows with it, comes nearest to ``target``."""
    most = 2
    while cost(most) < target:
        most *= 2
    reached = bisect.bisect_left(range(most + 1), target, lo=2, key=cost)
    return min((reached - 1, reached), key=lambda width: abs(cost(width) - target))


def same_width(a: int, b: int) -> bool:
    """Return whether two widths are within 1 %: training both would only repeat one model."""
    return abs(a - b) <= 0.01 * max(a, b)


def has_width(expert: ExpertConfig) -> bool:
    """Return whether an expert has a hidden dim that ``widened`` can change; of several kinds, whether one has."""
    if isinstance(expert, Mixed):
        return any(map(has_width, expert.experts))
    return hasattr(expert, "hidden_dim") or hasattr(expert, "hidden_dims")


def widened(expert: ExpertConfig, width: int, times: int = 1) -> ExpertConfig:
    """Return ``expert`` with another hidden dim. All layers of an ``MLP``, and all kinds of ``Mixed`` experts, grow by
    the factor of the first.

    Args:
        expert: configuration of the experts.
        width: the new hidden dim.
        times: how often the layers of an ``MLP`` are repeated, one after the other.

    Raises:
        ValueError: ``expert`` has neither ``hidden_dims`` nor ``hidden_dim``.
    """
    if isinstance(expert, Mixed):
        widths = [getattr(kind, "hidden_dim", None) for kind in expert.experts]
        first = next((w for w in widths if w is not None), None)
        if first is None:
            raise ValueError("none of the Mixed experts has a hidden_dim to widen")
        kinds = zip(expert.experts, widths, strict=True)
        wider = tuple(k if w is None else widened(k, max(1, round(width * w / first))) for k, w in kinds)
        return dataclasses.replace(expert, experts=wider)
    if isinstance(expert, MLP):
        first = expert.hidden_dims[0]
        dims = tuple(max(1, round(width * w / first)) for w in expert.hidden_dims * times)
        return dataclasses.replace(expert, hidden_dims=dims)
    if not has_width(expert):
        raise ValueError(f"{type(expert).__name__} has neither hidden_dims nor hidden_dim to widen")
    return dataclasses.replace(expert, hidden_dim=width)  # type: ignore[call-arg]


def hidden_width(expert: ExpertConfig) -> str:
    """Return the hidden widths of an expert for a table: "dim 64", or "dims 64, 32" of several layers or kinds."""
    if isinstance(expert, Mixed):
        widths = [w for w in (getattr(kind, "hidden_dim", None) for kind in expert.experts) if w is not None]
    else:
        widths = list(getattr(expert, "hidden_dims", None) or [getattr(expert, "hidden_dim", None)])
    return f"dim{'s' if len(widths) > 1 else ''} {', '.join(map(str, widths))}"
