"""Attention of a whole sequence, and of one position whose keys and values are kept."""

from __future__ import annotations

from dataclasses import dataclass

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Step
from apps.nets.norms import RMSNorm
from apps.nets.packing import Packing
from apps.nets.past import Past
from apps.nets.positions import rotate
from core.kernels import cpu, outside_autocast


@dataclass(frozen=True)
class Mask:
    """A bias that is added to the attention scores, made once for all layers of a stack.

    Attributes:
        bias: (N, L, S), N = batch x heads, in the dtype of the matmuls; each of N and L may be 1. None: nothing.
        causal: a query sees the keys up to its own position, which ``bias`` does not say.
    """

    bias: Tensor | None = None
    causal: bool = False

    def of_tokens(self, index_BC: Tensor, real_BC: Tensor | None, num_heads: int) -> Mask:
        """Return the mask of some tokens of each sequence among themselves.

        Args:
            index_BC: int64 (B, C), their places, the real ones first and in ascending order.
            real_BC: bool (B, C), False for places that nobody may see; None: all are real.
            num_heads: H.
        """
        if self.bias is None:
            assert self.causal or real_BC is None
            return self  # a causal query sees nothing after it
        B = len(index_BC)
        query, key = index_BC[:, None, :, None], index_BC[:, None, None, :]
        if self.bias.shape[0] == 1:
            bias_BHCC = self.bias[0][query, key]
        else:
            bias_BHLL = self.bias.unflatten(0, (B, num_heads))
            b = torch.arange(B, device=key.device)[:, None, None, None]
            h = torch.arange(num_heads, device=key.device)[:, None, None]
            bias_BHCC = bias_BHLL[b, h, query, key]
        if real_BC is not None:
            bias_BHCC = bias_BHCC.masked_fill(~real_BC[:, None, None], hidden_score(bias_BHCC.dtype))
        return Mask(bias_BHCC.expand(B, num_heads, -1, -1).flatten(0, 1))

    def hiding(self, hidden_BS: Tensor, num_heads: int) -> Mask:
        """Return the mask that hides some keys as well, bool (B, S), from all queries of ``num_heads`` heads."""
        assert self.bias is not None
        hidden_N1S = hidden_BS.repeat_interleave(num_heads, 0).unsqueeze(1)
        return Mask(self.bias.masked_fill(hidden_N1S, hidden_score(self.bias.dtype)))


def hidden_score(dtype: torch.dtype) -> float:
    """Return the score that hides a key: not -inf, or a sentence of only padding would become NaN."""
    return torch.finfo(dtype).min


def product_dtype(x: Tensor) -> torch.dtype:
    """Return the dtype of matmuls with ``x``, which autocast may change."""
    kind = x.device.type
    if x.is_meta or x.dtype == torch.float64:  # autocast does not know the meta device
        return x.dtype
    return torch.get_autocast_dtype(kind) if torch.is_autocast_enabled(kind) else x.dtype


def padding_mask(valid_BS: Tensor, num_heads: int, like: Tensor) -> Mask:
    """Return the mask that hides the padding of the keys from all queries."""
    dtype = product_dtype(like)
    bias_BS = torch.zeros(valid_BS.shape, dtype=dtype, device=like.device)
    bias_BS = bias_BS.masked_fill(~valid_BS, hidden_score(dtype))
    return Mask(bias_BS.repeat_interleave(num_heads, 0).unsqueeze(1))


