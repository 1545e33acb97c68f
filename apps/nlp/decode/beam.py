"""A step of beam search."""

from __future__ import annotations

import math

import torch.nn.functional as F
from torch import Tensor

from apps.data.subwords import EOS_ID
from apps.nlp.decode.choice import Choice
from apps.nlp.decode.top import top_sums


def ranked(log_prob_bkV: Tensor, score_bk: Tensor, width: int, exact: bool) -> Choice:
    """Choose by a step of beam search, to ``width`` rows; with one it is greedy search."""
    _, k, V = log_prob_bkV.shape
    # At most one of each row ends, so ``width`` go on.
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
