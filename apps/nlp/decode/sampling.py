"""A step of sampling, and the generators of its draws."""

from __future__ import annotations

import math
import zlib
from collections.abc import Sequence

import torch
from torch import Tensor

from apps.data.subwords import EOS_ID
from apps.nlp.decode.choice import Choice
from apps.nlp.decode.config import DecodeConfig


def drawn(log_prob_bkV: Tensor, score_bk: Tensor, draw_bk: Tensor, config: DecodeConfig) -> Choice:
    """Choose by a step of sampling: each row by itself, or each of k from the only one."""
    k = draw_bk.shape[1]
    log_prob_bkV, score_bk = log_prob_bkV.expand(-1, k, -1), score_bk.expand(-1, k)
    cumulative_bkV = sampling_probs(log_prob_bkV.double(), config).cumsum(-1)
    # The first id whose cumulative probability exceeds the draw: never one of probability 0.
    target_bk1 = draw_bk[..., None] * cumulative_bkV[..., -1:]
    token_bk = torch.searchsorted(cumulative_bkV, target_bk1, right=True).squeeze(-1)
    token_bk = torch.minimum(token_bk, cumulative_bkV.argmax(-1))
    total_bk = score_bk + log_prob_bkV.gather(-1, token_bk[..., None]).squeeze(-1)
    ends_bk = token_bk == EOS_ID
    row_bk = torch.arange(k, device=score_bk.device).repeat(len(token_bk), 1)
    closed_bk, open_bk = total_bk.masked_fill(~ends_bk, -math.inf), total_bk.masked_fill(ends_bk, -math.inf)
    return Choice(token_bk, row_bk, open_bk, closed_bk, row_bk)


def sampling_probs(logits: Tensor, config: DecodeConfig) -> Tensor:
    """Return the sampling probabilities of the ids, (..., V): 0 outside ``top_k``, ``top_p`` and ``min_p``.

    Among equal ids these keep the lower ones.

    Args:
        logits: (..., V), logits or log-probabilities; -inf for ids that are not allowed.
        config: its temperature, ``top_k``, ``top_p`` and ``min_p``.
    """
    logits = logits / config.temperature
    probs = logits.softmax(-1)
    if config.top_k or config.top_p < 1:
        sorted_logits, order = logits.sort(stable=True, dim=-1, descending=True)
        if config.top_k:
            sorted_logits[..., config.top_k :] = -math.inf
        sorted_probs = sorted_logits.softmax(-1)
        before = sorted_probs.cumsum(-1) - sorted_probs
        sorted_probs = sorted_probs.masked_fill(before >= config.top_p, 0.0)
        probs = torch.zeros_like(probs).scatter(-1, order, sorted_probs / sorted_probs.sum(-1, keepdim=True))
    if config.min_p:
        probs = probs.masked_fill(probs < config.min_p * probs.amax(-1, keepdim=True), 0.0)
        probs = probs / probs.sum(-1, keepdim=True)
    return probs


def draws(config: DecodeConfig, spans: Sequence[tuple[int, int]], numbers: Sequence[int]) -> Tensor:
    """Return float64 (B, k, steps), uniform in [0, 1). Each sentence has a generator of its own, so that neither the
    rest of its batch nor pruning changes its samples.

    Args:
        config: its seed, and k.
        spans: of each sentence, the step of its first draw and how many there may be.
        numbers: the sentences' numbers.
    """
    k = config.width
    draw_BkT = torch.zeros(len(spans), k, max(start + count for start, count in spans), dtype=torch.float64)
    for draw_kT, (start, count), number in zip(draw_BkT, spans, numbers, strict=True):
        own_Tk = torch.rand(count, k, generator=generator(config.seed, number), dtype=torch.float64)
        draw_kT[:, start : start + count] = own_Tk.T
    return draw_BkT


def generator(seed: int, number: int) -> torch.Generator:
    """Return the generator of a sentence's draws; its number is its line's, or its place in the batch."""
    # A generator on the CPU heeds 32 bits of its seed: both numbers must be mixed into them.
    return torch.Generator().manual_seed(zlib.crc32(f"{seed} {number}".encode()))
