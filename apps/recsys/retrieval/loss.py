"""The softmax over the items of a batch, corrected for how often each item is in one."""

from __future__ import annotations

import math

import torch
import torch.nn.functional as F
from torch import Tensor


def sampled_softmax(logits_BC: Tensor, item_C: Tensor, log_q_C: Tensor | None) -> Tensor:
    """Return the mean cross-entropy of each row's own item among C sampled ones, ().

    The own item of row b is in column b; further columns are further negatives. ``log_q_C`` is subtracted from all
    logits, the own one's too, so that frequent items, which are negatives more often, are not pushed down for it
    (logQ correction: Yi et al., RecSys 2019, https://doi.org/10.1145/3298689.3346996, equation 3). Other columns that
    hold a row's own item are no negatives of it, and are left out.

    Args:
        logits_BC: (B, C), C at least B.
        item_C: int64 (C,), the item of each column.
        log_q_C: log of the probability with which a column holds its item; None: no correction.

    Raises:
        ValueError: shapes that do not fit.
    """
    B, C = logits_BC.shape
    if C < B or item_C.shape != (C,) or (log_q_C is not None and log_q_C.shape != (C,)):
        shapes = f"{tuple(item_C.shape)} and {None if log_q_C is None else tuple(log_q_C.shape)}"
        raise ValueError(f"logits {(B, C)}, items and log_q {shapes}: they must be (B, C), (C,) and (C,), C at least B")
    if log_q_C is not None:
        logits_BC = logits_BC - log_q_C
    own_B = torch.arange(B, device=logits_BC.device)
    again_BC = item_C[:B, None] == item_C
    again_BC[own_B, own_B] = False
    return F.cross_entropy(logits_BC.masked_fill(again_BC, -math.inf), own_B)


def log_probability(count_I: Tensor, num_in_batch: int = 1, num_uniform: int = 0) -> Tensor:
    """Return the log of the probability with which a column of the sampled softmax holds each item, (I,).

    A column is one of ``num_in_batch`` pairs of the training, or one of ``num_uniform`` draws in which all items are
    equally likely (mixed negative sampling: Yang et al., WWW 2020 companion). An item that no pair has counts as if one
    had it: validation may hold such an item.

    Args:
        count_I: int64 (I,), pairs of each item.
        num_in_batch, num_uniform: columns of each kind.
    """
    count_I = count_I.clamp_min(1).double()
    share_I = count_I / count_I.sum()
    mixed_I = (num_in_batch * share_I + num_uniform / len(count_I)) / (num_in_batch + num_uniform)
    return mixed_I.log().float()
