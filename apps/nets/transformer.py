"""Sparse translation and language models on one kind of transformer.

An encoder-decoder (Vaswani et al., arXiv 1706.03762) with the norm before each part, in which the FFN of chosen layers
is a mixture of experts (GShard, arXiv 2006.16668), and the decoder by itself as a causal language model. A comparison
gives the chosen blocks another FFN, and changes nothing else.
"""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least
from apps.data.subwords import BOS_ID, EOS_ID, PAD_ID
from apps.nets import blocks
from apps.nets.attention import CrossAttention, SelfAttention, key_bias, product_dtype
from apps.nets.blocks import FFNConfig, MoEs, ffns_of, moe_configs, resolve_blocks
from apps.nets.config import TransformerConfig
from apps.nets.copying import CopyGate
from apps.nets.decode_cache import Cache, Memory, routed_by
from apps.nets.depths import DepthGate, MixtureOfDepths, depth_gates
from apps.nets.expert_attention import ExpertAttention, attention_experts, check_rows
from apps.nets.layers import Stack
from apps.nets.past import Past
from apps.nets.place import Place, check_fits
from apps.nets.positions import Learned, RelativeBias
from apps.nets.universal import Universal, UniversalStack
from core.kernels import cpu

__all__ = ["Cache", "LanguageModel", "Memory", "MemoryDecoder", "TranslationModel"]

Blocks = str | Sequence[int]
SLOTS = 48
"""Slots of a sentence that a new cache has room for; it makes more as they are needed."""


