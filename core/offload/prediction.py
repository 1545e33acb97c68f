"""``Forecast``: which experts the next call will need, from the hidden state of this one."""

from __future__ import annotations

import heapq
from collections import Counter
from collections.abc import Callable, Sequence

from torch import Tensor

Scores = Callable[[Tensor], list[float] | None]
"""Maps (T, D) tokens to the share of each of a module's E experts in what the tokens would choose there; None where it
cannot say."""
AHEAD = 3
"""Experts that are fetched ahead for each that the next module needed last."""


class Forecast:
    """Predicts the experts of the next module of experts, while a model runs its modules one after the other.

    Two sources are added, each normalized to 1. The next layer's own gate reads this layer's hidden state, from which
    its input differs by little (MoE-Infinity, arXiv 2401.14361; Pre-gated MoE, arXiv 2308.12066, trains a gate for it).
    And counts remember which experts there followed those that are used here; they also lead from a decoder's last
    layer to the first one of its next step, whose token no gate has seen yet. Which module comes next is what came most
    often so far.

    Args:
        gates: the scores of each module by the gate of its layer; None: its router has no gate that could say.
    """

    def __init__(self, gates: Sequence[Scores | None]) -> None:
        self.gates = gates
        self._followers: list[Counter[int]] = [Counter() for _ in gates]
        self._history: dict[tuple[int, int, int], Counter[int]] = {}
        self._width = [0] * len(gates)
        self._before: tuple[int, list[int]] | None = None

    def note(self, module: int, numbers: list[int]) -> None:
        """Take note that a module needed these experts, after the call that was noted before."""
        self._width[module] = len(numbers)
        if self._before is not None:
            earlier, used = self._before
            self._followers[earlier][module] += 1
            for e in used:
                self._history.setdefault((earlier, e, module), Counter()).update(numbers)
        self._before = module, numbers

    def next(self, x_TD: Tensor) -> tuple[int, list[int]] | None:
        """Return the module that is to come and its experts, the most probable first; None if nothing is known.

        Args:
            x_TD: (T, D), the hidden state of the call that was noted last.
        """
        if self._before is None or not self._followers[self._before[0]]:
            return None
        module, used = self._before
        following = max(self._followers[module], key=self._followers[module].__getitem__)
        seen: Counter[int] = Counter()
        for e in used:
            seen.update(self._history.get((module, e, following), {}))
        total = sum(seen.values())
        scores = {e: count / total for e, count in seen.items()}
        gate = self.gates[following]
        for e, share in enumerate((gate(x_TD) if gate is not None else None) or ()):
            scores[e] = scores.get(e, 0.0) + share
        return following, heapq.nlargest(AHEAD * self._width[following], scores, key=scores.__getitem__)
