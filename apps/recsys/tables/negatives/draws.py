"""Draws of items by weight, never one of a set that belongs to the row."""

from __future__ import annotations

import torch
from torch import Tensor


class ItemDraws:
    """Draws from I items, for rows whose key says which of them are excluded.

    A draw needs no second try: the excluded items are intervals of a line on which each item is as long as its weight,
    and a number below the length of all others is moved past the excluded items that lie before it.

    Args:
        weight_I: int64 (I,), an item's weight; 0: it is never sampled.
        key_M, item_M: int64 (M,), pairs of a key and an item that it excludes, in any order, any number of times.
        num_keys: number of keys, counted from 0.

    Attributes:
        weight_I: int64 (I,), as given.
        total: sum of all weights.
        left_K: int64 (K,), sum of the weights that are not excluded, by key.
    """

    def __init__(self, weight_I: Tensor, key_M: Tensor, item_M: Tensor, num_keys: int) -> None:
        pair_M = (key_M * len(weight_I) + item_M).unique()  # ascending: by key, then item
        key_M, item_M = pair_M // len(weight_I), pair_M % len(weight_I)
        self.weight_I = weight_I
        self.end_I = weight_I.cumsum(0)
        self.total = int(self.end_I[-1])
        # The excluded weight before each pair, including the weight of all keys before; the last entry is the sum.
        self.before_M1 = torch.cat((weight_I.new_zeros(1), weight_I[item_M].cumsum(0)))
        self.first_K1 = torch.searchsorted(key_M, torch.arange(num_keys + 1))
        before_K1 = self.before_M1[self.first_K1]
        self.left_K = self.total - before_K1.diff()
        # Numbers of a key from here on lie behind the pair's item. Keys follow one another in steps of total + 1.
        start_M = (self.end_I - weight_I)[item_M]
        self.threshold_M = key_M * (self.total + 1) + start_M - (self.before_M1[:-1] - before_K1[key_M])

    def items(self, uniform_Nn: Tensor, key_N: Tensor) -> Tensor:
        """Return an item for each number, int64 (N, n), with a probability in proportion to its weight.

        Args:
            uniform_Nn: float64 (N, n), uniform on [0, 1).
            key_N: int64 (N,), the key of each row; some weight must be left of it.
        """
        left_N1, key_N1 = self.left_K[key_N][:, None], key_N[:, None]
        number_Nn = (uniform_Nn * left_N1).long().minimum(left_N1 - 1)  # a product may round up to left
        passed_Nn = torch.searchsorted(self.threshold_M, key_N1 * (self.total + 1) + number_Nn, right=True)
        number_Nn += self.before_M1[passed_Nn] - self.before_M1[self.first_K1[key_N1]]
        return torch.searchsorted(self.end_I, number_Nn, right=True)
