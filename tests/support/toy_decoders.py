"""Decoders small enough to work out by hand, and sources for them."""

from __future__ import annotations

import math
from typing import Any

import pytest
import torch
from torch import Tensor, nn

from apps.data.subwords import EOS_ID, PAD_ID

A, B = 4, 5
VOCAB = 6


class State:
    """A cache of one tensor, a row a hypothesis."""

    def __init__(self, rows: Tensor) -> None:
        self.rows = rows

    def __len__(self) -> int:
        return len(self.rows)

    def select(self, index: Tensor) -> State:
        self.rows = self.rows[index]
        return self

    def expand(self, copies: int) -> State:
        return self.select(torch.arange(len(self)).repeat_interleave(copies))


class Table(nn.Module):
    """The next id depends on the last one alone: ``probs[last][next]``, the same for every source."""

    def __init__(self, probs: dict[int, dict[int, float]], dtype: torch.dtype = torch.float64) -> None:
        super().__init__()
        logits = torch.full((VOCAB, VOCAB), -1e4, dtype=dtype)
        for last, row in probs.items():
            for following, p in row.items():
                logits[last, following] = math.log(p)
        self.table = nn.Parameter(logits)
        self.steps: list[int] = []  # rows of each step

    def encode(self, source: Tensor, task: Tensor | None = None, domain: Tensor | None = None) -> Tensor:
        return source

    def start(self, memory: Tensor) -> State:
        return State(torch.zeros(len(memory)))

    def step(self, token: Tensor, cache: State) -> Tensor:
        assert len(token) == len(cache)
        self.steps.append(len(token))
        return self.table[token].clone()

    def decode(self, target: Tensor, memory: Tensor) -> Tensor:
        return nn.functional.one_hot(target, VOCAB).to(self.table.dtype)

    def logits(self, h: Tensor) -> Tensor:
        return h @ self.table


class Recurrent(nn.Module):
    """The next id depends on the source and on all ids before: what a wrong row of the cache would change."""

    def __init__(self, vocab: int = 23, dim: int = 8, seed: int = 0, sharpness: float = 3.0) -> None:
        super().__init__()
        g = torch.Generator().manual_seed(seed)
        self.embed = nn.Parameter(torch.randn(vocab, dim, generator=g).double())
        self.inner = nn.Parameter(torch.randn(dim, dim, generator=g).double() / dim**0.5)
        self.out = nn.Parameter(sharpness * torch.randn(dim, vocab, generator=g).double() / dim**0.5)

    def encode(self, source: Tensor, task: Tensor | None = None, domain: Tensor | None = None) -> Tensor:
        real = (source != PAD_ID)[..., None].to(self.embed.dtype)
        return (self.embed[source] * real).sum(1) / real.sum(1).sqrt()

    def start(self, memory: Tensor | int, task: Any = None, domain: Any = None) -> State:
        return State(self.embed.new_zeros(memory, self.embed.shape[1]) if isinstance(memory, int) else memory)

    def _next(self, token: Tensor, state: Tensor) -> Tensor:
        return torch.tanh(state @ self.inner + self.embed[token])

    def step(self, token: Tensor, cache: State) -> Tensor:
        assert len(token) == len(cache)
        cache.rows = self._next(token, cache.rows)
        return self.logits(cache.rows)

    def decode(self, target: Tensor, memory: Tensor) -> Tensor:
        hidden = []
        for token in target.unbind(1):
            memory = self._next(token, memory)
            hidden.append(memory)
        return torch.stack(hidden, 1)

    def logits(self, h: Tensor) -> Tensor:
        logits = h @ self.out
        return logits.float() if logits.dtype == torch.bfloat16 else logits

    def forward(self, x: Tensor, target: Tensor | None = None, *context: Any) -> Tensor:
        if not isinstance(target, Tensor):  # a language model
            return self.logits(self.decode(x, self.start(len(x)).rows))
        return self.logits(self.decode(target, self.encode(x)))


def sources(lengths: list[int], vocab: int = 23, seed: int = 0) -> Tensor:
    """Random sentences that end in EOS_ID, padded."""
    g = torch.Generator().manual_seed(seed)
    rows = torch.full((len(lengths), max(lengths, default=1)), PAD_ID)
    for row, n in zip(rows, lengths, strict=True):
        row[: n - 1] = torch.randint(4, vocab, (n - 1,), generator=g)
        row[n - 1] = EOS_ID
    return rows


def close(fast: Any, slow: Any, tolerance: float = 1e-10) -> None:
    assert fast.ids == slow.ids
    for a, b in zip(fast.scores, slow.scores, strict=True):
        assert a == pytest.approx(b, abs=tolerance)
