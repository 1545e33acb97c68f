"""Pre-norm layers, and the stacks of encoder and decoder."""

from __future__ import annotations

import contextlib
import functools
from collections.abc import Callable, Iterator, Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.nets.attention import CrossAttention, Mask, SelfAttention, padding_mask, product_dtype, self_mask
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Cache, has_numbers
from apps.nets.dropout import Dropout
from apps.nets.positions import RelativeBias, added_positions, rotations
from core.kernels import cpu

_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    "relu": F.relu,
    "gelu": F.gelu,
    "gelu_tanh": functools.partial(F.gelu, approximate="tanh"),
    "silu": F.silu,
}


def build_norm(config: TransformerConfig) -> nn.Module:
    """LayerNorm or RMSNorm over D."""
    dim = config.shape.dim
    if config.norm == "rms":
        return RMSNorm(dim, config.norm_eps)
    return nn.LayerNorm(dim, eps=config.norm_eps, bias=config.bias)


class RMSNorm(nn.RMSNorm):
    """torch's, which inside ``steady`` takes four operations in place of the seven that a CPU makes of it: of a step of
    decoding 10 rows they are 4.6 us of 8.9."""

    def __init__(self, dim: int, eps: float) -> None:
        super().__init__(dim, eps=eps)
        self._scaled: tuple[Tensor, Tensor] | None = None

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        if self._scaled is None or x.dtype != self._scaled[0].dtype:
            return super().forward(x)
        # x / sqrt(mean of squares + eps) * weight, with sqrt(D) taken out of the root.
        weight, least = self._scaled
        return (x / torch.linalg.vector_norm(x, dim=-1, keepdim=True).hypot(least)).mul_(weight)

    @contextlib.contextmanager
    def steady(self) -> Iterator[None]:
        """Inside, without gradients, the weight does not change."""
        weight, dim, before = self.weight, self.normalized_shape[0], self._scaled
        is_full = weight.dtype in (torch.float32, torch.float64)
        if is_full and weight.device.type == "cpu" and not torch.is_grad_enabled():
            least = torch.tensor((dim * (self.eps or 0.0)) ** 0.5, dtype=weight.dtype)
            self._scaled = weight.detach() * dim**0.5, least
        try:
            yield
        finally:
            self._scaled = before

    def __getstate__(self) -> dict[str, Any]:
        # A copy or pickle taken inside has its own weight, which may change.
        return {**self.__dict__, "_scaled": None}


