"""What a decoder keeps from step to step, and of which sentence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor


@dataclass(frozen=True)
class Memory:
    """What the decoder knows of B source sentences.

    Attributes:
        x_BSD: (B, S, D), the encoder's output.
        valid_BS: bool (B, S), True for real tokens.
        task_ids_B, domain_ids_B: int64 (B,), what the routers were told; or None.
    """

    x_BSD: Tensor
    valid_BS: Tensor
    task_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_BSD)

    def select(self, index: Tensor) -> Memory:
        """The memory of these sentences, in this order; one may come twice."""
        return Memory(
            self.x_BSD.index_select(0, index),
            self.valid_BS.index_select(0, index),
            _select(self.task_ids_B, index),
            _select(self.domain_ids_B, index),
        )

    def repeat(self, copies: int) -> Memory:
        """Each sentence ``copies`` times, its copies side by side."""
        return self.select(torch.arange(len(self), device=self.x_BSD.device).repeat_interleave(copies))


class Cache:
    """Keys and values of R rows, which stand in groups of K copies: row ``n * K + k`` is copy k of sentence n.

    A sentence's copies share what is kept of it. Its K newest keys lie side by side, each copy attends to all that the
    K have written, and a mask hides those that are not its own past. So reordering the copies of a sentence moves a
    table of small numbers and no keys; the wider product costs less than moving them (figures in ``attention``).
    Keys move when a sentence leaves.

    Attributes:
        length: T, positions kept.
        copies: K.
        task_ids_R, domain_ids_R: int64 (R,), for the routers; or None.
        store: (layers, 2, N * Hkv, capacity, K, d), keys and values of the N sentences' rows.
        memory: (layers, 2, N, Hkv, S, d), keys and values of the source sentences; None in a language model.
        memory_bias: (N * Hkv, 1, S), hides their padding; None where there is none.
    """

    def __init__(
        self,
        store: Tensor,
        num_kv_heads: int,
        group: int,
        *,
        memory: Tensor | None = None,
        memory_bias: Tensor | None = None,
        task_ids_R: Tensor | None = None,
        domain_ids_R: Tensor | None = None,
    ) -> None:
        self.store, self.memory, self.memory_bias = store, memory, memory_bias
        self.num_kv_heads, self.group = num_kv_heads, group
        self.task_ids_R, self.domain_ids_R = task_ids_R, domain_ids_R
        self.length, self.copies = 0, store.shape[4]
        # Which copy's key of each position is the row's own past.
        self._copy = torch.arange(self.copies, device=store.device)
        self._past_NKT = self._copy.new_zeros(self.num_sentences, self.copies, store.shape[3])

    @property
    def num_sentences(self) -> int:
        """N."""
        return self.store.shape[2] // self.num_kv_heads

    def __len__(self) -> int:
        """R, the rows."""
        return self.num_sentences * self.copies

    def append(self) -> None:
        """Make room for one more position, which each row writes for itself."""
        if self.length == self.store.shape[3]:
            more = max(self.length, 1)
            shape = self.store.shape
            self.store = torch.cat((self.store, self.store.new_empty(*shape[:3], more, *shape[4:])), dim=3)
            shape = self._past_NKT.shape
            self._past_NKT = torch.cat((self._past_NKT, self._past_NKT.new_zeros(*shape[:2], more)), dim=2)
        self._past_NKT[:, :, self.length] = self._copy

    def self_bias(self, relative_HT: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """What is added to the scores of the newest position, which ``append`` has made: (N * Hkv or 1, G * K, T * K).

        Args:
            relative_HT: biases by distance of the T positions; or None.
            dtype: of the products.
        """
        K, T = self.copies, self.length + 1
        Hkv, G, N = self.num_kv_heads, self.group, self.num_sentences
        if relative_HT is not None:
            relative = relative_HT.to(dtype).view(1, Hkv, G, 1, T, 1)
            if K == 1:
                return relative.expand(N, Hkv, G, 1, T, 1).reshape(N * Hkv, G, T)
        elif K == 1:
            return None
        foreign_NKTK = self._past_NKT[:, :, :T, None] != self._copy
        hidden = torch.finfo(dtype).min
        if relative_HT is None:
            bias = self.store.new_zeros(1, 1, 1, 1, 1, 1, dtype=dtype)
        else:
            bias = relative
        bias = bias.masked_fill(foreign_NKTK[:, None, None], hidden)
        return bias.expand(N, Hkv, G, K, T, K).reshape(N * Hkv, G * K, T * K)

    def select(self, index: Tensor) -> Cache:
        """Keep these rows, in this order: row r goes on from row ``index[r]``. Changes the cache, and returns it.

        Cheapest where rows come in groups of K, each from one sentence, as a beam search reorders them; cheaper yet
        where no sentence leaves. Other choices are allowed, and undo the sharing: then K is 1.

        Args:
            index: int64 (R',).
        """
        K = self.copies
        if index.numel() % K == 0:
            rows_NK = index.view(-1, K)
            sentence_NK = rows_NK // K
            sentence_N = sentence_NK[:, 0]
            if K == 1 or bool((sentence_NK == sentence_N[:, None]).all()):
                self._select_groups(sentence_N, rows_NK - sentence_NK * K)
                return self
        self._select_rows(index)
        return self

    def _select_groups(self, sentence_N: Tensor, copy_NK: Tensor) -> None:
        self._past_NKT = self._past_NKT[sentence_N[:, None], copy_NK]
        N = self.num_sentences
        stays = len(sentence_N) == N and bool((sentence_N == torch.arange(N, device=sentence_N.device)).all())
        if not stays:
            self._select_sentences(sentence_N)

    def _select_sentences(self, sentence_N: Tensor) -> None:
        T, Hkv = self.length, self.num_kv_heads
        kept = self.store.unflatten(2, (-1, Hkv))[:, :, :, :, :T].index_select(2, sentence_N).flatten(2, 3)
        self.store = kept
        self._past_NKT = self._past_NKT[:, :, :T]
        if self.memory is not None:
            self.memory = self.memory.index_select(2, sentence_N)
        if self.memory_bias is not None:
            bias = self.memory_bias.unflatten(0, (-1, Hkv)).index_select(0, sentence_N)
            self.memory_bias = bias.flatten(0, 1)
        row_NK = sentence_N[:, None] * self.copies + self._copy
        self.task_ids_R = _select(self.task_ids_R, row_NK.flatten())
        self.domain_ids_R = _select(self.domain_ids_R, row_NK.flatten())

    def _select_rows(self, index: Tensor) -> None:
        """Each row by itself from now on: a sentence of one copy."""
        T, Hkv, K = self.length, self.num_kv_heads, self.copies
        sentence_R, copy_R = index // K, index % K
        past_RT = self._past_NKT[sentence_R, copy_R, :T]
        rows = self.store.unflatten(2, (-1, Hkv))[:, :, :, :, :T].index_select(2, sentence_R)
        own = past_RT.view(1, 1, -1, 1, T, 1, 1).expand(*rows.shape[:5], 1, rows.shape[6])
        self.store = rows.gather(5, own).flatten(2, 3)
        if self.memory is not None:
            self.memory = self.memory.index_select(2, sentence_R)
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias.unflatten(0, (-1, Hkv)).index_select(0, sentence_R).flatten(0, 1)
        self.task_ids_R, self.domain_ids_R = _select(self.task_ids_R, index), _select(self.domain_ids_R, index)
        self.copies, self._copy = 1, self._copy[:1]
        self._past_NKT = torch.zeros_like(past_RT).unsqueeze(1)


def _select(value_B: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value_B is None else value_B.index_select(0, index)
