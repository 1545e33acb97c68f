"""A history transformer for the next item: SASRec, HSTU, or two experts for mixing the positions, as in AdaMCT.

SASRec (arXiv 1808.09781) is a causal transformer over the items a user took, whose output is compared with the item
embeddings. HSTU (arXiv 2402.17152) has pointwise attention with a gate instead of its attention, and no FFN. AdaMCT
(arXiv 2205.08776) mixes positions by two experts, a local convolution and global attention, weighted by a gate in each
layer. All are ``HistoryModel``, made of the layers of ``apps.nets``; a block's FFN may be a mixture of experts besides.
Histories are packed: only attention and the MoE layers' routers see them padded.

AdaMCT predicts only the item after the last one, and its gate and squeeze-excitation read the whole sequence. Here
every position predicts its successor, so all is causal: the convolution looks back, each position has its own gate, and
squeeze-excitation is left out.
"""

from __future__ import annotations

import math
from collections.abc import Sequence
from dataclasses import dataclass
from typing import Literal

import torch
import torch.nn.functional as F
from torch import Tensor, nn

import core
from apps.base.checks import check_at_least
from apps.nets.attention import Mask, SelfAttention, self_mask
from apps.nets.blocks import FFNConfig, ffn_configs, resolve_blocks
from apps.nets.config import TransformerConfig
from apps.nets.layers import Layer, Pass
from apps.nets.loss import linear_cross_entropy
from apps.nets.norms import build_norm
from apps.nets.packing import Packing
from apps.nets.pair_bias import PairBias
from apps.nets.place import Place, check_fits
from apps.nets.pointwise import PointwiseAttention
from apps.nets.positions import Learned
from apps.recsys.sequence.generative import CodeDecoder, CodeEmbedding
from apps.recsys.sequence.semantic_ids import SemanticIdsConfig
from core.fields import Checked, Count, CountOrZero, Depth, ShareBelowOne
from core.kernels import cpu

EXPERTS = ("convolution", "attention")
"""The experts of a ``TokenMixing`` layer, in the order of its gates."""

_DENSE = core.Dense()
_UNBALANCED = core.Balance(load_balancing_loss=0.0, router_z_loss=0.0)


