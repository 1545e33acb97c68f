"""Pre-norm layers, and the stacks of encoder and decoder."""

from __future__ import annotations

from collections.abc import Sequence
from dataclasses import dataclass, replace
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.nets.attention import CrossAttention, Mask, SelfAttention, padding_mask, product_dtype, self_mask
from apps.nets.blocks import feed
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Cache, Step, has_numbers, routed_by
from apps.nets.depths import DepthGate, Entered
from apps.nets.expert_attention import ExpertAttention, attention_experts
from apps.nets.norms import build_norm
from apps.nets.packing import Packing
from apps.nets.past import Past
from apps.nets.positions import RelativeBias, added_positions, rotations


@dataclass(frozen=True)
class Pass:
    """The inputs that all layers of a stack share in one pass.

    Attributes:
        mask: of the self-attention.
        context: routing context of the tokens, in the (B, L) layout.
        rotations: of queries and keys, if positions are rotary.
        packing: positions of the tokens in the (B, L) layout, if the input is (T, D) and has no padding.
        memory_BSD: memory that the cross-attention reads, if there is one.
        memory_mask: of the cross-attention.
        past: of the positions before these, with the memory's keys and values; None: these are the first.
    """

    mask: Mask
    context: core.RoutingContext
    rotations: Tensor | None = None
    packing: Packing | None = None
    memory_BSD: Tensor | None = None
    memory_mask: Mask | None = None
    past: Past | None = None


