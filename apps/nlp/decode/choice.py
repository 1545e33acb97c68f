"""The decisions of a step of a search, on the device and off it, and the decisions of beam search."""

from __future__ import annotations

import math
from dataclasses import dataclass

import numpy as np
import torch
import torch.nn.functional as F
from numpy.typing import NDArray
from torch import Tensor

from apps.data.subwords import EOS_ID
from apps.nlp.decode.top import top_sums


@dataclass
class Report:
    """A ``Choice`` of b sentences off the device: float64 (b, k) arrays, and the only results that most steps ask for.

    Attributes:
        token, parent, score, closed_score, closed_parent: as in ``Choice``.
        best: each sentence's largest ``score``.
        ends: whether any hypothesis of a sentence ends.
        tied: whether any sentence's choice is tied.
    """

    token: NDArray[np.float64]
    parent: NDArray[np.float64]
    score: NDArray[np.float64]
    closed_score: NDArray[np.float64]
    closed_parent: NDArray[np.float64]
    best: list[float]
    ends: list[bool]
    tied: bool


@dataclass
class Choice:
    """The k rows of b sentences after a step.

    Attributes:
        token_bk: int64, the id that each new row ends in.
        parent_bk: int64, the row of the sentence that it continues from.
        score_bk: its sum of log p; -inf if there is no such row.
        closed_score_bk: the sums of hypotheses that end with this step; -inf where there are fewer.
        closed_parent_bk: int64, the rows that they end.
        tied_b: bool, ids of equal log p were chosen from, not necessarily the lowest; None: none were.
    """

    token_bk: Tensor
    parent_bk: Tensor
    score_bk: Tensor
    closed_score_bk: Tensor
    closed_parent_bk: Tensor
    tied_b: Tensor | None = None

    def report(self) -> Report:
        """Return the choice off the device, with one wait for it."""
        parts = [self.token_bk, self.parent_bk, self.score_bk, self.closed_score_bk, self.closed_parent_bk]
        if self.tied_b is not None:
            parts.append(self.tied_b[:, None].expand_as(self.token_bk))
        values = torch.stack([part.double() for part in parts]).cpu().numpy()
        token, parent, score, closed_score, closed_parent = values[:5]
        best, ends = score.max(1).tolist(), (closed_score > -math.inf).any(1).tolist()
        return Report(token, parent, score, closed_score, closed_parent, best, ends, bool(values[5:].any()))


def ranked(log_prob_bkV: Tensor, score_bk: Tensor, width: int, exact: bool) -> Choice:
    """Choose by a step of beam search, to ``width`` rows; with one it is greedy search."""
    _, k, V = log_prob_bkV.shape
    # At most one of each row ends, so ``width`` continue.
    sum_bC, place_bC, tied_b = top_sums(log_prob_bkV, score_bk, min(2 * width, k * V), exact)
    if (lacking := 2 * width - sum_bC.shape[1]) > 0:
        sum_bC, place_bC = F.pad(sum_bC, (0, lacking), value=-math.inf), F.pad(place_bC, (0, lacking))
    token_bC, parent_bC = place_bC % V, place_bC // V
    ends_bC = (token_bC == EOS_ID) & (sum_bC > -math.inf)
    open_bk = ends_bC.byte().argsort(dim=1, stable=True)[:, :width]
    return Choice(
        token_bk=token_bC.gather(1, open_bk),
        parent_bk=parent_bC.gather(1, open_bk),
        score_bk=sum_bC.gather(1, open_bk),
        closed_score_bk=sum_bC[:, :width].masked_fill(~ends_bC[:, :width], -math.inf),
        closed_parent_bk=parent_bC[:, :width],
        tied_b=None if exact else tied_b,
    )