@core.register_config
@dataclass(frozen=True)
class HistoryModelConfig(Checked):
    """The transformer around the MoE layers.

    Attributes:
        dim: width D of the item embeddings and of the model.
        depth: number of blocks.
        num_heads: attention heads; must divide ``dim``.
        hidden_dim: FFN hidden dim F of the dense blocks; None: 4 * dim, and with "hstu" no FFN in them, as published.
        mixing: "mixture": convolution and attention, weighted by a gate; "attention": only attention, as SASRec;
            "hstu": pointwise attention with a gate.
        kernel_size: items the convolution sees, the current one and those before it.
        mixing_router: weights the two experts of "mixture" for each position; it must be causal. ``core.Dense``: a
            softmax over both, which is AdaMCT's sigmoid; a router with ``top_k=1`` takes one of the two.
        mixing_balance: weights of the balance losses of that router.
        embed_dropout: dropout of the embeddings.
        dropout: dropout of each layer's contribution to the residual stream.
        attn_dropout: dropout of the attention weights; sampling it for L x L weights is slow on a CPU.
        distance_bias: each head adds a learned bias by the distance of two items to their attention score; None: with
            "hstu", as published.
        time_buckets: rows of a table of such biases by the time between two items (``apps.nets.pair_bias``); 0: none.
            64 tell apart times up to a century, two for each doubling. The data must have times.
    """

    dim: Count = 64
    depth: Depth = 2
    num_heads: Count = 2
    hidden_dim: Count | None = None
    mixing: Literal["mixture", "attention", "hstu"] = "mixture"
    kernel_size: Count = 3
    mixing_router: core.RouterConfig = _DENSE
    mixing_balance: core.Balance = _UNBALANCED
    embed_dropout: ShareBelowOne = 0.2
    dropout: ShareBelowOne = 0.2
    attn_dropout: ShareBelowOne = 0.0
    distance_bias: bool | None = None
    time_buckets: CountOrZero = 0

    def __post_init__(self) -> None:
        super().__post_init__()
        _ = self.transformer  # checks the common parts of the transformers
        if self.mixing == "mixture":
            router = self.mixing_router
            router.check(len(EXPERTS))
            if router.layer_kind != "pairs":
                raise ValueError(f"mixing_router={router.source()} has no gates")
            check_fits(Place("the mixing of positions", (), is_causal=True), router)
            self.mixing_balance.check(router.terms, router.source())

    @property
    def transformer(self) -> TransformerConfig:
        """The config of the layers of ``apps.nets``. The model adds positions itself."""
        return TransformerConfig(
            dim=self.dim,
            hidden_dim=4 * self.dim if self.hidden_dim is None else self.hidden_dim,
            num_heads=self.num_heads,
            decoder_layers=self.depth,
            positions="none",
            activation="gelu",
            dropout=self.dropout,
            attn_dropout=self.attn_dropout,
            embed_dropout=self.embed_dropout,
        )

    @property
    def dense_ffn(self) -> core.DenseFFN | None:
        """The FFN of the dense blocks; None: they have none."""
        return None if self.mixing == "hstu" and self.hidden_dim is None else self.transformer.dense_ffn

    @property
    def has_pair_bias(self) -> bool:
        """Attention scores have biases by distance, or by distance and time."""
        by_distance = self.mixing == "hstu" if self.distance_bias is None else self.distance_bias
        return by_distance or self.time_buckets > 0

    def extra_flops_per_token(self) -> int:
        """Return the forward FLOPs per token that the mixing costs in a block compared with attention, two a
        multiply-add."""
        if self.mixing == "hstu":
            return 2 * self.dim**2  # u
        if self.mixing == "attention":
            return 0
        return 2 * self.kernel_size * self.dim**2 + self.mixing_router.flops_per_token(self.dim, len(EXPERTS))

    def extra_params(self) -> int:
        """Return the parameters that the mixing has in a block in addition to attention's: of HSTU u and a norm, of the
        mixture convolution, two norms and the gate."""
        if self.mixing == "hstu":
            return self.dim**2 + self.dim + 2 * self.dim
        if self.mixing == "attention":
            return 0
        conv = self.kernel_size * self.dim**2 + self.dim
        return conv + 4 * self.dim + self.mixing_router.num_params(self.dim, len(EXPERTS))


def self_attention(config: HistoryModelConfig, *, project: bool = True) -> SelfAttention:
    """Return the attention of a layer, by explicit matmuls.

    On a CPU fused attention gains nothing at some hundred positions, and loses at some ten.
    """
    return SelfAttention(config.transformer, project=project, fused=False)


def build_mixing(config: HistoryModelConfig, max_length: int) -> nn.Module:
    """Return what mixes the positions in a block."""
    if config.mixing == "mixture":
        return TokenMixing(config)
    return PointwiseAttention(config.transformer, max_length) if config.mixing == "hstu" else self_attention(config)


