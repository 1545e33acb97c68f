"""The splits of a dataset, and how much of it is held out for them."""

from __future__ import annotations

import logging
from collections.abc import Sequence
from typing import Literal

import numpy as np
from numpy.typing import NDArray

from apps.base.checks import check_at_least

log = logging.getLogger(__name__)

Split = Literal["train", "val", "test"]
SPLITS: tuple[Split, ...] = ("train", "val", "test")


def check_size(name: str, size: int | float | None) -> None:
    """Raise an error for a size that is neither a number of examples nor a share of them.

    Raises:
        ValueError: a negative size, or a share that is not below 1.
    """
    check_at_least(0, **{name: size})
    if isinstance(size, float) and size >= 1:
        raise ValueError(f"{name}={size} is neither an integer nor a share below 1")


def count_of(size: int | float, total: int) -> int:
    """Return the number of examples that a size means: a share of ``total`` if it is below 1."""
    return round(size * total) if size < 1 else int(size)


def connected(at_L: NDArray[np.int64], key_L: NDArray[np.int64], count: int) -> NDArray[np.int64]:
    """Number the groups of examples that share keys, directly or over other examples.

    Args:
        at_L, key_L: int64 (L,), that an example has a key; keys are numbered from 0.
        count: N, the number of examples.

    Returns:
        int64 (N,), numbers from 0 on.
    """
    from scipy.sparse import coo_matrix
    from scipy.sparse.csgraph import connected_components

    nodes = count + int(key_L.max(initial=-1)) + 1
    links = coo_matrix((np.ones(len(at_L), np.int8), (at_L, count + key_L)), shape=(nodes, nodes))
    _, group_M = connected_components(links, directed=False)
    return np.unique(group_M[:count], return_inverse=True)[1].astype(np.int64)


def hold_out(group_N: NDArray[np.int64], sizes: Sequence[int], seed: int) -> list[NDArray[np.int64]]:
    """Draw disjoint sets of examples by whole groups.

    The groups are shuffled. Each goes into the first set that has room for all of it, or into none.

    Args:
        group_N: int64 (N,), the group of each example.
        sizes: number of examples of each set, at most.
        seed: the only source of randomness.

    Returns:
        The places of each set, sorted. A set has fewer examples than its size if no group fits any more.
    """
    groups, group_N = np.unique(group_N, return_inverse=True)
    count_G = np.bincount(group_N, minlength=len(groups))
    room, set_G = list(sizes), np.full(len(groups), -1)
    for group in np.random.RandomState(seed).permutation(len(groups)):
        for number, left in enumerate(room):
            if count_G[group] <= left:
                set_G[group], room[number] = number, left - count_G[group]
                break
        if not any(room):
            break
    return [np.flatnonzero(set_G[group_N] == number) for number in range(len(sizes))]


def check_drawn(split: str, asked: int | float | None, wanted: int, drawn: int, of: str) -> None:
    """Warn of a split for which fewer examples were held out than wanted.

    Args:
        split: its name.
        asked: the size that was asked for; None: none was.
        wanted: the number of examples that this means.
        drawn: the number that was held out.
        of: what they were held out from, and why there are no more.

    Raises:
        ValueError: none was held out although some were asked for.
    """
    if drawn == wanted:
        return
    message = f"{split}_size={wanted if asked is None else asked}: {drawn:,} of {of}"
    if asked and not drawn:
        raise ValueError(f"{message}; {split}_size=0 holds none out")
    log.warning("%s", message)