def self_mask(
    like_BLD: Tensor,
    num_heads: int,
    *,
    valid_BL: Tensor | None,
    causal: bool,
    relative_HLL: Tensor | None,
    past: int | None = None,
) -> Mask:
    """Return the mask of a stack's self-attention, (L, S) for L queries and S keys.

    Args:
        like_BLD: the stack's input.
        num_heads: H.
        valid_BL: bool, False for keys that no query may see; None: all may be seen.
        causal: a query sees the keys up to its own position.
        relative_HLL: biases by distance, (H, L, S).
        past: keys that precede the input's own, of which there are L more; None: there are none.
    """
    B, L, _ = like_BLD.shape
    if relative_HLL is None and not causal:
        return Mask() if valid_BL is None else padding_mask(valid_BL, num_heads, like_BLD)
    if relative_HLL is None and valid_BL is None and past is None and (like_BLD.is_cuda or like_BLD.is_meta):
        return Mask(causal=True)
    dtype = product_dtype(like_BLD)
    bias = like_BLD.new_zeros(1, 1, 1, 1, dtype=dtype) if relative_HLL is None else relative_HLL.to(dtype)[None]
    if causal:
        place_S = torch.arange(L + (past or 0), device=like_BLD.device)
        bias = bias.masked_fill(place_S > place_S[past or 0 :, None], hidden_score(dtype))
    if valid_BL is not None:
        bias = bias.masked_fill(~valid_BL[:, None, None], hidden_score(dtype))
    if bias.shape[:2] != (1, 1):
        bias = bias.expand(B, num_heads, -1, -1)
    return Mask(bias.flatten(0, 1))