class CausalConvolution(nn.Module):
    """``gelu(W [x_t, x_{t-1}, ...] + b)`` over the last ``kernel_size`` items; zeros before the first one."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.proj = cpu.Linear(kernel_size * dim, dim)

    def forward(
        self, x_TD: Tensor, mask: Mask | None = None, rotations: None = None, packing: Packing | None = None
    ) -> Tensor:
        """Map (T, D) to (T, D), under the interface of ``SelfAttention``."""
        assert packing is not None
        shifted = [x_TD]
        for k in range(1, self.kernel_size):
            # The row before in T is the item before, unless this one is among the first k of its history.
            first_T1 = (packing.position_T < k)[:, None]
            shifted.append(x_TD.roll(k, 0).masked_fill(first_T1, 0.0))
        return F.gelu(self.proj(torch.cat(shifted, -1)))


class TokenMixing(core.MoELayer):
    """A local and a global expert, weighted by a gate of each position (AdaMCT, section 3.4).

    ``y_t = W_out (sum over e of gate_e(x_t) * norm_e(f_e(x)_t))``, where f_e are the convolution and attention. Both
    experts compute every position, whatever the gates, since a later position may attend to any. The routing continues
    the tape as in other MoE layers; with ``core.Dense`` it is a ``DenseRouting``, whose load is the sum of the gates.

    Args:
        config: sizes, router and balance losses.
    """

    def __init__(self, config: HistoryModelConfig) -> None:
        super().__init__(config.mixing_balance)
        self.router = config.mixing_router.build(config.dim, len(EXPERTS))
        self._is_dense = isinstance(config.mixing_router, core.Dense)
        self.experts = nn.ModuleDict(  # type: ignore[assignment]
            {
                "convolution": CausalConvolution(config.dim, config.kernel_size),
                "attention": self_attention(config, project=False),
            }
        )
        # Averages of many values are smaller than a convolution's output: the gate would weigh unlike things.
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.dim) for name in EXPERTS})
        self.out = cpu.Linear(config.dim, config.dim)

    def forward(  # type: ignore[override]
        self, x_TD: Tensor, mask: Mask, rotations: None = None, packing: Packing | None = None
    ) -> Tensor:
        """Map (T, D) to (T, D), under the interface of ``SelfAttention``."""
        routing = self.router(x_TD[None])
        gates_TE = dense_gates(routing, len(EXPERTS))
        self.record_pass(self._dense(routing, gates_TE) if self._is_dense else routing)
        mixed_TD = torch.zeros((), device=x_TD.device)
        for e, name in enumerate(EXPERTS):
            y_TD = self.norms[name](self.experts[name](x_TD, mask, rotations, packing))  # type: ignore[index]
            mixed_TD = mixed_TD + gates_TE[:, e : e + 1].to(y_TD.dtype) * y_TD
        return self.out(mixed_TD)

    @staticmethod
    def _dense(routing: core.Routing, gates_TE: Tensor) -> core.DenseRouting:
        """Return the routing of positions that all take both experts: its load sums gates and counts nothing."""
        logits_TE = routing.evidence.logits_TE
        return core.DenseRouting(
            gates_BtE=gates_TE[:, None],
            gate=0,
            num_tokens=routing.num_tokens,
            logits_BtE=None if logits_TE is None else logits_TE[:, None],
            expert_names=EXPERTS,
        )

    def active_expert_params(self) -> int:
        return self.all_expert_params()


def dense_gates(routing: core.Routing, num_experts: int) -> Tensor:
    """Return the gates of routed pairs as a matrix, float32 (T, E); 0 if a token does not take an expert."""
    T, E = routing.num_tokens, num_experts
    # Column E takes the pairs that are not computed.
    place_N = routing.token_index_N * (E + 1) + routing.expert_ids_N
    flat = routing.gates_N.new_zeros(T * (E + 1)).index_add(0, place_N, routing.gates_N)
    return flat.view(T, E + 1)[:, :E]


class HistoryModel(nn.Module):
    """A network from histories of items to scores of the next item.

    Args:
        config: the transformer.
        num_items: number of items, which count from 1; 0 is padding.
        max_length: items of the longest history.
        ffn: FFN of ``moe_blocks``: an MoE layer, whose router must be causal, or another dense FFN; None: the same as
            in the other blocks.
        moe_blocks: which blocks; see ``apps.nets.blocks.resolve_blocks``.
        semantic_ids: items are codes, which a decoder generates; it has ``ffn`` too. None: each has a vector.

    Raises:
        ValueError: a value is out of its range, or the parts do not fit together.
    """

    def __init__(
        self,
        config: HistoryModelConfig,
        *,
        num_items: int,
        max_length: int,
        ffn: FFNConfig | None = None,
        moe_blocks: str | Sequence[int] = "all",
        semantic_ids: SemanticIdsConfig | None = None,
    ) -> None:
        super().__init__()
        check_at_least(1, num_items=num_items, max_length=max_length)
        self.config, self.num_items, self.max_length = config, num_items, max_length
        self.moe_blocks = resolve_blocks(moe_blocks, config.depth)
        self.item_embed: nn.Embedding | CodeEmbedding = nn.Embedding(num_items + 1, config.dim, padding_idx=0)
        self.generator: CodeDecoder | None = None
        if semantic_ids is not None:
            self.item_embed = CodeEmbedding(semantic_ids, num_items, config.dim)
            self.generator = CodeDecoder(semantic_ids, config.transformer, ffn)
        self.pos_embed = nn.Embedding(max_length, config.dim)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        transformer, dense = config.transformer, config.dense_ffn
        self.pair_bias: PairBias | None = None
        if config.has_pair_bias:
            self.pair_bias = PairBias(config.num_heads, max_length, config.time_buckets)
        self.blocks = nn.ModuleList()
        for i, chosen in enumerate(ffn_configs(transformer.dense_ffn, config.depth, ffn, self.moe_blocks)):
            has_ffn = dense is not None or (ffn is not None and i in self.moe_blocks)
            block_ffn = chosen.build(config.dim, causal=True) if has_ffn else None
            self.blocks.append(Layer(transformer, block_ffn, mixing=build_mixing(config, max_length)))
        self.norm = build_norm(transformer)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Draw matrices Xavier-uniform, each expert's by itself as a dense FFN's, and embeddings normal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
            elif isinstance(module, Learned):
                nn.init.normal_(module.weight, std=0.02)
        for module in self.modules():
            if isinstance(module, core.Experts):
                module.init_each(nn.init.xavier_uniform_)
        nn.init.normal_(self.item_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed.weight, std=0.02)
        if isinstance(self.item_embed, nn.Embedding):
            with torch.no_grad():
                self.item_embed.weight[0] = 0.0

    def set_codes(self, codes_NL: Tensor) -> None:
        """Set the semantic ids of the items, int64 (num_items, levels + 1); see ``CodeEmbedding``."""
        assert isinstance(self.item_embed, CodeEmbedding)
        self.item_embed.set_codes(codes_NL)

    def encode(self, items_BS: Tensor, seconds_BS: Tensor | None = None) -> tuple[Tensor, Packing, Tensor]:
        """Return the last layer's output at each real item.

        Args:
            items_BS: int64 (B, S) item ids, 0 for padding, which may be anywhere.
            seconds_BS: int64 (B, S), their times in whole seconds, ascending, for ``time_buckets``; None: the items of
                a history were taken at one time.

        Returns:
            (T, D) normed output, the packing of the T real items, and their int64 (T,) indices in the flattened
            ``items_BS``.

        Raises:
            ValueError: an id is negative or beyond ``num_items``, a history is longer than ``max_length``, or the times
                have another shape than the items.
        """
        if items_BS.ndim != 2 or items_BS.is_floating_point():
            raise ValueError(f"items are {items_BS.dtype} of shape {tuple(items_BS.shape)}, not integers (B, S)")
        check_ids(items_BS, self.num_items, "item", "padding")
        if seconds_BS is not None and seconds_BS.shape != items_BS.shape:
            raise ValueError(f"times of shape {tuple(seconds_BS.shape)} are not of the items {tuple(items_BS.shape)}")
        packing, index_T = Packing.of(items_BS > 0)
        if not torch.compiler.is_exporting() and packing.length > self.max_length:  # a runtime lacks the place
            raise ValueError(f"a history of {packing.length} items is longer than max_length={self.max_length}")
        items_T = items_BS.flatten()[index_T]
        context = core.RoutingContext(
            valid_BS=packing.valid_BL(), token_ids_BS=packing.pad(items_T[:, None]).squeeze(-1)
        )
        x_TD = self.item_embed(items_T) * math.sqrt(self.config.dim) + self.pos_embed(packing.position_T)
        x_TD = self.embed_dropout(x_TD)
        given = Pass(self._mask(x_TD, packing, index_T, seconds_BS), context, packing=packing)
        for block in self.blocks:
            x_TD = block(x_TD, given)
        return self.norm(x_TD), packing, index_T

    def _mask(self, x_TD: Tensor, packing: Packing, index_T: Tensor, seconds_BS: Tensor | None) -> Mask:
        """Return the mask of all layers. Rows are filled from the left, so it keeps padding from every real query."""
        like_BL0 = x_TD.new_empty(packing.num_rows, packing.length, 0)
        if self.pair_bias is None:
            return self_mask(like_BL0, self.config.num_heads, valid_BL=None, causal=True, relative_HLL=None)
        seconds_BL = None
        if seconds_BS is not None and self.config.time_buckets:
            seconds_BL = packing.pad(seconds_BS.flatten()[index_T][:, None]).squeeze(-1)
        return self.pair_bias.mask(like_BL0, seconds_BL)

    @property
    def output_weight(self) -> Tensor:
        """The output weight (num_items, D), a view of the embedding: row i scores item i + 1. Not with semantic ids."""
        return self.item_embed.weight[1:]

    def loss(self, h_TD: Tensor, target_T: Tensor, left_out: Tensor | None = None) -> Tensor:
        """Return the mean cross-entropy over all items, (), of outputs (T, D) and the ids of the items that follow.

        ``left_out`` is as in ``linear_cross_entropy``, without a meaning for semantic ids.
        """
        if isinstance(self.item_embed, CodeEmbedding):
            assert self.generator is not None
            return self.generator.loss(h_TD, target_T, self.item_embed)
        return linear_cross_entropy(h_TD, self.output_weight, target_T - 1, left_out=left_out)

    def scores(self, h_BD: Tensor, seen_BH: Tensor | None = None) -> Tensor:
        """Return the score of each item as the next one, float32 (B, num_items + 1) by id.

        With semantic ids it is log p of those that the beam search finds. Padding, other items and those of
        ``seen_BH``, int64 (B, H), have -inf.
        """
        if isinstance(self.item_embed, CodeEmbedding):
            assert self.generator is not None
            return self.generator.scores(h_BD, self.item_embed, seen_BH)
        # In bfloat16 many items would tie.
        with torch.autocast(h_BD.device.type, enabled=False):
            h_BD = h_BD if h_BD.dtype == torch.float64 else h_BD.float()
            logits_BV = cpu.linear(h_BD, self.output_weight.to(h_BD.dtype))
        scores_BI = F.pad(logits_BV, (1, 0), value=-math.inf)
        return scores_BI if seen_BH is None else scores_BI.scatter(1, seen_BH, -math.inf)

    def forward(self, items_BS: Tensor, seconds_BS: Tensor | None = None, seen_BH: Tensor | None = None) -> Tensor:
        """Map histories (B, S) to scores (B, num_items + 1) of the item after the last one; see ``encode``.

        A history without any item scores all items 0, or with semantic ids those that are found.
        """
        h_TD, packing, _ = self.encode(items_BS, seconds_BS)
        return self.scores(last_of(h_TD, packing), seen_BH)


def check_ids(ids: Tensor, num_items: int, kind: str, zero: str) -> None:
    """Raise a ValueError that names an id which is not in 0 to ``num_items``, its ``kind`` and the meaning of 0."""
    is_known = ids.numel() and not ids.is_meta and not torch.compiler.is_exporting()
    for value in map(int, ids.aminmax()) if is_known else ():
        if not 0 <= value <= num_items:
            raise ValueError(f"{kind} id {value} is not in 0 to num_items={num_items} (0 is {zero})")


def last_of(h_TD: Tensor, packing: Packing) -> Tensor:
    """Return the output at each row's last item, (B, D); zeros where a row has none."""
    if len(h_TD) == 0:
        return h_TD.new_zeros(packing.num_rows, h_TD.shape[-1])
    last_BD = h_TD.index_select(0, packing.last_B.clamp_min(0))
    return last_BD.masked_fill((packing.last_B < 0)[:, None], 0.0)


def best_items(scores_BI: Tensor, k: int) -> tuple[list[list[int]], list[list[float]]]:
    """Return the ids of the k best items of each history, the best first, and their scores; fewer where fewer are
    candidates, whose score is above -inf."""
    best = scores_BI.topk(min(k, scores_BI.shape[1] - 1), dim=-1)
    num_B = (best.values > -math.inf).sum(1).tolist()
    ids, scores = ([row[:num] for row, num in zip(x.tolist(), num_B, strict=True)] for x in (best.indices, best.values))
    return ids, scores
