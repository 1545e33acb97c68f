"""The searches of ``apps.nlp.decode`` as plain loops over sentences and hypotheses: the oracle of its tests.

Each sentence is alone, without padding, and each step decodes each whole prefix anew, in any dtype.
"""

from __future__ import annotations

import itertools
import math
from collections.abc import Callable
from typing import Any

import torch
from torch import Tensor

from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nlp.decode import DecodeConfig, Hypotheses
from apps.nlp.decode.run import dropless
from apps.nlp.decode.sampling import generator
from apps.nlp.decode.search import max_positions

NextLogProbs = Callable[[list[int]], list[float]]
"""Gives log p of each next id after the ids so far, the prompt's first."""


@torch.no_grad()
def translate_ids(model: Any, source_BS: Tensor, config: DecodeConfig, **context_B: Tensor | None) -> Hypotheses:
    """Do what ``decode.translate_ids`` does; the model must be in evaluation mode, and in the wanted dtype."""

    def begin(source: list[int], context: dict[str, Tensor | None]) -> tuple[NextLogProbs, list[int]]:
        memory = model.encode(torch.tensor([source], device=source_BS.device), **context)

        def next_log_probs(ids: list[int]) -> list[float]:
            h_1LD = model.decode(torch.tensor([ids], device=source_BS.device), memory)
            return _log_probs(model.logits(h_1LD[0, -1]))

        return next_log_probs, [BOS_ID]

    return _search(model, source_BS, config, begin, **context_B)


@torch.no_grad()
def generate_ids(model: Any, prompt_BL: Tensor, config: DecodeConfig, **context_B: Tensor | None) -> Hypotheses:
    """Do what ``decode.generate_ids`` does; the model must be in evaluation mode, and in the wanted dtype."""

    def begin(prompt: list[int], context: dict[str, Tensor | None]) -> tuple[NextLogProbs, list[int]]:
        def next_log_probs(ids: list[int]) -> list[float]:
            return _log_probs(model(torch.tensor([ids], device=prompt_BL.device), **context)[0, -1])

        return next_log_probs, prompt

    return _search(model, prompt_BL, config, begin, **context_B)


@torch.no_grad()
def caption_ids(
    model: Any, image: Tensor, config: DecodeConfig, length: int, index_B: Tensor | None = None
) -> Hypotheses:
    """Do what ``decode.caption_ids`` does; the model must be in evaluation mode, and in the wanted dtype."""

    def begin(row: list[int], context: dict[str, Tensor | None]) -> tuple[NextLogProbs, list[int]]:
        memory = model.encode(image[row[0] - 1 : row[0]])

        def next_log_probs(ids: list[int]) -> list[float]:
            return _log_probs(model.logits(model.decode(torch.tensor([ids], device=image.device), memory)[0, -1]))

        return next_log_probs, [BOS_ID]

    # Rows of the images' numbers from 1, as long as an image is for a text's maximal length.
    rows = torch.arange(1, len(image) + 1)[:, None].expand(-1, length)
    return _search(model, rows, config, begin, index_B=index_B)


def _search(
    model: Any,
    ids_BS: Tensor,
    config: DecodeConfig,
    begin: Callable[[list[int], dict[str, Tensor | None]], tuple[NextLogProbs, list[int]]],
    index_B: Tensor | None = None,
    **context_B: Tensor | None,
) -> Hypotheses:
    """Search for each row of ``ids_BS`` alone; ``begin`` returns its next log-probabilities and its prompt."""
    best = []
    with dropless(model):
        for b, ids_S in enumerate(ids_BS):
            ids = ids_S[ids_S != PAD_ID].tolist()
            context = {name: None if x is None else x[b : b + 1] for name, x in context_B.items()}
            next_log_probs, prompt = begin(ids, context)
            number = b if index_B is None else int(index_B[b])
            best.append(_best(next_log_probs, prompt, len(ids), config, model, number))
    return Hypotheses([[ids for ids, _ in own] for own in best], [[score for _, score in own] for own in best])


def _log_probs(logits_V: Tensor) -> list[float]:
    return (logits_V if logits_V.dtype == torch.float64 else logits_V.float()).log_softmax(-1).tolist()