def attention_scores(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return ``scale q k^T + bias`` of (N, L, d) queries and (N, S, d) keys: (N, L, S)."""
    bias = mask.bias
    if mask.causal:
        bias = q.new_full((q.shape[1], q.shape[1]), hidden_score(q.dtype)).triu(1)
    if bias is None:
        return torch.bmm(q * scale, k.transpose(1, 2))
    return torch.baddbmm(bias, q, k.transpose(1, 2), alpha=scale)


_FEW_KEYS = 32
"""Up to so many keys the softmax of half precision takes a CPU longer than that of float32 and two casts; inside torch
computes both in float32. Forward and backward of 256 x L x L scores in bfloat16 on one thread take 1.65 ms at L=24, by
float32 0.41; at L=64 they take 1.5 ms, by float32 30."""


def attention_weights(q: Tensor, k: Tensor, mask: Mask, scale: float) -> Tensor:
    """Return ``softmax(scale q k^T + bias)`` of (N, L, d) queries and (N, S, d) keys: (N, L, S)."""
    scores = attention_scores(q, k, mask, scale)
    if scores.dtype in (torch.float32, torch.float64) or scores.shape[-1] > _FEW_KEYS:
        return scores.softmax(-1)
    return scores.softmax(-1, dtype=torch.float32).to(scores.dtype)


def attend(
    q: Tensor, k: Tensor, v: Tensor, mask: Mask, scale: float, dropout: float = 0.0, *, fused: bool = True
) -> Tensor:
    """Return ``softmax(scale q k^T + bias) v`` of (B, H, L, d) queries, (B, H, S, d) keys and values.

    With ``fused=False`` a CPU uses explicit matmuls.
    """
    B, H, L, d = q.shape
    with outside_autocast(q.device):
        if q.is_cuda or q.is_meta or (fused and _is_fused(q, k, mask, dropout)):
            bias = mask.bias
            if bias is not None:
                bias = bias.unsqueeze(0) if bias.shape[0] == 1 else bias.unflatten(0, (B, H))
                bias = bias.expand(B, H, L, k.shape[2])
            return F.scaled_dot_product_attention(
                q, k, v, attn_mask=bias, dropout_p=dropout, is_causal=mask.causal, scale=scale
            )
        q, k, v = (x.reshape(B * H, x.shape[2], d) for x in (q, k, v))
        weights = attention_weights(q, k, mask, scale)
        if dropout:
            weights = F.dropout(weights, dropout)
        return torch.bmm(weights, v).view(B, H, L, d)


_FEW_SCORES = 2**17
"""Up to so many scores explicit products are faster on a CPU without gradients. At B=32, H=4, d=32 on two threads, 16
and 33 positions take 76 and 226 us, by fused attention 218 and 376; 40 positions of twice as many 2.4 ms, fused 1.3."""


def _is_fused(q: Tensor, k: Tensor, mask: Mask, dropout: float) -> bool:
    """Return whether torch's fused attention is the faster one on a CPU.

    In bfloat16 it is not: forward and backward at B=64, H=4, d=32 and 16, 24, 40 positions took 10.4, 12.4,
    24.2 ms of one core, and explicit matmuls 1.0, 1.6, 3.3 ms. In float32 it was 3.1, 5.4, 12.2 ms against 3.0, 6.8,
    9.7 ms, and it keeps no weights, which long texts feel. Without gradients it is slower up to ``_FEW_SCORES``. If it
    would fall back on explicit matmuls of its own, so do we.
    """
    learned = mask.bias is not None and mask.bias.requires_grad
    # A compiled graph must not depend on how many there are.
    if not torch.is_grad_enabled() and not torch.compiler.is_compiling():
        B, H, L, _ = q.shape
        if B * H * L * k.shape[2] <= _FEW_SCORES:
            return False
    return q.dtype in (torch.float32, torch.float64) and not learned and not dropout


class _Attention(nn.Module):
    """The base of self- and cross-attention: sizes, and the way to heads and back."""

    def __init__(self, config: TransformerConfig, *, project: bool = True, fused: bool = True) -> None:
        super().__init__()
        shape, self.fused = config.shape, fused
        self.num_heads, self.num_kv_heads, self.head_dim = shape.num_heads, shape.num_kv_heads, shape.head_dim
        self.group, self.scale, self.dropout = shape.group, config.score_scale, config.attn_dropout
        out = cpu.Linear(shape.num_heads * shape.head_dim, shape.dim, bias=config.bias) if project else nn.Identity()
        self.out: nn.Module = out

    def reset_heads(self) -> None:
        """Start queries, keys and values Xavier-uniform, each at ``1 / sqrt(2)`` of the usual scale."""
        for weight in self._projections():
            nn.init.xavier_uniform_(weight, gain=2**-0.5)

    def _projections(self) -> list[Tensor]:
        """Return the (H * d, D) parts of the weights for queries, keys, values."""
        raise NotImplementedError

    def _for_queries(self, x_BHSd: Tensor) -> Tensor:
        """Return keys or values by head, (B, H, S, d), each repeated for the queries that share it."""
        return x_BHSd if self.group == 1 else x_BHSd.repeat_interleave(self.group, 1)

    def _attend(self, q: Tensor, k: Tensor, v: Tensor, mask: Mask) -> Tensor:
        """Return the values that the queries attend to, (B, L, H * d)."""
        dropout = self.dropout if self.training else 0.0
        return attend(q, k, v, mask, self.scale, dropout, fused=self.fused).transpose(1, 2).flatten(2)

    def _step(self, q_RC: Tensor, keys: Tensor, values: Tensor, copies: int, bias: Tensor | None) -> Tensor:
        """Attend from one query of each row to the keys of its group of rows.

        Args:
            q_RC: (R, H * d) queries.
            keys, values: (N * Hkv, S, d), N groups of rows.
            copies: K, rows of a group.
            bias: as in ``Mask``, by key-value head; a group's queries are its query heads x its rows.

        Returns:
            (R, D).
        """
        R, K = len(q_RC), copies
        N, Hkv, G, d = R // K, self.num_kv_heads, self.group, self.head_dim
        q = q_RC.view(N, K, Hkv, G, d).permute(0, 2, 3, 1, 4).reshape(N * Hkv, G * K, d)
        y = torch.bmm(attention_weights(q, keys, Mask(bias), self.scale), values)
        y_RC = y.view(N, Hkv, G, K, d).permute(0, 3, 1, 2, 4).reshape(R, Hkv * G * d)
        return self.out(y_RC)


class SelfAttention(_Attention):
    """Multi-head attention of a sequence to itself; ``num_kv_heads`` may be fewer than the queries'.

    Args:
        config: the transformer.
        project: an output projection follows; False: the output is the concatenated output of the heads.
        fused: a CPU may take torch's fused attention; see ``attend``.
    """

    def __init__(self, config: TransformerConfig, *, project: bool = True, fused: bool = True) -> None:
        super().__init__(config, project=project, fused=fused)
        d = self.head_dim
        width = (self.num_heads + 2 * self.num_kv_heads) * d
        self.qkv = cpu.Linear(config.shape.dim, width, bias=config.has_qkv_bias)
        self.q_norm, self.k_norm = (
            None if config.qk_norm == "none" else RMSNorm(d if config.qk_norm == "head" else heads * d, config.norm_eps)
            for heads in (self.num_heads, self.num_kv_heads)
        )

    def _projections(self) -> list[Tensor]:
        H, Hkv, d = self.num_heads, self.num_kv_heads, self.head_dim
        return list(self.qkv.weight.split((H * d, Hkv * d, Hkv * d)))

    def _heads(
        self, x: Tensor, rotations: Tensor | None, packing: Packing | None = None, seen: Tensor | None = None
    ) -> tuple[Tensor, Tensor, Tensor]:
        """Return queries, keys and values of (B, L, D) tokens, each (B, L, heads, d)."""
        H, Hkv = self.num_heads, self.num_kv_heads
        qkv = self.qkv(x) if seen is None else self._products(x, seen)
        qkv = qkv if packing is None else packing.pad(qkv)
        heads = qkv.unflatten(-1, (H + 2 * Hkv, self.head_dim))
        qk, v = heads.split((H + Hkv, Hkv), dim=-2)
        if self.q_norm is not None and self.k_norm is not None:
            q, k = qk.split((H, Hkv), dim=-2)
            qk = torch.cat((_normed(self.q_norm, q), _normed(self.k_norm, k)), dim=-2)
        if rotations is not None:
            qk = rotate(qk, rotations.to(qk.dtype))
        q, k = qk.split((H, Hkv), dim=-2)
        return q, k, v

    def _products(self, x: Tensor, seen: Tensor) -> Tensor:
        """Return the queries of ``x`` and the keys and values of ``seen``."""
        sizes = (self.num_heads * self.head_dim, 2 * self.num_kv_heads * self.head_dim)
        biases = (None, None) if self.qkv.bias is None else self.qkv.bias.split(sizes)
        each = zip((x, seen), self.qkv.weight.split(sizes), biases, strict=True)
        return torch.cat([cpu.linear(tokens, weight, bias) for tokens, weight, bias in each], -1)

    def forward(
        self,
        x: Tensor,
        mask: Mask,
        rotations: Tensor | None = None,
        packing: Packing | None = None,
        seen: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D), or with ``packing`` (T, D) to (T, D).

        Args:
            x: the tokens.
            mask: of the (B, L) layout.
            rotations: from ``positions.rotations``.
            packing: position of each of the T tokens.
            seen: shaped as ``x``, the source of keys and values; None: ``x``.
            past: has the keys and values of earlier positions, and receives the keys and values of these; None: there
                are none.
        """
        q, k, v = (heads.transpose(1, 2) for heads in self._heads(x, rotations, packing, seen))
        if past is not None:
            k, v = past.join(k, v)
        y_BLC = self._attend(q, self._for_queries(k), self._for_queries(v), mask)
        return self.out(y_BLC if packing is None else packing.pack(y_BLC))

    def step(self, x_RD: Tensor, layer: int, given: Step, seen_RD: Tensor | None = None) -> Tensor:
        """Compute the next position of each row.

        Args:
            x_RD: (R, D).
            layer: of the stack: this one.
            given: arguments that all layers share.
            seen_RD: as ``seen`` of ``forward``.

        Returns:
            (R, D).
        """
        q_RHd, k_RHd, v_RHd = self._heads(x_RD, given.rotations, seen=seen_RD)
        keys, values = given.cache.write(layer, torch.stack((k_RHd, v_RHd), 1))
        return self._step(q_RHd, keys, values, given.cache.copies, given.bias)


def _normed(norm: RMSNorm, x_BLHd: Tensor) -> Tensor:
    """Return queries or keys by head, (B, L, H, d), normed over as many numbers as the norm is wide: d or H d."""
    x = x_BLHd.flatten(-2).unflatten(-1, (-1, norm.normalized_shape[0]))
    # Under autocast the heads are in half precision, and the norm's weight is not.
    return norm(x.to(norm.weight.dtype)).view(x_BLHd.shape).to(x_BLHd.dtype)


class CrossAttention(_Attention):
    """Multi-head attention of a sequence to another one, the memory."""

    def __init__(self, config: TransformerConfig) -> None:
        super().__init__(config)
        dim = config.shape.dim
        self.q = cpu.Linear(dim, self.num_heads * self.head_dim, bias=config.has_qkv_bias)
        self.kv = cpu.Linear(dim, 2 * self.num_kv_heads * self.head_dim, bias=config.has_qkv_bias)

    def _projections(self) -> list[Tensor]:
        return [self.q.weight, *self.kv.weight.chunk(2)]

    def _queries(self, x_BLD: Tensor) -> Tensor:
        """Return queries by head, (B, H, L, d)."""
        return self.q(x_BLD).unflatten(-1, (self.num_heads, self.head_dim)).transpose(1, 2)

    def forward(self, x_BLD: Tensor, memory_BSD: Tensor, mask: Mask) -> Tensor:
        """Map (B, L, D) tokens and a (B, S, D) memory to (B, L, D)."""
        keys, values = self.keys_and_values(memory_BSD)
        return self.look(x_BLD, keys, values, mask)

    def look(self, x_BLD: Tensor, k_BHSd: Tensor, v_BHSd: Tensor, mask: Mask) -> Tensor:
        """Map (B, L, D) tokens to (B, L, D), by the ``keys_and_values`` of a memory."""
        return self.out(self._attend(self._queries(x_BLD), self._for_queries(k_BHSd), self._for_queries(v_BHSd), mask))

    def weights(self, x_BLD: Tensor, memory_BSD: Tensor, mask: Mask) -> Tensor:
        """Return how each head spreads each query over the memory, (B, H, L, S)."""
        q, k = self._queries(x_BLD), self._for_queries(self.keys_and_values(memory_BSD)[0])
        weights = attention_weights(q.flatten(0, 1), k.flatten(0, 1), mask, self.scale)
        return weights.unflatten(0, q.shape[:2])

    def keys_and_values(self, memory_BSD: Tensor) -> Tensor:
        """Return the keys and values that ``look`` and ``step`` read, (2, B, Hkv, S, d)."""
        heads = self.kv(memory_BSD).unflatten(-1, (2, self.num_kv_heads, self.head_dim))
        return heads.permute(2, 0, 3, 1, 4)

    def step(self, x_RD: Tensor, store: Tensor, copies: int, bias: Tensor | None) -> Tensor:
        """Map one position of each row, (R, D), to (R, D).

        Args:
            x_RD: (R, D).
            store: (2, N, Hkv, S, d), ``keys_and_values`` of N sentences.
            copies: K, rows of a sentence.
            bias: (N * Hkv, 1, S), or None.
        """
        keys, values = store.flatten(1, 2)
        return self._step(self.q(x_RD), keys, values, copies, bias)


def key_bias(valid_NS: Tensor, num_kv_heads: int, like: Tensor) -> Tensor | None:
    """Return the bias that hides padding in ``CrossAttention.step``, (N * Hkv, 1, S); None if there is none."""
    return None if bool(valid_NS.all()) else padding_mask(valid_NS, num_kv_heads, like).bias