class FeedForward(nn.Module):
    """``act(x w_in) w_out``, or ``(act(x w_gate) * (x w_in)) w_out`` where gated."""

    def __init__(self, config: TransformerConfig, hidden_dim: int) -> None:
        super().__init__()
        dim = config.shape.dim
        self.activation = config.activation
        self.w_in = cpu.Linear(dim, hidden_dim, bias=config.bias)
        self.w_gate = cpu.Linear(dim, hidden_dim, bias=config.bias) if config.gated else None
        self.w_out = cpu.Linear(hidden_dim, dim, bias=config.bias)
        self.dropout = Dropout(config.ffn_dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D)."""
        act = _ACTIVATIONS[self.activation]
        h = act(self.w_in(x)) if self.w_gate is None else act(self.w_gate(x)) * self.w_in(x)
        return self.w_out(self.dropout(h))


class Layer(nn.Module):
    """Self-attention, cross-attention where there is a memory, and an FFN or MoE layer."""

    def __init__(self, config: TransformerConfig, ffn: nn.Module, cross: bool) -> None:
        super().__init__()
        self.self_norm, self.self_attn = build_norm(config), SelfAttention(config)
        self.cross_norm = build_norm(config) if cross else None
        self.cross_attn = CrossAttention(config) if cross else None
        self.ffn_norm, self.ffn = build_norm(config), ffn
        self.dropout = Dropout(config.dropout)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Mask,
        rotations: Tensor | None,
        context: core.RoutingContext,
        memory_BSD: Tensor | None = None,
        memory_mask: Mask | None = None,
    ) -> Tensor:
        """(B, L, D) to (B, L, D)."""
        x_BLD = self.attend(x_BLD, mask, rotations)
        if memory_BSD is not None:
            assert memory_mask is not None
            x_BLD = self.look(x_BLD, memory_BSD, memory_mask)
        return self.feed(x_BLD, context)

    def attend(self, x_BLD: Tensor, mask: Mask, rotations: Tensor | None) -> Tensor:
        """The self-attention and what it is added to."""
        return self.dropout.add(x_BLD, self.self_attn(self.self_norm(x_BLD), mask, rotations))

    def look(self, x_BLD: Tensor, memory_BSD: Tensor, memory_mask: Mask) -> Tensor:
        """The cross-attention and what it is added to."""
        norm, attention = self._cross()
        return self.dropout.add(x_BLD, attention(norm(x_BLD), memory_BSD, memory_mask))

    def cross_weights(self, x_BLD: Tensor, memory_BSD: Tensor, memory_mask: Mask) -> Tensor:
        """(B, H, L, S) of the cross-attention, given what ``look`` is given."""
        norm, attention = self._cross()
        return attention.weights(norm(x_BLD), memory_BSD, memory_mask)

    def keys_and_values(self, memory_BSD: Tensor) -> Tensor:
        """(2, B, Hkv, S, d), what the cross-attention reads in ``step``."""
        return self._cross()[1].keys_and_values(memory_BSD)

    def feed(self, x_BLD: Tensor, context: core.RoutingContext) -> Tensor:
        """The FFN or MoE layer and what it is added to."""
        return self.dropout.add(x_BLD, self._feed(self.ffn_norm(x_BLD), context))

    def _cross(self) -> tuple[nn.Module, CrossAttention]:
        assert self.cross_norm is not None
        assert self.cross_attn is not None
        return self.cross_norm, self.cross_attn

    def _feed(self, h_BLD: Tensor, context: core.RoutingContext) -> Tensor:
        return self.ffn(h_BLD, context) if isinstance(self.ffn, core.MoELayer) else self.ffn(h_BLD)

    def step(
        self,
        x_RD: Tensor,
        index: int,
        cache: Cache,
        bias: Tensor | None,
        rotations: Tensor | None,
        context: core.RoutingContext,
    ) -> Tensor:
        """One position, (R, D) to (R, D), without dropout. ``index`` is the layer's place in the cache."""
        x_RD = x_RD + self.self_attn.step(self.self_norm(x_RD), cache, index, bias, rotations)
        if cache.memory is not None:
            norm, attention = self._cross()
            x_RD = x_RD + attention.step(norm(x_RD), cache.memory[index], cache.copies, cache.memory_bias)
        return x_RD + self._feed(self.ffn_norm(x_RD).unsqueeze(1), context).squeeze(1)


