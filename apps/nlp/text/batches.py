"""Batches of sentence pairs by a token budget, of neighbors in length, so that little of a batch is padding.

An epoch's pairs are ordered by their longer side and cut greedily: a batch of B pairs whose longest side has S tokens
takes ``B * S`` of the budget. The order among pairs of equal length comes by chance, and so does the place of the first
cut, so the batches of two epochs differ; their number does not, since schedules and resumed runs count on it.
"""

from __future__ import annotations

import itertools
from collections.abc import Sequence
from typing import Any, NamedTuple

import numpy as np
import torch
from numpy.typing import NDArray
from torch import Tensor
from torch.utils.data import Dataset

from apps.data.subwords import EOS_ID

_POOL = 1 << 17
"""Pairs that are ordered by length at once. A longer epoch is cut into as many pools as it takes, by chance, so that
its batches mix the whole corpus."""

Lengths = NDArray[np.int64]


class TranslationBatch(NamedTuple):
    """B sentence pairs as subword ids, each padded with ``PAD_ID`` after its end.

    Attributes:
        source_BS: int64 (B, S), the source with its language tag before it if there is one, and ``EOS_ID`` after it.
        target_BL: int64 (B, L), ``BOS_ID``, the reference, ``EOS_ID``: a decoder reads ``[:, :-1]`` and predicts
            ``[:, 1:]``. In prediction the reference is missing, and L is 1.
        pair_B: int64 (B,), the language pair's place among the data's ``pairs``.
        index_B: int64 (B,), the sentence's place in its split, from 0. In prediction of text or a file
            it is the sentence's line there.
    """

    source_BS: Tensor
    target_BL: Tensor
    pair_B: Tensor
    index_B: Tensor  # type: ignore[assignment]  # a batch has no use for tuple.index

    @property
    def empty_B(self) -> Tensor:
        """bool (B,): the source is an empty line, which is to stay one. It has ``EOS_ID`` alone, without a tag."""
        return self.source_BS[:, 0] == EOS_ID