class Layer(nn.Module):
    """A mixing of the positions, cross-attention if there is a memory, and an FFN or MoE layer.

    Args:
        config: the transformer.
        ffn: FFN or MoE layer; None: the layer has none.
        cross: there is a memory.
        mixing: replaces self-attention, with the same interface; None: self-attention.
        depth_gate: chooses the tokens that enter the layer; None: all of them do.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ffn: nn.Module | None,
        *,
        cross: bool = False,
        mixing: nn.Module | None = None,
        depth_gate: DepthGate | None = None,
    ) -> None:
        super().__init__()
        self.num_heads = config.shape.num_heads
        self.depth_gate = depth_gate
        self.mixing_norm = build_norm(config)
        self.mixing: Any = SelfAttention(config) if mixing is None else mixing
        self.cross_norm = build_norm(config) if cross else None
        self.cross_attn = CrossAttention(config) if cross else None
        self.ffn_norm = None if ffn is None else build_norm(config)
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x: Tensor, given: Pass, seen: Tensor | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D), or (T, D) to (T, D) if the pass has a packing.

        Args:
            x: the tokens.
            given: arguments that all layers share.
            seen: shaped as ``x``, the input of self-attention, if no token skips the layer; None: ``x``.
        """
        if self.depth_gate is not None and given.past is not None:
            return self._all_of(x, self.depth_gate, given)
        if self.depth_gate is not None:
            return self.depth_gate.enter(x, given.context, lambda x_BCD, own: self._whole(x_BCD, self._of(given, own)))
        return self._whole(x, given, seen)

    def _of(self, given: Pass, entered: Entered) -> Pass:
        """Return the inputs of the tokens that enter the layer, which only see each other."""
        mask = given.mask.of_tokens(entered.index_BC, entered.real_BC, self.num_heads)
        turns = None if given.rotations is None else given.rotations[:, entered.index_BC]
        return Pass(mask, entered.context, turns)

    def _all_of(self, x_BLD: Tensor, gate: DepthGate, given: Pass) -> Tensor:
        """Map all tokens; tokens that do not enter come out as they were, and their keys are hidden from others."""
        assert given.past is not None
        enters_BL, gate_BL = gate.choose(x_BLD, given.context)
        mask = given.mask.hiding(given.past.hide(~enters_BL), self.num_heads)
        own = replace(given, mask=mask, context=replace(given.context, valid_BS=enters_BL))
        added_BLD = (self._whole(x_BLD, own) - x_BLD) * gate_BL[..., None]
        return x_BLD + added_BLD.masked_fill(~enters_BL[..., None], 0.0).to(x_BLD.dtype)

    def _whole(self, x: Tensor, given: Pass, seen: Tensor | None = None) -> Tensor:
        """Map the tokens that enter the layer."""
        x = self.mix(x, given, seen)
        if given.memory_mask is not None:
            x = self.look(x, given)
        return self.feed(x, given)

    def mix(self, x: Tensor, given: Pass, seen: Tensor | None = None) -> Tensor:
        """Return x with the mixing of the positions added, with keys and values from ``seen``; None: of x."""
        # Experts need to know the tokens in addition to the packing that others ask for.
        known = given.context if isinstance(self.mixing, ExpertAttention) else given.packing
        keys = () if seen is None else (self.mixing_norm(seen),)
        past = {} if given.past is None else {"past": given.past}
        return x + self.dropout(self.mixing(self.mixing_norm(x), given.mask, given.rotations, known, *keys, **past))

    def look(self, x_BLD: Tensor, given: Pass) -> Tensor:
        """Return x with the cross-attention added."""
        assert given.memory_mask is not None
        norm, attention = self._cross()
        if given.past is None:
            return x_BLD + self.dropout(attention(norm(x_BLD), given.memory_BSD, given.memory_mask))
        keys, values = given.past.of_memory()
        return x_BLD + self.dropout(attention.look(norm(x_BLD), keys, values, given.memory_mask))

    def feed(self, x: Tensor, given: Pass) -> Tensor:
        """Return x with the FFN or MoE layer added, if there is one."""
        if self.ffn is None or self.ffn_norm is None:
            return x
        return x + self.dropout(feed(self.ffn, self.ffn_norm(x), given.context, given.packing))

    def cross_weights(self, x_BLD: Tensor, given: Pass) -> Tensor:
        """Return how ``look`` spreads each query over the memory, (B, H, L, S)."""
        assert given.memory_BSD is not None
        assert given.memory_mask is not None
        norm, attention = self._cross()
        return attention.weights(norm(x_BLD), given.memory_BSD, given.memory_mask)

    def keys_and_values(self, memory_BSD: Tensor) -> Tensor:
        """Return the keys and values that the cross-attention reads in ``step``, (2, B, Hkv, S, d)."""
        return self._cross()[1].keys_and_values(memory_BSD)

    def _cross(self) -> tuple[nn.Module, CrossAttention]:
        assert self.cross_norm is not None
        assert self.cross_attn is not None
        return self.cross_norm, self.cross_attn

    def step(self, x_RD: Tensor, index: int, given: Step, seen_RD: Tensor | None = None) -> Tensor:
        """Map one position, (R, D), to (R, D), without dropout.

        ``index`` is the layer's place in the cache, and ``seen_RD`` is as in ``forward``.
        """
        if self.depth_gate is None:
            return self._whole_step(x_RD, index, given, seen_RD)
        cache, entered = given.cache, self.depth_gate(x_RD[:, None], given.context)
        enters_R = entered.enters_BS[:, 0]
        cache.hide(index, ~enters_R)
        if entered.index_BC.shape[1] == 0:  # on a CPU it is known that no row enters
            cache.clear(index)
            return x_RD
        # All rows are computed: a batch of some of them would need its own slots.
        bias = cache.bias_in(index, given.bias, product_dtype(x_RD))
        own = replace(given, bias=bias, context=replace(given.context, valid_BS=entered.enters_BS))
        y_RD = self._whole_step(x_RD, index, own)
        added_RD = (y_RD - x_RD) * entered.gate_BC
        return x_RD + added_RD.masked_fill(~enters_R[:, None], 0.0).to(x_RD.dtype)

    def _whole_step(self, x_RD: Tensor, index: int, given: Step, seen_RD: Tensor | None = None) -> Tensor:
        """Map one position of the rows that enter the layer; the others come out as anything."""
        cache, keys_RD = given.cache, None if seen_RD is None else self.mixing_norm(seen_RD)
        x_RD = x_RD + self.mixing.step(self.mixing_norm(x_RD), index, given, keys_RD)
        if cache.memory is not None:
            norm, attention = self._cross()
            x_RD = x_RD + attention.step(norm(x_RD), cache.memory[index], cache.copies, cache.memory_bias)
        if self.ffn is None or self.ffn_norm is None:
            return x_RD
        return x_RD + feed(self.ffn, self.ffn_norm(x_RD).unsqueeze(1), given.context).squeeze(1)


