"""Columns of sequences, such as a user's last items, as rows of an embedding table."""

from __future__ import annotations

import numpy as np
from numpy.typing import NDArray

from apps.recsys.encoding.categories import offsets_of


def last_values(offsets: NDArray[np.int64], length: int) -> tuple[NDArray[np.int64], NDArray[np.int64]]:
    """Return the offsets (N + 1,) of the last ``length`` values of each row, and the positions of these values.

    Args:
        offsets: (N + 1,), where each row's values start and end.
        length: largest number of values that are kept.
    """
    kept_N = np.minimum(np.diff(offsets), length)
    new = offsets_of(kept_N)
    return new, np.repeat(offsets[1:] - new[1:], kept_N) + np.arange(new[-1])


def without_row_0(offsets: NDArray[np.int64], rows: NDArray[np.int32]) -> tuple[NDArray[np.int64], NDArray[np.int32]]:
    """Return sequences without the values that have no row of their own."""
    is_kept = rows != 0
    return offsets_of(is_kept.astype(np.int64))[offsets], rows[is_kept]
