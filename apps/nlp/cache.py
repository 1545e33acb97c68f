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


class Cache:
    """Keys and values of R rows, which stand in groups of K copies: row ``n * K + k`` is copy k of sentence n.

    A sentence's copies share what is kept of its source. What they have read themselves lies side by side, position by
    position: each copy attends to all that the K have written, and a mask hides what is not its own past. So reordering
    the copies of a sentence moves a table of small numbers and no keys, and its products are few and wide. Keys move
    when a sentence leaves.

    Tried instead: rows by themselves, of which only those were copied whose past another row goes on from too. With 32
    sentences of 5 copies, half of the rows with random parents, decoding took one core, for 12, 20 and 40 positions,
    163, 272, 601 ms against 131, 222, 559 ms at D = 128 and 4 layers, and as long as this at D = 512 and 6 layers
    (1.5, 2.5, 5.3 s). Moving all rows at each step would add 1 ms of 12 at 20 positions (7.5 ms of 125).

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
            rows_NK = index.view(len(index) // K, K)
            sentence_NK = rows_NK // K
            sentence_N = sentence_NK[:, 0]
            if K == 1 or bool((sentence_NK == sentence_N[:, None]).all()):
                self._select_groups(sentence_N, rows_NK - sentence_NK * K)
                return self
        self._select_rows(index)
        return self

    def expand(self, copies: int) -> Cache:
        """Each row ``copies`` times, side by side: what was read once for all of them. Changes the cache, returns it.

        Args:
            copies: from here on; there is one a sentence so far.
        """
        if self.copies != 1:
            raise ValueError(f"the cache has {self.copies} copies of a sentence already: only one can be expanded")
        if copies < 1:
            raise ValueError(f"copies={copies} must be at least 1")
        *sizes, _, width = self.store.shape
        store = self.store.new_empty(*sizes, copies, width)
        # All of them come from copy 0, and what the others would have written is not read but as 0 times it.
        store[:, :, :, : self.length] = self.store[:, :, :, : self.length]
        self.store, self.copies = store, copies
        self._copy = torch.arange(copies, device=store.device)
        self._past_NKT = self._past_NKT.expand(-1, copies, -1).clone()
        if self.task_ids_R is not None:
            self.task_ids_R = self.task_ids_R.repeat_interleave(copies)
        if self.domain_ids_R is not None:
            self.domain_ids_R = self.domain_ids_R.repeat_interleave(copies)
        return self

    def _select_groups(self, sentence_N: Tensor, copy_NK: Tensor) -> None:
        self._past_NKT = self._past_NKT[sentence_N[:, None], copy_NK]
        kept = sentence_N.tolist()
        if kept != list(range(self.num_sentences)):
            self._select_sentences(sentence_N, kept)

    def _select_sentences(self, sentence_N: Tensor, kept: list[int]) -> None:
        N, Hkv = self.num_sentences, self.num_kv_heads
        row_NK = sentence_N[:, None] * self.copies + self._copy
        store = self.store.unflatten(2, (N, Hkv))
        if store.device.type == "cpu" and all(to == of or of >= len(kept) for to, of in enumerate(kept)):
            # The last ones fill the gaps, in place: fresh memory costs more than the copy. At D = 512 and 6 layers, 32
            # sentences of 5 copies and 20 positions take 10 ms of one core in old pages, and 43 ms in new ones.
            for to, of in enumerate(kept):
                if to != of:
                    store[:, :, to, :, : self.length] = store[:, :, of, :, : self.length]
                    if self.memory is not None:
                        self.memory[:, :, to] = self.memory[:, :, of]
            store = store[:, :, : len(kept)]
            self.memory = None if self.memory is None else self.memory[:, :, : len(kept)]
        else:
            store = store.index_select(2, sentence_N)
            self.memory = None if self.memory is None else self.memory.index_select(2, sentence_N)
        self.store = store.flatten(2, 3)
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias.unflatten(0, (N, Hkv)).index_select(0, sentence_N).flatten(0, 1)
        self.task_ids_R = _select(self.task_ids_R, row_NK.flatten())
        self.domain_ids_R = _select(self.domain_ids_R, row_NK.flatten())

    def _select_rows(self, index: Tensor) -> None:
        """Each row by itself from now on: a sentence of one copy."""
        T, K, N, Hkv = self.length, self.copies, self.num_sentences, self.num_kv_heads
        sentence_R, copy_R = index // K, index % K
        past_RT = self._past_NKT[sentence_R, copy_R, :T]
        rows = self.store.unflatten(2, (N, Hkv))[:, :, :, :, :T].index_select(2, sentence_R)
        own = past_RT.view(1, 1, len(index), 1, T, 1, 1).expand(*rows.shape[:5], 1, rows.shape[6])
        self.store = rows.gather(5, own).flatten(2, 3)
        if self.memory is not None:
            self.memory = self.memory.index_select(2, sentence_R)
        if self.memory_bias is not None:
            self.memory_bias = self.memory_bias.unflatten(0, (N, Hkv)).index_select(0, sentence_R).flatten(0, 1)
        self.task_ids_R, self.domain_ids_R = _select(self.task_ids_R, index), _select(self.domain_ids_R, index)
        self.copies, self._copy = 1, self._copy[:1]
        self._past_NKT = torch.zeros_like(past_RT).unsqueeze(1)


def _select(value_B: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value_B is None else value_B.index_select(0, index)