def _best(
    next_log_probs: NextLogProbs, prompt: list[int], length: int, config: DecodeConfig, model: Any, number: int
) -> list[tuple[list[int], float]]:
    """Return the best ids and scores of a sentence."""
    most = max_positions(model)
    limit = config.max_length(length, None if most is None else most - len(prompt))
    if config.method == "sample":
        draws = torch.rand(
            limit + 1, config.num_return_sequences, generator=generator(config.seed, number), dtype=torch.float64
        ).tolist()
        hypotheses = [
            draw_one(next_log_probs, prompt, limit, config, [row[i] for row in draws])
            for i in range(config.num_return_sequences)
        ]
    elif config.method == "greedy":
        hypotheses = [greedy(next_log_probs, prompt, limit, config)]
    else:
        hypotheses = beam(next_log_probs, prompt, limit, config)
    return sorted(hypotheses, key=lambda pair: -pair[1])[: config.num_return_sequences]


def allowed(num_ids: int, vocab: int, limit: int, config: DecodeConfig) -> list[int]:
    """Return the ids that may follow ``num_ids`` ids."""
    if num_ids == limit:
        return [EOS_ID]
    return [i for i in range(vocab) if i not in (PAD_ID, BOS_ID) and (i != EOS_ID or num_ids >= config.min_new_tokens)]


def greedy(
    next_log_probs: NextLogProbs, prompt: list[int], limit: int, config: DecodeConfig
) -> tuple[list[int], float]:
    """Take the best id in each step, the lowest of equal ones."""
    ids: list[int] = []
    total = 0.0
    while True:
        log_p = next_log_probs(prompt + ids)
        best = max(allowed(len(ids), len(log_p), limit, config), key=lambda i: (log_p[i], -i))
        total += log_p[best]
        if best == EOS_ID:
            return ids, total / (len(ids) + 1) ** config.length_penalty
        ids.append(best)


def beam(
    next_log_probs: NextLogProbs, prompt: list[int], limit: int, config: DecodeConfig
) -> list[tuple[list[int], float]]:
    """Extend the k best hypotheses step by step, and return the finished ones.

    ``early_stopping="never"`` continues to the maximal length; True ends at k finished ones; False ends when the best
    open one, at its present length, scores no better than the k-th best of the finished ones.
    """
    k = config.num_beams
    hypotheses: list[tuple[list[int], float]] = [([], 0.0)]
    finished: list[tuple[list[int], float]] = []
    for num_ids in itertools.count():
        proposals = []
        for ids, total in hypotheses:
            log_p = next_log_probs(prompt + ids)
            proposals += [(total + log_p[i], ids, i) for i in allowed(num_ids, len(log_p), limit, config)]
        proposals = [p for p in sorted(proposals, key=lambda p: -p[0]) if p[0] > -math.inf]
        finished += [
            (ids, total / (num_ids + 1) ** config.length_penalty) for total, ids, i in proposals[:k] if i == EOS_ID
        ]
        hypotheses = [([*ids, i], total) for total, ids, i in proposals if i != EOS_ID][:k]
        if not hypotheses:
            break
        if len(finished) >= k and config.early_stopping != "never":
            worst = sorted(score for _, score in finished)[-k]
            best_open = max(total for _, total in hypotheses) / (num_ids + 1) ** config.length_penalty
            if config.early_stopping or best_open <= worst:
                break
    return finished


def draw_one(
    next_log_probs: NextLogProbs, prompt: list[int], limit: int, config: DecodeConfig, draws: list[float]
) -> tuple[list[int], float]:
    """Take in each step the first id whose cumulative probability, by id, exceeds the draw."""
    ids: list[int] = []
    total = 0.0
    while True:
        log_p = next_log_probs(prompt + ids)
        probs = sampling_probs(log_p, allowed(len(ids), len(log_p), limit, config), config)
        target = draws[len(ids)] * sum(probs.values())
        cumulative = 0.0
        for chosen in sorted(probs):
            cumulative += probs[chosen]
            if cumulative > target:
                break
        total += log_p[chosen]
        if chosen == EOS_ID:
            return ids, total / (len(ids) + 1) ** config.length_penalty
        ids.append(chosen)


def sampling_probs(log_p: list[float], ids: list[int], config: DecodeConfig) -> dict[int, float]:
    """Return the probability of each id that may follow and that ``top_k`` and ``top_p`` leave."""
    ordered = sorted(ids, key=lambda i: (-log_p[i], i))[: config.top_k or None]
    weights = [math.exp((log_p[i] - log_p[ordered[0]]) / config.temperature) for i in ordered]
    kept: dict[int, float] = {}
    for i, weight in zip(ordered, weights, strict=True):
        if sum(kept.values()) >= config.top_p * sum(weights) and config.top_p < 1:
            break
        kept[i] = weight
    return {i: weight / sum(kept.values()) for i, weight in kept.items()}