class _Decoding(nn.Module):
    """The base of models with a decoder: the read-out, and decoding step by step."""

    config: TransformerConfig
    moes: tuple[core.MoEConfig, ...]
    """The MoE layers: the one of all sparse blocks, or one for each in their order; none in a dense model."""
    decoder_moes: tuple[core.MoEConfig, ...]
    """Those of the decoder's blocks."""
    attention_moe: core.MoEConfig | None
    decoder: Stack
    output: nn.Linear | None

    @property
    def target_embedding(self) -> nn.Embedding:
        raise NotImplementedError

    def _keep_moes(self, ffn: FFNConfig | MoEs | None, *stacks: Sequence[int]) -> list[list[FFNConfig]]:
        """Return the FFNs of the sparse blocks of each stack, the decoder's last, and keep their MoE layers."""
        ffns = ffns_of(ffn, *stacks)
        self.moes = moe_configs(ffn)
        self.decoder_moes = tuple(c for c in ffns[-1] if isinstance(c, core.MoEConfig))
        return ffns

    def embed_target(self, ids: Tensor) -> Tensor:
        """Return the embeddings of target ids, (..., D); ``config.start`` says which one belongs to ``BOS_ID``."""
        if self.config.start == "eos":
            ids = ids.masked_fill(ids == BOS_ID, EOS_ID)
        return self.target_embedding(ids)

    @property
    def output_weight(self) -> Tensor:
        """The (V, D) weights of the logits ``logits_scale * h @ output_weight.T``."""
        return self.target_embedding.weight if self.output is None else self.output.weight

    def logits(self, h: Tensor) -> Tensor:
        """Return the logits of (..., D) hidden states, (..., V)."""
        scale = self.config.logits_scale
        return cpu.linear(h if scale == 1.0 else h * scale, self.output_weight)

    def next_logits(self, h_BLD: Tensor, source: Memory | None, real_BL: Tensor | None = None) -> Tensor:
        """Return the logits of the token after each of (B, L, D) hidden states, (B, L, V).

        Args:
            h_BLD: hidden states.
            source: the sentences' sources, for a read-out that copies from them.
            real_BL: bool, the T tokens that are wanted, (T, V); None: all.
        """
        return self.logits(h_BLD if real_BL is None else h_BLD[real_BL])

    def step_weights(self) -> list[Tensor]:
        """Return the (N, K) weights by which every step multiplies its rows, experts' and gates' aside."""
        once = [layer.cross_attn.kv for layer in self.decoder.layers if layer.cross_attn is not None]
        linear = [m for m in self.decoder.modules() if isinstance(m, cpu.Linear) and not any(m is kv for kv in once)]
        return [*(module.weight for module in linear), self.output_weight]

    def check_steps(self) -> None:
        """Raise an error if a router of the decoder decides otherwise step by step than in the whole sequence.

        Raises:
            ValueError: it goes by more than the token itself and its sentence's task and domain.
        """
        place = Place(type(self).__name__, decodes_stepwise=True)
        for moe in self.decoder_moes:
            check_fits(place, moe.router)
        if self.attention_moe is not None:
            check_fits(place, self.attention_moe.router)

    @property
    def kept_heads(self) -> tuple[int, int]:
        """The number and the width of the heads of keys and values that are kept of a position in each layer."""
        if self.attention_moe is not None:  # one set of keys and values, whichever experts read them
            expert = attention_experts(self.attention_moe)
            return expert.heads_per_expert, expert.head_dim
        return self.config.shape.num_kv_heads, self.config.shape.head_dim

    def _new_cache(self, num_sentences: int, like: Tensor, **kept: Any) -> Cache:
        (heads, width), shape = self.kept_heads, self.config.shape
        group = shape.group if self.attention_moe is None else 1
        size = (shape.decoder_layers, 2, num_sentences * heads, SLOTS, width)
        return Cache(like.new_empty(size, dtype=product_dtype(like)), heads, group, **kept)

    def go_on(
        self,
        tokens_BL: Tensor,
        past: Past,
        task_ids_B: Tensor | None = None,
        domain_ids_B: Tensor | None = None,
        memory_valid_BS: Tensor | None = None,
        source: Memory | None = None,
    ) -> Tensor:
        """Map (B, L) ids that follow a past's to the (B, L, V) logits of the token after each.

        Tokens at ``PAD_ID`` are not routed, but later ones of their row see them: only rows that are at an end may
        have any.

        Args:
            tokens_BL: int64.
            past: takes in these positions.
            task_ids_B, domain_ids_B: int64 (B,), for routers that ask for them.
            memory_valid_BS: bool, True for the non-padding tokens of the memory; None in a language model.
            source: as in ``next_logits``.
        """
        context = core.RoutingContext(tokens_BL != PAD_ID, tokens_BL, task_ids_B, domain_ids_B)
        x_BLD = self.embed_target(tokens_BL)
        return self.next_logits(self.decoder(x_BLD, context, None, memory_valid_BS, past), source)

    @torch.no_grad()
    def step(self, token_R: Tensor, cache: Cache) -> Tensor:
        """Read one more token of each row. Meant for evaluation: it has neither dropout nor a gradient.

        Args:
            token_R: int64 (R,) ids; rows at ``PAD_ID`` are not routed.
            cache: grows by one position.

        Returns:
            (R, V) logits of the next token, float32; float64 if the model is.
        """
        h_RD = self.decoder.step(self.embed_target(token_R), token_R, token_R != PAD_ID, cache)
        # A sentence's rows lie side by side.
        logits_RV = self.next_logits(
            h_RD.view(cache.num_sentences, cache.copies, h_RD.shape[-1]), cache.source
        ).flatten(0, 1)
        return logits_RV if logits_RV.dtype == torch.float64 else logits_RV.float()

    def reset_parameters(self) -> None:
        """Initialize linear layers Xavier-uniform, each expert as the dense FFN it replaces; embeddings
        ``N(0, 1 / D)``.

        Queries, keys and values start as one matrix of all three would, at ``1 / sqrt(2)`` of their own scale, which
        deep stacks train better with (fairseq).
        """
        # Parameters of an MoE layer other than its experts' are initialized by its router.
        inside = {id(module) for layer in core.moe_layers(self).values() for module in layer.modules()}
        for module in self.modules():
            if id(module) in inside:
                continue
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                if module.bias is not None:
                    nn.init.zeros_(module.bias)
            elif isinstance(module, (Learned, RelativeBias)):
                nn.init.normal_(module.weight, std=self.config.shape.dim**-0.5)
            elif isinstance(module, nn.Embedding):
                nn.init.normal_(module.weight, std=self.config.shape.dim**-0.5)
                with torch.no_grad():
                    module.weight[PAD_ID] = 0.0
        for module in self.modules():
            if isinstance(module, (SelfAttention, CrossAttention)):
                module.reset_heads()
        for module in self.modules():
            if isinstance(module, core.Experts):
                module.init_each(nn.init.xavier_uniform_)
        for module in self.modules():
            if isinstance(module, ExpertAttention):
                module.reset_heads()
        if self.output is not None:
            nn.init.normal_(self.output.weight, std=self.config.shape.dim**-0.5)