class TokenBatches:
    """The training batches of each epoch: an `apps.data.loader.BatchPlan`.

    With a ``temperature`` T above 1 an epoch still has as many pairs as the corpus, but group i has the share
    ``n_i^(1/T) / sum_j n_j^(1/T)`` of them instead of its share of the corpus. Its pairs come in whole random orders,
    one after the other, which continue from epoch to epoch: none comes a third time before all have come twice.

    Args:
        source_N, target_N: tokens of each pair's sides, specials included.
        tokens: the budget, tokens of the longer side, padding included. A longer pair is a batch of its own.
        group_N: the corpus and language pair that each belongs to, numbered from 0; None: one.
        temperature: T.

    Raises:
        ValueError: no pair, tokens below 1 or temperature below 1.
    """

    def __init__(
        self,
        source_N: Lengths,
        target_N: Lengths,
        tokens: int,
        group_N: Lengths | None = None,
        temperature: float = 1.0,
    ) -> None:
        if not len(source_N):
            raise ValueError("there are no sentence pairs to train on")
        self.source_N, self.target_N, self.tokens = source_N, target_N, tokens
        self._groups: list[Lengths] = []  # positions of each group; empty: every pair comes once an epoch
        self._quotas: list[int] = []
        if group_N is not None and temperature > 1:
            self._groups = [np.flatnonzero(group_N == g) for g in np.unique(group_N)]
            self._quotas = quotas([len(g) for g in self._groups], temperature)
        self._num_batches = self._count()

    def __len__(self) -> int:
        return self._num_batches

    def batches(self, seed: int, epoch: int) -> list[Tensor]:
        """Return the positions of each batch, int64, batches in random order."""
        generator = _generator(seed, 0, epoch)
        parts = self._cut(self._draw(seed, epoch, generator), self.tokens, generator)
        tokens = self.tokens
        while len(parts) > self._num_batches:  # an epoch of longer pairs than was foreseen
            tokens = tokens + max(1, tokens // 50)
            parts = self._cut(np.concatenate(parts), tokens, None)
        parts.sort(key=len)
        while len(parts) < self._num_batches:
            largest = parts.pop()
            parts.extend((largest[::2], largest[1::2]))
            parts.sort(key=len)
        return [torch.from_numpy(parts[i]) for i in generator.permutation(len(parts))]

    def padding(self) -> float:
        """Return the share of padding in the tokens of the first epoch of seed 0; epochs differ little."""
        sides = (self.source_N, self.target_N)
        parts = [part.numpy() for part in self.batches(0, 0)]
        tokens = sum(int(side[part].sum()) for part in parts for side in sides)
        return 1 - tokens / sum(len(part) * int(side[part].max()) for part in parts for side in sides)

    def _count(self) -> int:
        """Return how many batches every epoch has: what one takes, and a few for what differs between epochs."""
        generator = _generator(0, 0, 0)
        order = self._draw(0, 0, generator)
        count = len(self._cut(order, self.tokens, None))
        pools = -(-len(order) // _POOL)
        if count == 1:
            return 1
        spare = pools  # of the first cut
        if pools > 1 or self._groups:
            spare += -(-count // 100)
        return min(count + spare, len(order))

    def _draw(self, seed: int, epoch: int, generator: np.random.Generator) -> Lengths:
        """Return the positions of an epoch in random order."""
        if not self._groups:
            return generator.permutation(len(self.source_N))
        drawn = [
            positions[endless(len(positions), epoch * quota, quota, (seed, 1, g))]
            for g, (positions, quota) in enumerate(zip(self._groups, self._quotas, strict=True))
        ]
        return generator.permutation(np.concatenate(drawn))

    def _cut(self, order: Lengths, tokens: int, generator: np.random.Generator | None) -> list[Lengths]:
        """Return batches of ``order``; with a generator the first one of each pool is a random part of a batch."""
        pools = -(-len(order) // _POOL)
        parts = []
        for pool in np.array_split(order, pools):
            pool = by_length(self.source_N, self.target_N, pool)
            longer = np.maximum(self.source_N[pool], self.target_N[pool])
            first = tokens if generator is None else int(tokens * generator.uniform(0.1, 1.0))
            bounds = cut_by_tokens(longer, tokens, first)
            parts += [pool[a:b] for a, b in itertools.pairwise(bounds)]
        return parts


class WholeBatches(Dataset[Any]):
    """Whole batches of a dataset, given the positions of each."""

    def __init__(self, examples: Any, batches: list[Tensor]) -> None:
        self.examples, self.batches = examples, batches

    def __len__(self) -> int:
        return len(self.batches)

    def __getitems__(self, numbers: list[int]) -> Any:
        (number,) = numbers
        return self.examples.__getitems__(self.batches[number])


def by_length(source_N: Lengths, target_N: Lengths, order: Lengths) -> Lengths:
    """Sort ``order`` by each pair's longer side, then by the difference of both; equal pairs keep their order.

    The differences go back and forth, so that neighbors are alike also where the longer side goes up by one.
    """
    longer, difference = np.maximum(source_N[order], target_N[order]), source_N[order] - target_N[order]
    return order[np.lexsort((np.where(longer % 2, difference, -difference), longer))]


def evenly(num: int) -> list[int]:
    """Return 0 to ``num - 1`` in an order of which every beginning is spread over all of them, from the middle on."""
    bits = max(num - 1, 0).bit_length()
    # The binary digits of 0, 1, 2, ... read backwards halve the widest gap each time (van der Corput).
    reversed_bits = (int(f"{i:0{bits}b}"[::-1], 2) if bits else 0 for i in range(1 << bits))
    places = ((r / (1 << bits) + 0.5) % 1 for r in reversed_bits)
    return list(dict.fromkeys(int(place * num) for place in places))[:num]


def cut_by_tokens(longer: Lengths, tokens: int, first: int | None = None) -> list[int]:
    """Return the bounds of the batches, in this order: each as large as its budget allows, and of one pair at least.

    Args:
        longer: tokens of each pair's longer side.
        tokens: the budget of a batch: its pairs times its longest side.
        first: of the first batch, if it is another.

    Returns:
        0 and the end of each batch.
    """
    bounds, budget = [0], tokens if first is None else first
    while (start := bounds[-1]) < len(longer):
        most = max(1, budget // int(longer[start]))  # as many would fit if all were as short as the first
        window = np.maximum.accumulate(longer[start : start + most])
        fits = np.searchsorted(window * np.arange(1, len(window) + 1), budget, side="right")
        bounds.append(start + max(1, int(fits)))
        budget = tokens
    return bounds


def quotas(sizes: Sequence[int], temperature: float) -> list[int]:
    """Return each group's pairs an epoch at a temperature: ``sum(sizes)`` in all, at least one each."""
    shares = np.array(sizes, float) ** (1 / temperature)
    exact = shares / shares.sum() * sum(sizes)
    floor = np.maximum(1, np.floor(exact)).astype(int)
    # the rest goes to the largest remainders, as in an election
    for i in np.argsort(floor - exact, kind="stable")[: max(0, sum(sizes) - floor.sum())]:
        floor[i] += 1
    return floor.tolist()


def endless(size: int, start: int, count: int, seed: tuple[int, ...]) -> Lengths:
    """Return numbers ``start`` to ``start + count`` of random orders of ``range(size)``, one after the other."""
    first, last = start // size, (start + count - 1) // size
    orders = [_generator(*seed, turn).permutation(size) for turn in range(first, last + 1)]
    return np.concatenate(orders)[start - first * size :][:count]


def _generator(*seed: int) -> np.random.Generator:
    return np.random.default_rng(np.random.SeedSequence(seed))