class Stack(nn.Module):
    """Positions, layers and the final norm: an encoder, or a decoder.

    Args:
        config: the transformer.
        ffns: FFN or MoE layer of each layer.
        causal: a position sees those before it alone.
        cross: the layers attend to a memory as well.
    """

    def __init__(self, config: TransformerConfig, ffns: Sequence[nn.Module], *, causal: bool, cross: bool) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.num_heads, self.num_kv_heads = config.shape.num_heads, config.shape.num_kv_heads
        self.embed_scale = config.shape.dim**0.5 if config.scale_embeddings else 1.0
        self.positions = added_positions(config)
        self.relative = RelativeBias(config, causal) if config.positions == "relative" else None
        self.embed_dropout = Dropout(config.dropout if config.embed_dropout is None else config.embed_dropout)
        self.layers: Sequence[Layer] = nn.ModuleList([Layer(config, ffn, cross) for ffn in ffns])  # type: ignore[assignment]
        self.norm = build_norm(config)

    def forward(
        self,
        x_BLD: Tensor,
        context: core.RoutingContext,
        memory_BSD: Tensor | None = None,
        memory_valid_BS: Tensor | None = None,
    ) -> Tensor:
        """(B, L, D) embeddings to the (B, L, D) normed output. ``context.valid_BS`` marks the real tokens."""
        x_BLD, mask, turns = self._prepare(x_BLD, context)
        memory_mask = None if memory_BSD is None else self._memory_mask(memory_valid_BS, x_BLD)
        for layer in self.layers:
            x_BLD = layer(x_BLD, mask, turns, context, memory_BSD, memory_mask)
        return self.norm(x_BLD)

    def cross_attention(
        self, x_BLD: Tensor, context: core.RoutingContext, memory_BSD: Tensor, memory_valid_BS: Tensor
    ) -> Tensor:
        """(layers, B, H, L, S), the weights that each layer's cross-attention gives to the memory."""
        x_BLD, mask, turns = self._prepare(x_BLD, context)
        memory_mask = self._memory_mask(memory_valid_BS, x_BLD)
        weights = []
        for layer in self.layers:
            x_BLD = layer.attend(x_BLD, mask, turns)
            weights.append(layer.cross_weights(x_BLD, memory_BSD, memory_mask))
            x_BLD = layer.feed(layer.look(x_BLD, memory_BSD, memory_mask), context)
        return torch.stack(weights)

    def memory_keys(self, memory_BSD: Tensor) -> Tensor:
        """(layers, 2, B, Hkv, S, d), keys and values that the layers' cross-attention reads from step to step."""
        return torch.stack([layer.keys_and_values(memory_BSD) for layer in self.layers])

    def _memory_mask(self, valid_BS: Tensor | None, like: Tensor) -> Mask:
        assert valid_BS is not None
        return padding_mask(valid_BS, self.num_heads, like)

    def _prepare(self, x_BLD: Tensor, context: core.RoutingContext) -> tuple[Tensor, Mask, Tensor | None]:
        L = x_BLD.shape[1]
        x_BLD = self.embed_dropout(self._placed(x_BLD, 0, L))
        # Padding comes after the real tokens, so a causal mask hides it from them already.
        mask = self_mask(
            x_BLD,
            self.num_heads,
            valid_BL=None if self.causal else context.valid_BS,
            causal=self.causal,
            relative_HLL=None if self.relative is None else self.relative(L),
        )
        return x_BLD, mask, self._rotations(0, L, x_BLD)

    def _placed(self, x: Tensor, start: int, length: int) -> Tensor:
        """Embeddings (..., L, D), scaled and with positions added."""
        if self.positions is None:
            return x if self.embed_scale == 1.0 else x * self.embed_scale
        # One pass over the embeddings for both.
        return torch.add(self.positions(start, length), x, alpha=self.embed_scale)

    def _rotations(self, start: int, length: int, like: Tensor) -> Tensor | None:
        if self.config.positions != "rotary":
            return None
        return rotations(start, length, self.config.shape.head_dim, self.config.rotary_base, like)

    def step(self, x_RD: Tensor, token_R: Tensor, valid_R: Tensor, cache: Cache) -> Tensor:
        """The next position of each row, (R, D) embeddings to the (R, D) normed output; the cache grows by it."""
        t = cache.length
        cache.append()
        x_RD = self._placed(x_RD, t, 1)
        if self.relative is not None and (cache.relative_HT is None or cache.relative_HT.shape[1] <= t):
            cache.relative_HT = self.relative.last(2 * (t + 1))
        bias = cache.self_bias(product_dtype(x_RD))
        turns = self._rotations(t, 1, x_RD)
        # Whether there is padding costs a CPU a look, and another device a wait.
        real = valid_R.device.type == "cpu" and has_numbers(valid_R) and bool(valid_R.all())
        context = core.RoutingContext(
            valid_BS=None if real else valid_R[:, None],
            token_ids_BS=token_R[:, None],
            task_ids_B=cache.task_ids_R,
            domain_ids_B=cache.domain_ids_R,
        )
        for i, layer in enumerate(self.layers):
            x_RD = layer.step(x_RD, i, cache, bias, turns, context)
        cache.length = t + 1
        return self.norm(x_RD)