class MemoryDecoder(_Decoding):
    """The base of models whose decoder attends to a memory, which their ``encode`` makes of the source."""

    copy_gate: CopyGate | None
    """The part of the read-out that copies from the source; None: there is none."""

    def __init__(self) -> None:
        super().__init__()
        self.copy_gate = None

    def _choose(
        self, ffn: FFNConfig | MoEs | None, of_encoder: Blocks, encoder_layers: int, of_decoder: Blocks
    ) -> list[list[FFNConfig]]:
        """Return the FFNs of the sparse blocks of encoder and decoder, and keep which blocks and MoE layers these are.

        Raises:
            ValueError: no block is named, or as ``resolve_blocks`` and ``ffns_of``.
        """
        named = (("encoder", of_encoder, encoder_layers), ("decoder", of_decoder, self.config.shape.decoder_layers))
        self.encoder_moe_blocks, self.decoder_moe_blocks = (
            () if ffn is None else resolve_blocks(blocks, depth, option=f"{stack}_moe_blocks", optional=True)
            for stack, blocks, depth in named
        )
        if ffn is not None and not self.encoder_moe_blocks and not self.decoder_moe_blocks:
            raise ValueError("encoder_moe_blocks and decoder_moe_blocks name no block: leave moe out for a dense model")
        return self._keep_moes(ffn, self.encoder_moe_blocks, self.decoder_moe_blocks)

    def decode(self, target_BL: Tensor, memory: Memory) -> Tensor:
        """Map (B, L) ids, ``PAD_ID`` after a sentence's end, to the (B, L, D) normed output, causally."""
        context = core.RoutingContext(target_BL != PAD_ID, target_BL, memory.task_ids_B, memory.domain_ids_B)
        return self.decoder(self.embed_target(target_BL), context, memory.x_BSD, memory.valid_BS)

    @torch.no_grad()
    def start(self, memory: Memory) -> Cache:
        """Return an empty cache for decoding, with one row per sentence; ``Cache.expand`` makes several of each.

        Raises:
            ValueError: as ``check_steps``.
        """
        self.check_steps()
        return self._new_cache(
            len(memory),
            memory.x_BSD,
            memory=self.decoder.memory_keys(memory.x_BSD),
            memory_bias=key_bias(memory.valid_BS, self.config.shape.num_kv_heads, memory.x_BSD),
            task_ids_R=memory.task_ids_B,
            domain_ids_R=memory.domain_ids_B,
            source=None if self.copy_gate is None else memory,
        )

    def attention_to(self, memory: Memory, target_BL: Tensor) -> Tensor:
        """Return how much each decoder layer's head attends to each place of the memory, (layers, B, H, L, S)."""
        context = core.RoutingContext(target_BL != PAD_ID, target_BL, memory.task_ids_B, memory.domain_ids_B)
        return self.decoder.cross_attention(self.embed_target(target_BL), context, memory.x_BSD, memory.valid_BS)


