"""The softmax over the items of a batch, corrected for how often each item is in one."""

from __future__ import annotations

import torch.nn.functional as F
from torch import Tensor


def sampled_softmax(logits_BU: Tensor, own_B: Tensor, count_U: Tensor, log_q_U: Tensor | None) -> Tensor:
    """Return the mean cross-entropy of each row's own item among the items of a sample, ().

    The sample holds the item u ``count_U[u]`` times: as the own item of so many rows, or as a further negative. It is
    so many negatives of the other rows, and none of a row whose own item it is. ``log_q_U`` is subtracted from all
    logits, the own one's too, so that frequent items, which are negatives more often, are not pushed down for it (logQ
    correction: Yi et al., RecSys 2019, https://doi.org/10.1145/3298689.3346996, equation 3).

    Args:
        logits_BU: (B, U), of each different item of the sample.
        own_B: int64 (B,), the place of each row's own item.
        count_U: int64 (U,), how often the sample holds each item; 0: it is not a negative.
        log_q_U: log of the probability with which a place of the sample holds each item; None: no correction.
    """
    log_count_U = count_U.to(logits_BU.dtype).log()
    logits_BU = logits_BU + (log_count_U if log_q_U is None else log_count_U - log_q_U)
    # Equal terms of a sum are one term times their number: an item that the sample holds often is one column.
    # The own item is one term, however often the sample holds it.
    logits_BU.scatter_add_(1, own_B[:, None], -log_count_U[own_B][:, None])
    return F.cross_entropy(logits_BU, own_B)


def log_probability(count_I: Tensor, num_in_batch: int = 1, num_uniform: int = 0) -> Tensor:
    """Return the log of the probability with which a place of a sample holds each item, (I,).

    A place has one of ``num_in_batch`` pairs of the training, or one of ``num_uniform`` draws in which all items are
    equally likely (mixed negative sampling: Yang et al., WWW 2020 companion). An item that no pair has counts as if one
    had it: validation may hold such an item.

    Args:
        count_I: int64 (I,), pairs of each item.
        num_in_batch, num_uniform: places of each kind.
    """
    count_I = count_I.clamp_min(1).double()
    share_I = count_I / count_I.sum()
    mixed_I = (num_in_batch * share_I + num_uniform / len(count_I)) / (num_in_batch + num_uniform)
    return mixed_I.log().float()
