"""Fewer cases of a large grid by default; the whole grid is run by ``-m slow``."""

from __future__ import annotations

import itertools
import zlib
from collections.abc import Callable, Iterable
from typing import Any

import pytest


def pairwise(*axes: Iterable[Any], of: Iterable[tuple[Any, ...]] | None = None) -> list[Any]:
    """Return the product of axes, with ``slow`` on all but a few cases in which any two values that meet still meet.

    Args:
        axes: the values of each argument.
        of: the cases themselves, where not every combination is one.
    """
    cases = list(itertools.product(*axes) if of is None else of)
    pairs = [set(itertools.combinations(enumerate(map(repr, case)), 2)) for case in cases]
    missing, chosen = set().union(*pairs), set()
    while missing:
        best = max(range(len(cases)), key=lambda i: len(pairs[i] & missing))
        chosen.add(best)
        missing -= pairs[best]
    return [_case(case, i in chosen) for i, case in enumerate(cases)]


def one_in(share: int, values: Iterable[Any], name: Callable[[Any], str] = str) -> list[Any]:
    """Return values, with ``slow`` on all but one in ``share``, which the hash of their names chooses."""
    return [_case((value,), zlib.crc32(name(value).encode()) % share == 0) for value in values]


def _case(values: tuple[Any, ...], is_default: bool) -> Any:
    return pytest.param(*values, marks=[] if is_default else [pytest.mark.slow])