class TranslationModel(MemoryDecoder):
    """An encoder-decoder that maps source ids to the logits of the target's.

    Args:
        config: the transformer.
        source_vocab: V of the source, or of both.
        target_vocab: V of the target; None: one joint vocabulary.
        ffn: FFN of the chosen blocks: an MoE layer, a list with one for each block, the encoder's first, or another
            dense FFN; None: the FFN of the other blocks.
        encoder_moe_blocks, decoder_moe_blocks: which blocks: "everyN", "lastN", "all", "none" or indices, as
            ``apps.nets.blocks.resolve_blocks`` has them; "every2" is blocks 1, 3, 5, ... Without ``ffn`` they are not
            asked.
        attention_moe: attention experts instead of the self-attention in all blocks; None: there are none.
        copies: words of the source can be copied, as ``CopyGate`` says: all logits are then log-probabilities.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.

    Example::

        model = TranslationModel(TransformerConfig("tiny"), source_vocab=8000, ffn=core.MoEConfig(num_experts=8))
        logits = model(source_BS, target_BL[:, :-1])         # (B, L - 1, 8000)
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        source_vocab: int,
        target_vocab: int | None = None,
        ffn: FFNConfig | MoEs | None = None,
        encoder_moe_blocks: Blocks = "every2",
        decoder_moe_blocks: Blocks = "every2",
        attention_moe: core.MoEConfig | None = None,
        copies: bool = False,
    ) -> None:
        super().__init__()
        check_rows(config, ffn, attention_moe)
        if copies and target_vocab is not None:
            raise ValueError(
                "copy=True copies subwords of the source, so both sides need one vocabulary: data.tokenizer.joint=true"
            )
        check_at_least(PAD_ID + 2, source_vocab=source_vocab, target_vocab=target_vocab)
        if target_vocab is not None and config.tie in ("all", "inputs"):
            raise ValueError(
                f"tie={config.tie!r} (model.transformer.tie) needs a joint vocabulary: with two, which "
                "data.tokenizer.joint=false makes, tie is 'decoder' or 'none'"
            )
        shape, self.config, self.attention_moe = config.shape, config, attention_moe
        self.source_vocab = source_vocab
        self.target_vocab = source_vocab if target_vocab is None else target_vocab
        of_encoder, of_decoder = self._choose(ffn, encoder_moe_blocks, shape.encoder_layers, decoder_moe_blocks)
        self.source_embed = nn.Embedding(source_vocab, shape.dim, padding_idx=PAD_ID)
        self.target_embed = (
            None if config.tie in ("all", "inputs") else nn.Embedding(self.target_vocab, shape.dim, padding_idx=PAD_ID)
        )
        self.encoder = build_stack(
            config, shape.encoder_layers, of_encoder, self.encoder_moe_blocks, attention_moe, causal=False, cross=False
        )
        self.decoder = build_stack(
            config, shape.decoder_layers, of_decoder, self.decoder_moe_blocks, attention_moe, causal=True, cross=True
        )
        own_output = config.tie in ("inputs", "none")
        self.output = cpu.Linear(shape.dim, self.target_vocab, bias=False) if own_output else None
        if copies:
            self.copy_gate = CopyGate(shape.dim)
        self.reset_parameters()

    def next_logits(self, h_BLD: Tensor, source: Memory | None, real_BL: Tensor | None = None) -> Tensor:
        if self.copy_gate is None:
            return super().next_logits(h_BLD, source, real_BL)
        assert source is not None
        assert source.ids_BS is not None
        weight_BLS, gate_BL1 = self.copy_gate(h_BLD, source)
        ids_BLS = source.ids_BS[:, None].expand(-1, h_BLD.shape[1], -1)
        parts = (h_BLD, weight_BLS, gate_BL1, ids_BLS)
        h, *others = parts if real_BL is None else [part[real_BL] for part in parts]
        return CopyGate.mix(self.logits(h), *others)

    @property
    def target_embedding(self) -> nn.Embedding:
        """The embedding of the target; the source's, if they are shared."""
        return self.source_embed if self.target_embed is None else self.target_embed

    def encode(self, source_BS: Tensor, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None) -> Memory:
        """Return the encoder's output.

        Args:
            source_BS: int64 (B, S) ids, ``PAD_ID`` after a sentence's end.
            task_ids_B, domain_ids_B: int64 (B,), for routers that ask for them, in the decoder too.
        """
        valid_BS = source_BS != PAD_ID
        context = core.RoutingContext(valid_BS, source_BS, task_ids_B, domain_ids_B)
        x_BSD = self.encoder(self.source_embed(source_BS), context)
        return Memory(x_BSD, valid_BS, task_ids_B, domain_ids_B, source_BS)

    def forward(
        self,
        source_BS: Tensor,
        target_BL: Tensor,
        task_ids_B: Tensor | None = None,
        domain_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Map (B, S) source and (B, L) target ids to (B, L, V) logits of the token after each; see ``encode``."""
        memory = self.encode(source_BS, task_ids_B, domain_ids_B)
        return self.next_logits(self.decode(target_BL, memory), memory)

    def cross_attention(
        self,
        source_BS: Tensor,
        target_BL: Tensor,
        task_ids_B: Tensor | None = None,
        domain_ids_B: Tensor | None = None,
    ) -> Tensor:
        """Return how much each decoder layer's head attends to each source token, (layers, B, H, L, S)."""
        return self.attention_to(self.encode(source_BS, task_ids_B, domain_ids_B), target_BL)


class LanguageModel(_Decoding):
    """The decoder by itself, which maps ids to the logits of the next.

    Args:
        config: the transformer; ``decoder_layers`` deep. ``tie``: all but "none" tie the output to the embedding.
        vocab: V.
        ffn: what ``moe_blocks`` have: an MoE layer, whose router must be causal, a list with one for each block, or
            another dense FFN; None: the FFN of the other blocks.
        moe_blocks: which blocks, as in ``TranslationModel``.
        depths: gates of the blocks that few tokens enter, with a predictor; None: all tokens enter all blocks.
        depth_blocks: which blocks those are.
        attention_moe: as in ``TranslationModel``.
        share_experts: all MoE layers have one set of experts; see ``apps.nets.blocks.share_experts``.
        universal: one layer for all ``decoder_layers`` steps, until a token halts; it is the only block that
            ``moe_blocks`` can name, and ``depths`` and ``share_experts`` do not go with it. None: a layer for each.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    def __init__(
        self,
        config: TransformerConfig,
        *,
        vocab: int,
        ffn: FFNConfig | MoEs | None = None,
        moe_blocks: Blocks = "all",
        depths: MixtureOfDepths | None = None,
        depth_blocks: Blocks = "every2",
        attention_moe: core.MoEConfig | None = None,
        share_experts: bool = False,
        universal: Universal | None = None,
    ) -> None:
        super().__init__()
        check_rows(config, ffn, attention_moe)
        check_at_least(PAD_ID + 2, vocab=vocab)
        if universal is not None:
            universal.check(config, depths is not None, len(moe_configs(ffn)), share_experts)
        if depths is not None and attention_moe is not None:
            raise ValueError("depths and attention_moe do not go together: attention experts see all tokens of a layer")
        if depths is not None and not depths.predictor:
            raise ValueError(
                "depths.predictor=False lets later tokens change earlier ones: a causal decoder needs "
                "depths.predictor=true"
            )
        self.config, self.vocab, self.attention_moe = config, vocab, attention_moe
        depth = config.shape.decoder_layers if universal is None else 1
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, depth, optional=True)
        if ffn is not None and not self.moe_blocks:
            raise ValueError(f"moe_blocks={moe_blocks!r} names no block: leave moe out for a dense model")
        self.embed = nn.Embedding(vocab, config.shape.dim, padding_idx=PAD_ID)
        self.depths, self.universal = depths, universal
        gates = depth_gates(depths, depth_blocks, depth, config.shape.dim)
        (of_decoder,) = self._keep_moes(ffn, self.moe_blocks)
        if universal is None:
            self.decoder = build_stack(
                config, depth, of_decoder, self.moe_blocks, attention_moe, causal=True, cross=False, gates=gates
            )
        else:
            (own,) = of_decoder or (config.dense_ffn,)
            built, steps = own.build(config.shape.dim, causal=True), config.shape.decoder_layers
            self.decoder = UniversalStack(config, built, universal, steps=steps, attention=attention_moe)
        self.shares_experts = share_experts
        if share_experts:
            blocks.share_experts(self.decoder, ffn)
        self.output = cpu.Linear(config.shape.dim, vocab, bias=False) if config.tie == "none" else None
        self.reset_parameters()

    @property
    def target_embedding(self) -> nn.Embedding:
        return self.embed

    def hidden(self, tokens_BL: Tensor, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None) -> Tensor:
        """Map (B, L) ids, ``PAD_ID`` after a text's end, to the (B, L, D) normed output; see ``routed_by``."""
        context = core.RoutingContext(tokens_BL != PAD_ID, tokens_BL, **routed_by(task_ids_B, domain_ids_B))
        return self.decoder(self.embed_target(tokens_BL), context)

    def forward(
        self, tokens_BL: Tensor, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None
    ) -> Tensor:
        """Map (B, L) ids to (B, L, V) logits of the token after each."""
        return self.logits(self.hidden(tokens_BL, task_ids_B, domain_ids_B))

    @torch.no_grad()
    def start(self, num_rows: int, task_ids_B: Tensor | None = None, domain_ids_B: Tensor | None = None) -> Cache:
        """Return an empty cache for decoding ``num_rows`` texts; see ``TranslationModel.start``."""
        self.check_steps()
        return self._new_cache(num_rows, self.embed.weight, task_ids_R=task_ids_B, domain_ids_R=domain_ids_B)


def build_stack(
    config: TransformerConfig,
    depth: int,
    ffns: Sequence[FFNConfig],
    moe_blocks: tuple[int, ...],
    attention: core.MoEConfig | None,
    *,
    causal: bool,
    cross: bool,
    gates: Sequence[DepthGate | None] | None = None,
) -> Stack:
    """Return an encoder's or a decoder's layers.

    Args:
        config: the transformer.
        depth: number of layers.
        ffns: FFN of each of ``moe_blocks``; the others have the dense one of ``config``.
        moe_blocks: which layers those are.
        attention, causal, cross: as in ``Stack``.
        gates: its ``depth_gates``.
    """
    own = dict(zip(moe_blocks, ffns, strict=True))
    configs = [own.get(i, config.dense_ffn) for i in range(depth)]
    built = [c.build(config.shape.dim, causal=causal) for c in configs]
    return Stack(config, built, causal=causal, cross=cross, attention=attention, depth_gates=gates)
