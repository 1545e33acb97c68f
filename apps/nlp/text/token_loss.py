"""The cross-entropy of a text's tokens, each after those before it."""

from __future__ import annotations

from torch import Tensor

from apps.data.subwords import PAD_ID
from apps.nets.loss import OutputLogits, linear_cross_entropy, target_scores
from apps.nlp.text.foreseen import per_sentence
from apps.train.module import TaskOutput


def token_loss(predicted: OutputLogits, ids_BL: Tensor, smoothing: float | None) -> TaskOutput:
    """Return the mean cross-entropy of the tokens after the first, padding left out.

    Args:
        predicted: logits of the T real tokens after the first, row by row; packed for an evaluation.
        ids_BL: int64 (B, L), the texts, ``PAD_ID`` behind them.
        smoothing: label smoothing of a training; None: an evaluation, whose ``outputs`` are the ``Foreseen`` of each
            text.
    """
    target_BL = ids_BL[:, 1:]
    real_BL = target_BL != PAD_ID
    target_T = target_BL[real_BL] if predicted.real_T is None else target_BL.flatten()
    if smoothing is not None:
        loss = linear_cross_entropy(predicted.h_TD, predicted.weight_VD, target_T, smoothing, real=predicted.real_T)
        return TaskOutput(loss, None, None, len(ids_BL), distribution=predicted)
    scores = target_scores(predicted.h_TD, predicted.weight_VD, target_T)
    loss = scores.nll_T.sum() / max(len(target_T), 1)  # without a token 0, as in training
    return TaskOutput(loss, per_sentence(scores, real_BL), None, len(ids_BL), weight=len(target_T))
