"""The trees of a blend: a few settings of LightGBM for each task, within a fixed amount of work."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import numpy as np
import torch

from apps.recsys.encoding.features import Features
from apps.recsys.kinds import Kind
from apps.recsys.tables.estimators.base import TaskData
from apps.recsys.tables.estimators.boosting import MULTI_HOT
from apps.recsys.tables.estimators.libraries import Boosted, LightGBM, rows_of

WORK = 1.5e9
"""Limit of rows x columns x trees, over all settings and tasks: about 20 seconds of one core. It depends on the table
and on nothing else, so the same table always gets the same trees."""

USUAL_ROUNDS, LEAST_ROUNDS = 200, 100
"""Rounds of boosting that a setting usually takes, and that it may take in any case."""


class BlendTrees(LightGBM):
    """LightGBM's trees for a blend: of as many settings as ``WORK`` allows, those are kept whose blend has the
    least validation loss.

    The learning rate is 0.1: half as many trees as at 0.05 predict twice as fast.

    Args:
        share: share of ``WORK`` for each task.
        steps: see ``PerTask``.
    """

    def __init__(self, share: float, steps: bool = False) -> None:
        super().__init__(steps=steps)
        self.share = share

    def candidates(self, task: TaskData) -> Sequence[dict[str, Any]]:
        work = self._rounds(task) / USUAL_ROUNDS
        return [{**options, "learning_rate": 0.1} for options in super().candidates(task)[: max(int(work), 1)]]

    def blended(self, task: TaskData, own_Vw: np.ndarray) -> tuple[float, Boosted]:
        """Return the network's weight and the trees that together have the least validation loss.

        Args:
            task: the task.
            own_Vw: the network's outputs of the labeled validation rows, (V, width).
        """
        rows, candidates = rows_of(task), self.candidates(task)
        self.max_iter = min(max(int(self._rounds(task) / len(candidates)), LEAST_ROUNDS), 2000)
        found = []
        for options in candidates:
            trees = self._train(rows, options)
            loss, weight = best_weight(task.kind, own_Vw, trees.decision(rows.xv), task.yv_N)
            found.append((loss, weight, trees))
        _, weight, trees = min(found, key=lambda own: own[0])
        return weight, trees

    def _rounds(self, task: TaskData) -> float:
        """Return how many rounds of boosting the work allows, over all settings."""
        cells = len(task.y_N) * num_columns(task.train.features) * self.trees_per_round(task.kind)
        return self.share * WORK / cells

    @classmethod
    def most_rows(cls, features: Features, kinds: Sequence[Kind]) -> int:
        """Return how many training rows the work allows at most, with ``LEAST_ROUNDS`` for each task."""
        trees = LEAST_ROUNDS * len(kinds) * max(cls(1.0).trees_per_round(kind) for kind in kinds)
        return max(int(WORK / (num_columns(features) * trees)), 1)


def num_columns(features: Features) -> int:
    """Return how many columns trees read at most."""
    several = (1 + MULTI_HOT) * len(features.several)
    return len(features.continuous) + len(features.single) + several + sum(f.size for f in features.vectors) + 1


WEIGHTS = np.arange(20, -1, -1) / 20
"""Weights of the network that are tried: 1, 0.95, ..., 0. Of equal ones the largest is taken."""


def best_weight(kind: Kind, own_Nw: np.ndarray, trees_Nw: np.ndarray, y_N: np.ndarray) -> tuple[float, float]:
    """Return the least mean loss of a blend by one of ``WEIGHTS``, and the network's weight in it.

    Args:
        kind: kind of the task, which has the loss.
        own_Nw, trees_Nw: outputs of the network and of the trees, (N, width), or (N,) of one output.
        y_N: labels; none is NaN.
    """
    y = torch.from_numpy(y_N).double()
    own, trees = (torch.from_numpy(np.asarray(z)).double().reshape(len(y), -1) for z in (own_Nw, trees_Nw))
    losses = [float(kind.loss(kind.blended(own, trees, weight), y).mean()) for weight in WEIGHTS]
    best = int(np.nan_to_num(losses, nan=np.inf).argmin())
    return losses[best], float(WEIGHTS[best])
