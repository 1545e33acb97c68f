"""The cache of a decoder: keys and values of the positions that it has read, by sentence."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor

import core


@dataclass(frozen=True)
class Memory:
    """B source sentences as the decoder reads them.

    Attributes:
        x_BSD: (B, S, D), the encoder's output.
        valid_BS: bool (B, S), True for non-padding tokens.
        task_ids_B, domain_ids_B: int64 (B,), the ids that the routers were given; or None.
        ids_BS: int64 (B, S), the source's own ids; None: it has none.
    """

    x_BSD: Tensor
    valid_BS: Tensor
    task_ids_B: Tensor | None = None
    domain_ids_B: Tensor | None = None
    ids_BS: Tensor | None = None

    def __len__(self) -> int:
        return len(self.x_BSD)


class Cache:
    """Keys and values of R rows in groups of K copies: row ``n * K + k`` is copy k of sentence n.

    A sentence's copies share the cached keys and values of its source, and the *slots* of the tokens they have read
    themselves: a key stays in its slot as long as any copy continues from it, and its slot is freed when none does.
    Copies of a beam search descend from the same row a few positions back, so there are far fewer slots than K times
    the positions (with a beam of 5 at the 16th, 27 on average for 80). Each copy attends to all of them, and a mask
    hides the keys that are not its own past: matmuls are few and wide, and reordering the copies moves a table of small
    numbers and no keys. Keys move when a sentence leaves.

    Tried instead: a place for each copy at each position, of which most are hidden, takes 8 % more of a whole search
    at D = 128, V = 8,000; a cache for each row, of which copies are made, up to a quarter more on top.

    Attributes:
        length: T, positions kept.
        copies: K.
        extent: S, slots that are read: up to the last one in use by any sentence.
        task_ids_R, domain_ids_R: int64 (R,), for the routers; or None.
        relative_HT: biases by distance, the newest position last; for T positions and more, kept by the stack.
        store: (layers, 2, N * Hkv, capacity, d), keys and values of the N sentences' slots.
        memory: (layers, 2, N, Hkv, S, d), keys and values of the source sentences; None in a language model.
        memory_bias: (N * Hkv, 1, S), hides their padding; None if there is none.
        source: the N source sentences, for a read-out that copies from them; None: it does not.
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
        source: Memory | None = None,
    ) -> None:
        self.source = source
        self.store, self.memory, self.memory_bias = store, memory, memory_bias
        self.num_kv_heads, self.group, self.copies = num_kv_heads, group, 1
        self.task_ids_R, self.domain_ids_R = task_ids_R, domain_ids_R
        self.length = self.extent = self._most = 0
        self.relative_HT: Tensor | None = None
        # By layer, the slots whose keys its tokens do not see, (N, capacity): of tokens that passed by the layer.
        self._hidden_NS: dict[int, Tensor] = {}
        # The slot of each position of a row's past. With one copy a sentence it is the position.
        self._slot_NKT = torch.zeros(self.num_sentences, 1, store.shape[3], dtype=torch.int64, device=store.device)
        self._place: tuple[Tensor, Tensor, Tensor] | None = None

    @property
    def num_sentences(self) -> int:
        """N."""
        return self.store.shape[2] // self.num_kv_heads

    def __len__(self) -> int:
        """R, the rows."""
        return self.num_sentences * self.copies

    def append(self) -> None:
        """Give a slot to one more position of each row, which ``write`` writes layer by layer."""
        N, Hkv, K, device = self.num_sentences, self.num_kv_heads, self.copies, self.store.device
        if self.length == self._slot_NKT.shape[2]:
            self._slot_NKT = F.pad(self._slot_NKT, (0, max(self.length, 1)))
        slot_NK = self._slot_NKT[:, :, self.length]
        if K == 1 or not N:
            slot_NK.fill_(self.length)
            self.extent = self.length + 1
        else:
            free_NK = self._free_slots()
            slot_NK.copy_(free_NK)
            if has_numbers(free_NK):
                self.extent = int(self._slot_NKT[:, :, : self.length + 1].max()) + 1
            else:
                self.extent += K  # no slot is further away
        self._most = max(self._most, self.extent)
        if self.extent > self.store.shape[3]:
            more = max(self.extent - self.store.shape[3], self.store.shape[3] // 2)
            shape = self.store.shape
            self.store = torch.cat((self.store, self.store.new_zeros(*shape[:3], more, shape[4])), dim=3)
        head_NK1H = torch.arange(N * Hkv, device=device).view(N, 1, 1, Hkv).expand(N, K, 1, Hkv)
        self._place = (torch.arange(2, device=device)[:, None], head_NK1H.flatten(0, 1), slot_NK.reshape(-1, 1, 1))

    def _free_slots(self) -> Tensor:
        """Return the first slots of each sentence, (N, K), that none of its copies continues from."""
        N, K = self.num_sentences, self.copies
        used_NS = torch.zeros(N, self.extent + K, dtype=torch.bool, device=self.store.device)
        used_NS.scatter_(1, self._slot_NKT[:, :, : self.length].flatten(1), True)
        wanted_K = torch.arange(1, K + 1, device=self.store.device)
        return torch.searchsorted((~used_NS).cumsum(1), wanted_K.expand(N, K).contiguous())

    def write(self, layer: int, new_R2Hd: Tensor) -> tuple[Tensor, Tensor]:
        """Write keys and values of each row's newest position, for which ``append`` has found a slot.

        Returns:
            keys and values of all slots, (N * Hkv, S, d) each.
        """
        store = self.store[layer]
        store[self._place] = new_R2Hd.to(store.dtype)
        keys, values = store[:, :, : self.extent]
        return keys, values

    def clear(self, layer: int) -> None:
        """Write zeros over keys and values that nobody reads: later matmuls multiply them by 0, and fresh memory may
        hold NaN."""
        self.store[layer][self._place] = 0.0

    def self_bias(self, dtype: torch.dtype) -> Tensor | None:
        """Return the bias of the scores of the newest position, which ``append`` has made: (N * Hkv, G * K, S),
        in the dtype of the matmuls."""
        K, T, S = self.copies, self.length + 1, self.extent
        Hkv, G, N = self.num_kv_heads, self.group, self.num_sentences
        relative_HT = None if self.relative_HT is None else self.relative_HT[:, -T:].to(dtype)
        if K == 1:
            return None if relative_HT is None else relative_HT.reshape(Hkv, G, T).repeat(N, 1, 1)
        H = 1 if relative_HT is None else Hkv * G
        seen_NHKT = self._slot_NKT[:, None, :, :T].expand(N, H, K, T)
        bias_NHKS = self.store.new_full((N, H, K, S), torch.finfo(dtype).min, dtype=dtype)
        if relative_HT is None:
            bias_NHKS.scatter_(3, seen_NHKT, 0.0)
        else:
            bias_NHKS.scatter_(3, seen_NHKT, relative_HT[:, None].expand(N, H, K, T))
        return bias_NHKS.expand(N, Hkv * G, K, S).reshape(N * Hkv, G * K, S)

    def hide(self, layer: int, hidden_R: Tensor) -> None:
        """Say for each row whether the key of its newest position is hidden from later ones, in one layer."""
        N, size = self.num_sentences, self.store.shape[3]
        kept_NS = self._hidden_NS.get(layer)
        if kept_NS is None or kept_NS.shape[1] < size:
            grown_NS = torch.zeros(N, size, dtype=torch.bool, device=self.store.device)
            if kept_NS is not None:
                grown_NS[:, : kept_NS.shape[1]] = kept_NS
            self._hidden_NS[layer] = kept_NS = grown_NS
        kept_NS.scatter_(1, self._slot_NKT[:, :, self.length], hidden_R.view(N, self.copies))

    def bias_in(self, layer: int, bias: Tensor | None, dtype: torch.dtype) -> Tensor | None:
        """Return ``self_bias`` with the keys hidden that one layer does not see."""
        if layer not in self._hidden_NS:
            return bias
        hidden_NS = self._hidden_NS[layer][:, : self.extent]
        hidden_N1S = hidden_NS.repeat_interleave(self.num_kv_heads, 0)[:, None]
        if bias is None:
            bias = self.store.new_zeros(hidden_N1S.shape, dtype=dtype)
        return bias.masked_fill(hidden_N1S, torch.finfo(dtype).min)

    def select(self, index: Tensor) -> Cache:
        """Keep these rows, in this order: row r continues from row ``index[r]``. Changes the cache, and returns it.

        It is cheaper if no sentence leaves: no key moves.

        Args:
            index: int64 (N' * K,), in groups of K rows of one sentence each, as a beam search reorders them.
        """
        row_NK = index.view(-1, self.copies)
        sentence_N = row_NK[:, 0] // self.copies
        self._slot_NKT = self._slot_NKT[sentence_N[:, None], row_NK % self.copies]
        kept = sentence_N.tolist()
        if kept != list(range(self.num_sentences)):
            self._select_sentences(sentence_N, kept)
        return self

    def expand(self, copies: int) -> Cache:
        """Repeat each row ``copies`` times, side by side, with one past. Changes the cache, and returns it.

        Args:
            copies: from here on; there is one per sentence so far.
        """
        if self.copies != 1:
            raise ValueError(f"the cache has {self.copies} copies of a sentence already: only one can be expanded")
        if copies < 1:
            raise ValueError(f"copies={copies} must be at least 1")
        self.copies = copies
        # Some sentences will have more slots in use than others, which read as many, with weight 0.
        self.store[:, :, :, self.length :] = 0.0
        self._slot_NKT = self._slot_NKT.expand(-1, copies, -1).clone()
        if self.task_ids_R is not None:
            self.task_ids_R = self.task_ids_R.repeat_interleave(copies)
        if self.domain_ids_R is not None:
            self.domain_ids_R = self.domain_ids_R.repeat_interleave(copies)
        return self

    def _select_sentences(self, sentence_N: Tensor, kept: list[int]) -> None:
        N, Hkv = self.num_sentences, self.num_kv_heads
        row_NK = sentence_N[:, None] * self.copies + torch.arange(self.copies, device=sentence_N.device)
        store = self.store.unflatten(2, (N, Hkv))
        if store.device.type == "cpu" and all(to == of or of >= len(kept) for to, of in enumerate(kept)):
            # The last ones fill the gaps, in place: fresh memory costs more than the copy. At D = 512 and 6 layers, 32
            # sentences of 5 copies and 20 positions take 10 ms of one core in old pages, and 43 ms in new ones.
            for to, of in enumerate(kept):
                if to != of:
                    store[:, :, to, :, : self.extent] = store[:, :, of, :, : self.extent]
                    store[:, :, to, :, self.extent : self._most] = 0.0  # the old values need not be finite
                    if self.memory is not None:
                        self.memory[:, :, to] = self.memory[:, :, of]
            store = store[:, :, : len(kept)]
            self.memory = None if self.memory is None else self.memory[:, :, : len(kept)]
        else:
            store = store.index_select(2, sentence_N)
            self.memory = None if self.memory is None else self.memory.index_select(2, sentence_N)
        self.store = store.flatten(2, 3)
        if self.source is not None and self.source.ids_BS is not None:
            own = (self.source.x_BSD, self.source.valid_BS, self.source.ids_BS)
            x_NSD, valid_NS, ids_NS = (part.index_select(0, sentence_N) for part in own)
            self.source = Memory(x_NSD, valid_NS, ids_BS=ids_NS)
        self._hidden_NS = {layer: of.index_select(0, sentence_N) for layer, of in self._hidden_NS.items()}
        if self.memory_bias is not None:
            assert self.memory is not None
            # Attention experts may have other numbers of heads than the cross-attention.
            of_sentences = self.memory_bias.unflatten(0, (N, self.memory.shape[3]))
            self.memory_bias = of_sentences.index_select(0, sentence_N).flatten(0, 1)
        self.task_ids_R = _select(self.task_ids_R, row_NK.flatten())
        self.domain_ids_R = _select(self.domain_ids_R, row_NK.flatten())


@dataclass(frozen=True)
class Step:
    """The inputs that all layers of a stack share as they map the next position of R rows.

    Attributes:
        cache: keeps keys and values of this position too, in the slots that ``append`` chose.
        context: routing context of the (R, 1) tokens.
        bias: ``cache.self_bias``.
        rotations: of this position, if positions are rotary.
    """

    cache: Cache
    context: core.RoutingContext
    bias: Tensor | None = None
    rotations: Tensor | None = None


def has_numbers(tensor: Tensor) -> bool:
    """Return whether values can be read here: a fake tensor has none, and a compiled graph must not depend on them."""
    return type(tensor) is Tensor and not torch.compiler.is_compiling()


def _select(value_B: Tensor | None, index: Tensor) -> Tensor | None:
    return None if value_B is None else value_B.index_select(0, index)
