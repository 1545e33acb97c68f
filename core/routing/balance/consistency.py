"""The consistency loss of two passes through randomly chosen experts."""

from __future__ import annotations

from torch import Tensor


def consistency_loss(logits_a: Tensor, logits_b: Tensor, valid: Tensor | None = None) -> Tensor:
    """Return the mean over predictions of ``(KL(p_a || p_b) + KL(p_b || p_a)) / 2``, p the softmax of the logits (THOR,
    arXiv 2110.04260; AdaMix, arXiv 2205.12410). Added to the task's loss of both passes, it makes random experts agree;
    it is 0 where they do.

    Args:
        logits_a, logits_b: (..., classes), finite, from two passes of the same batch in training.
        valid: bool (...), the predictions that count; None: all. Others may hold any value.
    """
    if valid is not None:
        logits_a, logits_b = (v.masked_fill(~valid.unsqueeze(-1), 0.0) for v in (logits_a, logits_b))
    log_a, log_b = logits_a.log_softmax(-1), logits_b.log_softmax(-1)
    # Twice this is sum p_a (log p_a - log p_b) + sum p_b (log p_b - log p_a); invalid ones are equal, and add 0.
    divergence = 0.5 * ((log_a.exp() - log_b.exp()) * (log_a - log_b)).sum(-1)
    count = valid.sum() if valid is not None else divergence.new_full((), divergence.numel())
    return divergence.sum() / count.clamp_min(1)