class Stack(nn.Module):
    """Positions, layers and the final norm: an encoder, or a decoder.

    Args:
        config: the transformer.
        ffns: FFN or MoE layer of each layer.
        causal: a position sees only earlier ones.
        cross: the layers attend to a memory as well.
        depth_gates: of each layer, chooses the tokens that enter it; None: all enter all layers.
        attention: the attention experts of all layers; None: they have ``SelfAttention``.
    """

    def __init__(
        self,
        config: TransformerConfig,
        ffns: Sequence[nn.Module],
        *,
        causal: bool,
        cross: bool,
        depth_gates: Sequence[DepthGate | None] | None = None,
        attention: core.MoEConfig | None = None,
    ) -> None:
        super().__init__()
        self.config, self.causal = config, causal
        self.head_dim = config.shape.head_dim if attention is None else attention_experts(attention).head_dim
        # All heads of experts have the mask of one.
        self.masked_heads = config.shape.num_heads if attention is None else 1
        self.num_heads, self.num_kv_heads = config.shape.num_heads, config.shape.num_kv_heads
        self.embed_scale = config.shape.dim**0.5 if config.scale_embeddings else 1.0
        self.positions = added_positions(config)
        self.relative = RelativeBias(config, causal) if config.positions == "relative" else None
        self.embed_dropout = nn.Dropout(config.dropout if config.embed_dropout is None else config.embed_dropout)
        gates = [None] * len(ffns) if depth_gates is None else depth_gates
        mixings = [None if attention is None else ExpertAttention(config, attention, causal=causal) for _ in ffns]
        self.layers: Sequence[Layer] = nn.ModuleList(  # type: ignore[assignment]
            [
                Layer(config, ffn, cross=cross, mixing=mixing, depth_gate=gate)
                for ffn, mixing, gate in zip(ffns, mixings, gates, strict=True)
            ]
        )
        self.norm = build_norm(config)

    def forward(
        self,
        x_BLD: Tensor,
        context: core.RoutingContext,
        memory_BSD: Tensor | None = None,
        memory_valid_BS: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Map (B, L, D) embeddings to the (B, L, D) normed output. ``context.valid_BS`` marks the non-padding tokens.

        With a ``past`` they follow its positions, and it has the keys and values of the memory.
        """
        x_BLD, given = self._prepare(x_BLD, context, memory_BSD, memory_valid_BS, past)
        return self.norm(self._through(x_BLD, given))

    def _through(self, x_BLD: Tensor, given: Pass) -> Tensor:
        """Map (B, L, D) tokens through the layers."""
        for layer in self.layers:
            x_BLD = layer(x_BLD, given)
        return x_BLD

    def cross_attention(
        self, x_BLD: Tensor, context: core.RoutingContext, memory_BSD: Tensor, memory_valid_BS: Tensor
    ) -> Tensor:
        """Return the weights that each layer's cross-attention gives to the memory, (layers, B, H, L, S)."""
        x_BLD, given = self._prepare(x_BLD, context, memory_BSD, memory_valid_BS)
        weights = []
        for layer in self.layers:
            x_BLD = layer.mix(x_BLD, given)
            weights.append(layer.cross_weights(x_BLD, given))
            x_BLD = layer.feed(layer.look(x_BLD, given), given)
        return torch.stack(weights)

    def memory_keys(self, memory_BSD: Tensor) -> Tensor:
        """Return the keys and values that the layers' cross-attention reads in steps, (layers, 2, B, Hkv, S, d)."""
        return torch.stack([layer.keys_and_values(memory_BSD) for layer in self.layers])

    def _prepare(
        self,
        x_BLD: Tensor,
        context: core.RoutingContext,
        memory_BSD: Tensor | None,
        memory_valid_BS: Tensor | None,
        past: Past | None = None,
    ) -> tuple[Tensor, Pass]:
        L, start = x_BLD.shape[1], 0 if past is None else past.length
        x_BLD = self.embed_dropout(self._placed(x_BLD, start, L))
        # Padding comes after the real tokens, so a causal mask hides it from them already.
        mask = self_mask(
            x_BLD,
            self.masked_heads,
            valid_BL=None if self.causal else context.valid_BS,
            causal=self.causal,
            relative_HLL=None if self.relative is None else self.relative(L, start),
            past=None if past is None else start,
        )
        memory_mask = None if memory_valid_BS is None else padding_mask(memory_valid_BS, self.num_heads, x_BLD)
        turns = self._rotations(start, L, x_BLD)
        return x_BLD, Pass(mask, context, turns, memory_BSD=memory_BSD, memory_mask=memory_mask, past=past)

    def _placed(self, x: Tensor, start: int, length: int) -> Tensor:
        """Return embeddings (..., L, D), scaled and with positions added."""
        if self.positions is None:
            return x if self.embed_scale == 1.0 else x * self.embed_scale
        # One pass over the embeddings for both.
        return torch.add(self.positions(start, length), x, alpha=self.embed_scale)

    def _rotations(self, start: int, length: int, like: Tensor) -> Tensor | None:
        if self.config.positions != "rotary":
            return None
        return rotations(start, length, self.head_dim, self.config.rotary_base, like)

    def step(self, x_RD: Tensor, token_R: Tensor, valid_R: Tensor, cache: Cache) -> Tensor:
        """Map the next position's (R, D) embeddings to the (R, D) normed output; the cache grows by it."""
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
            **routed_by(cache.task_ids_R, cache.domain_ids_R),
        )
        x_RD = self._step_through(x_RD, Step(cache, context, bias, turns))
        cache.length = t + 1
        return self.norm(x_RD)

    def _step_through(self, x_RD: Tensor, given: Step) -> Tensor:
        """Map one position through the layers; see ``Layer.step``."""
        for i, layer in enumerate(self.layers):
            x_RD = layer.step(x_RD, i, given)
        return x_RD
