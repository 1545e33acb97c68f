"""``Forecast``: which experts the next call will need, from the hidden state of this one."""

from __future__ import annotations

from collections import Counter
from collections.abc import Callable, Sequence

import torch
from torch import Tensor

Scores = Callable[[Tensor], Tensor | None]
"""Maps (T, D) tokens to the shares (E,) of a module's experts in what the tokens would choose there; None where it
cannot say."""
FADING = 0.999
"""What is left of a count of the history after each use of its expert."""
AHEAD = 3
"""Experts that are fetched ahead for each that the next module needed last."""


class Forecast:
    """Predicts the experts of the next module of experts, while a model runs its modules one after the other.

    Two sources are added, each normalised to 1. The next layer's own gate reads this layer's hidden state, from which
    its input differs by little (MoE-Infinity, arXiv 2401.14361; Pre-gated MoE, arXiv 2308.12066, trains a gate for it).
    And counts remember which experts there followed those that are used here; they also lead from a decoder's last
    layer to the first one of its next step, whose token no gate has seen yet. Which module comes next is what came most
    often so far.

    Args:
        sizes: E of each module.
        gates: the scores of each module by the gate of its layer; None: its router has no gate that could say.
    """

    def __init__(self, sizes: Sequence[int], gates: Sequence[Scores | None]) -> None:
        self.sizes, self.gates = sizes, gates
        self._followers: list[Counter[int]] = [Counter() for _ in sizes]
        self._history: dict[tuple[int, int], Tensor] = {}
        self._width = [0] * len(sizes)
        self._before: tuple[int, list[int]] | None = None

    def note(self, module: int, numbers: list[int]) -> None:
        """Take note that a module needed these experts, after the call that was noted before."""
        self._width[module] = len(numbers)
        if self._before is not None:
            earlier, used = self._before
            self._followers[earlier][module] += 1
            edge = earlier, module
            if edge not in self._history:
                self._history[edge] = torch.zeros(self.sizes[earlier], self.sizes[module])
            counts = self._history[edge]
            seen = torch.zeros(self.sizes[module])
            seen[numbers] = 1.0
            counts[used] = counts[used] * FADING + seen
        self._before = module, numbers

    def next(self, x_TD: Tensor) -> tuple[int, list[int]] | None:
        """Return the module that is to come and its experts, the most probable first; None where nothing is known.

        Args:
            x_TD: (T, D), the hidden state of the call that was noted last.
        """
        if self._before is None:
            return None
        module, used = self._before
        if not self._followers[module]:
            return None
        following = max(self._followers[module], key=self._followers[module].__getitem__)
        counts_E = self._history[module, following][used].sum(0)
        scores_E = counts_E / counts_E.sum().clamp_min(1e-9)
        gate = self.gates[following]
        gate_E = None if gate is None else gate(x_TD)
        if gate_E is not None:
            scores_E = scores_E + (gate_E / gate_E.sum().clamp_min(1e-9)).cpu()
        count = min(AHEAD * self._width[following], self.sizes[following])
        best = scores_E.topk(count).indices.tolist()
        return following, best
