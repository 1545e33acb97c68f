"""Scores of a decoder that is given the right text; ``apps.train.step.pieces`` has the metrics that they add up to."""

from __future__ import annotations

from collections.abc import Mapping
from typing import NamedTuple

import torch
from torch import Tensor

from apps.data.subwords import PAD_ID, UNK_ID
from apps.nets.loss import TargetScores


class TeacherForced(NamedTuple):
    """The scores that a decoder gives each sentence's reference, its end included.

    Attributes:
        nll_B: float64 (B,), negative log likelihood in nats, summed over its tokens.
        right_B: int64 (B,), tokens that came first.
        tokens_B: int64 (B,).
    """

    nll_B: Tensor
    right_B: Tensor
    tokens_B: Tensor


def per_sentence(scores: TargetScores, real_BL: Tensor) -> TeacherForced:
    """Add up the scores of T targets, the real ones of (B, L), row by row."""
    tokens_B = real_BL.sum(1)
    row_T = torch.repeat_interleave(tokens_B)
    nll_B = torch.zeros(len(tokens_B), dtype=torch.float64, device=row_T.device)
    return TeacherForced(
        nll_B=nll_B.index_add_(0, row_T, scores.nll_T.double()),
        right_B=torch.zeros_like(tokens_B).index_add_(0, row_T, scores.is_first_T.long()),
        tokens_B=tokens_B,
    )


def read_ids(target_BL: Tensor) -> Tensor:
    """Return the decoder's input, (B, L - 1): all but the end, after which there is nothing to say."""
    return target_BL[:, :-1].masked_fill(target_BL[:, 1:] == PAD_ID, PAD_ID)


def of_mean_length(ids_BS: Tensor) -> Tensor:
    """Return the first M tokens, (B, M), with unknown tokens for padding; M is the mean length, rounded."""
    length = round(int((ids_BS != PAD_ID).sum()) / max(len(ids_BS), 1))
    return ids_BS[:, : max(length, 1)].masked_fill(ids_BS[:, : max(length, 1)] == PAD_ID, UNK_ID)


class Judged(NamedTuple):
    """A text that a model has written in a test, next to the right one.

    Attributes:
        index: its place in the split, from 0: not its line in a file, since pairs of several files follow one another
            and pairs with an empty side are left out.
        group: number of its group: of a language pair among the data's, or of an image.
        written: the text that the model wrote; None if another text of the group in its batch has it.
        reference: the right text.
        log_prob: the written text's score in the search.
        nll: negative log likelihood of the reference's tokens, in nats, summed.
        right: tokens of the reference that came first when all before them were the reference's.
        tokens: of the reference, its end included.
        scores: values of metrics of single texts, by name.
    """

    index: int  # type: ignore[assignment]  # a text has no use for tuple.index
    group: int
    written: str | None
    reference: str
    log_prob: float
    nll: float
    right: int
    tokens: int
    scores: Mapping[str, float] = {}  # nobody writes into it
