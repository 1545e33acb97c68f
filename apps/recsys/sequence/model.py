"""A history transformer for the next item: SASRec, or with two experts for mixing the positions, as in AdaMCT.

SASRec (arXiv 1808.09781) is a causal transformer over the items a user took, whose output is compared with the item
embeddings. AdaMCT (arXiv 2205.08776) mixes positions by two experts, a local convolution and global attention, weighted
by a gate in each layer. Both are ``HistoryModel``; a block's FFN may be a mixture of experts besides.

What differs from AdaMCT: it predicts the item after the last one alone, and its gate and squeeze-excitation read the
whole sequence. Here every position predicts its successor, so all is causal: the convolution looks back, the gate is of
each position, and there is no squeeze-excitation.
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
from apps.nets.blocks import resolve_blocks
from core.kernels import cpu

EXPERTS = ("convolution", "attention")
"""The experts of a ``TokenMixing`` layer, in the order of its gates."""

_DENSE = core.Dense()
_UNBALANCED = core.Balance(load_balancing=0.0, router_z=0.0)


@core.register_config
@dataclass(frozen=True)
class HistoryModelConfig:
    """The transformer around the MoE layers.

    Attributes:
        dim: width D of the item embeddings and of the model.
        depth: number of blocks.
        num_heads: attention heads; must divide ``dim``.
        hidden_dim: FFN hidden dim F of the dense blocks; None: 4 * dim.
        mixing: "mixture": convolution and attention, weighted by a gate; "attention": attention alone, as SASRec.
        kernel_size: items the convolution sees, the current one and those before it.
        mixing_router: weights the two experts of "mixture" for each position; it must be causal. ``core.Dense``: a
            softmax over both, which is AdaMCT's sigmoid; a router with ``top_k=1`` takes one of the two.
        mixing_balance: weights of the balance losses of that router.
        embed_dropout: dropout of the embeddings.
        dropout: dropout of what each layer adds to the residual stream.
        attn_dropout: dropout of the attention weights; drawing it for L x L weights slows a CPU down.
    """

    dim: int = 64
    depth: int = 2
    num_heads: int = 2
    hidden_dim: int | None = None
    mixing: Literal["mixture", "attention"] = "mixture"
    kernel_size: int = 3
    mixing_router: core.RouterConfig = _DENSE
    mixing_balance: core.Balance = _UNBALANCED
    embed_dropout: float = 0.2
    dropout: float = 0.2
    attn_dropout: float = 0.0

    def __post_init__(self) -> None:
        for name in ("dim", "depth", "num_heads", "kernel_size", "dense_hidden_dim"):
            if getattr(self, name) < 1:
                shown = "hidden_dim" if name == "dense_hidden_dim" else name
                raise ValueError(f"{shown}={getattr(self, name)} must be at least 1")
        if self.dim % self.num_heads:
            raise ValueError(f"dim={self.dim} is not divisible by num_heads={self.num_heads}")
        if self.mixing not in ("mixture", "attention"):
            raise ValueError(f"mixing={self.mixing!r} is not one of mixture, attention")
        for name in ("embed_dropout", "dropout", "attn_dropout"):
            if not 0.0 <= getattr(self, name) < 1.0:
                raise ValueError(f"{name}={getattr(self, name)} is not in [0, 1)")
        if self.mixing == "mixture":
            self._check_router()

    def _check_router(self) -> None:
        router = self.mixing_router
        router.check(len(EXPERTS))
        if router.layer_kind() != "pairs" or not router.is_causal():
            raise ValueError(f"mixing_router={router.source()} lets later items change earlier ones, or has no gates")
        if router.needs():
            raise ValueError(
                f"mixing_router={router.source()} needs context.{router.needs()[0]}, which it is not given"
            )
        self.mixing_balance.check(router.balance_terms(), router.source())

    @property
    def dense_hidden_dim(self) -> int:
        """FFN hidden dim F of the dense blocks, 4 * D unless set."""
        return 4 * self.dim if self.hidden_dim is None else self.hidden_dim

    def mixture_flops_per_token(self) -> int:
        """Forward FLOPs a token that "mixture" costs beside attention, two a multiply-add, in one block."""
        return 2 * self.kernel_size * self.dim**2 + self.mixing_router.flops_per_token(self.dim, len(EXPERTS))

    def mixture_params(self) -> int:
        """Parameters that "mixture" has beside attention's, in one block: convolution, two norms, gate."""
        conv = self.kernel_size * self.dim**2 + self.dim
        return conv + 4 * self.dim + self.mixing_router.num_params(self.dim, len(EXPERTS))


@dataclass(frozen=True)
class Packing:
    """Where the real items of a batch lie. Padding takes no part in any product but the attention's.

    Attributes:
        slot_T: int64 (T,), ``row * length + position`` of each real item, ascending: row by row.
        position_T: int64 (T,), real items before it in its row.
        last_B: int64 (B,), the place in T of each row's last item; -1 where it has none.
        num_rows: B.
        length: L, real items of the longest row; 1 where there is none at all.
    """

    slot_T: Tensor
    position_T: Tensor
    last_B: Tensor
    num_rows: int
    length: int

    @classmethod
    def of(cls, valid_BS: Tensor) -> tuple[Packing, Tensor]:
        """The packing, and int64 (T,) indices of the real items in the flattened ``valid_BS``."""
        B, S = valid_BS.shape
        index_T = valid_BS.flatten().nonzero().squeeze(1)
        count_B = valid_BS.sum(1)
        length = max(int(count_B.max()), 1) if B else 1
        position_T = (valid_BS.cumsum(1) - 1).flatten()[index_T]
        row_T = index_T // max(S, 1)
        last_B = torch.where(count_B > 0, count_B.cumsum(0) - 1, -1)
        return cls(row_T * length + position_T, position_T, last_B, B, length), index_T

    @property
    def is_full(self) -> bool:
        """No row is shorter than L."""
        return len(self.slot_T) == self.num_rows * self.length

    def pad(self, x_TC: Tensor) -> Tensor:
        """(T, C) to (B, L, C), each row's items first and zeros after them."""
        if not self.is_full:
            flat = x_TC.new_zeros(self.num_rows * self.length, x_TC.shape[-1])
            x_TC = flat.index_copy(0, self.slot_T, x_TC)
        return x_TC.view(self.num_rows, self.length, x_TC.shape[-1])

    def pack(self, x_BLC: Tensor) -> Tensor:
        """(B, L, C) to (T, C)."""
        flat = x_BLC.flatten(0, 1)
        return flat if self.is_full else flat.index_select(0, self.slot_T)

    def valid_BL(self) -> Tensor | None:
        """bool (B, L), True for real items; None where all are."""
        if self.is_full:
            return None
        flat = torch.zeros(self.num_rows * self.length, dtype=torch.bool, device=self.slot_T.device)
        return flat.index_fill(0, self.slot_T, True).view(self.num_rows, self.length)


class CausalAttention(nn.Module):
    """Causal multi-head self-attention without its output projection: (T, D) to the heads' values, (T, D)."""

    def __init__(self, dim: int, num_heads: int, dropout: float) -> None:
        super().__init__()
        self.num_heads, self.dropout = num_heads, dropout
        self.qkv = cpu.Linear(dim, 3 * dim)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        # Rows are filled from the left, so the causal mask keeps padding from every real query.
        qkv_BLC = packing.pad(self.qkv(x_TD))
        B, L, C = qkv_BLC.shape
        q, k, v = qkv_BLC.view(B, L, 3, self.num_heads, C // (3 * self.num_heads)).permute(2, 0, 3, 1, 4)
        with torch.autocast(x_TD.device.type, enabled=False):
            y_BHLd = causal_attention(q, k, v, self.dropout if self.training else 0.0)
        return packing.pack(y_BHLd.transpose(1, 2).flatten(2))


def causal_attention(q: Tensor, k: Tensor, v: Tensor, dropout: float = 0.0) -> Tensor:
    """``softmax(q k^T / sqrt(d)) v`` of (B, H, L, d) tensors, where a query sees the keys up to its own position."""
    if q.is_cuda:
        return F.scaled_dot_product_attention(q, k, v, dropout_p=dropout, is_causal=True)
    # Explicit products: on a CPU the fused ones gain nothing at some hundred positions, and lose at some ten.
    B, H, L, d = q.shape
    q, k, v = (x.reshape(B * H, L, d) for x in (q, k, v))
    later_LL = q.new_full((L, L), -math.inf).triu(1)
    weights = torch.baddbmm(later_LL, q, k.transpose(1, 2), alpha=1 / math.sqrt(d)).softmax(-1)
    return (F.dropout(weights, dropout) @ v).view(B, H, L, d)


class CausalConvolution(nn.Module):
    """``gelu(W [x_t, x_{t-1}, ...] + b)`` over the last ``kernel_size`` items; zeros before the first one."""

    def __init__(self, dim: int, kernel_size: int) -> None:
        super().__init__()
        self.kernel_size = kernel_size
        self.proj = cpu.Linear(kernel_size * dim, dim)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        shifted = [x_TD]
        for k in range(1, self.kernel_size):
            # The row before in T is the item before, unless this one is among the first k of its history.
            first_T1 = (packing.position_T < k)[:, None]
            shifted.append(x_TD.roll(k, 0).masked_fill(first_T1, 0.0))
        return F.gelu(self.proj(torch.cat(shifted, -1)))


class SelfAttention(nn.Module):
    """SASRec's mixing of positions: attention and an output projection."""

    def __init__(self, config: HistoryModelConfig) -> None:
        super().__init__()
        self.attention = CausalAttention(config.dim, config.num_heads, config.attn_dropout)
        self.out = cpu.Linear(config.dim, config.dim)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:
        """(T, D) to (T, D)."""
        return self.out(self.attention(x_TD, packing))


class TokenMixing(core.MoELayer):
    """A local and a global expert, weighted by a gate of each position (AdaMCT, section 3.4).

    ``y_t = W_out (sum over e of gate_e(x_t) * norm_e(f_e(x)_t))``, f the convolution and attention. Both experts
    compute every position, whatever the gates: a later position may attend to any. The routing goes on the tape, as
    that of other MoE layers does: with ``core.Dense`` as a ``DenseRouting``, whose load is the sum of the gates.

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
                "attention": CausalAttention(config.dim, config.num_heads, config.attn_dropout),
            }
        )
        # Averages of many values are smaller than a convolution's output: the gate would weigh unlike things.
        self.norms = nn.ModuleDict({name: nn.LayerNorm(config.dim) for name in EXPERTS})
        self.out = cpu.Linear(config.dim, config.dim)

    def forward(self, x_TD: Tensor, packing: Packing) -> Tensor:  # type: ignore[override]
        """(T, D) to (T, D)."""
        routing = self.router(x_TD[None])
        gates_TE = dense_gates(routing, len(EXPERTS))
        self._record(self._dense(routing, gates_TE) if self._is_dense else routing, None)
        mixed_TD = torch.zeros((), device=x_TD.device)
        for e, name in enumerate(EXPERTS):
            y_TD = self.norms[name](self.experts[name](x_TD, packing))  # type: ignore[index]
            mixed_TD = mixed_TD + gates_TE[:, e : e + 1].to(y_TD.dtype) * y_TD
        return self.out(mixed_TD)

    @staticmethod
    def _dense(routing: core.Routing, gates_TE: Tensor) -> core.DenseRouting:
        """Where all take both experts, the load is the sum of the gates and not a count."""
        return core.DenseRouting(
            gates_BtE=gates_TE[:, None],
            gate=0,
            num_tokens=routing.num_tokens,
            logits_BtE=None if routing.logits_TE is None else routing.logits_TE[:, None],
            expert_names=EXPERTS,
        )

    def active_expert_params(self) -> int:
        return sum(p.numel() for p in self.experts.parameters())


def dense_gates(routing: core.Routing, num_experts: int) -> Tensor:
    """float32 (T, E), the gates of routed pairs as a matrix; 0 where a token does not take an expert."""
    T, E = routing.num_tokens, num_experts
    # Column E takes the pairs that are not computed.
    place_N = routing.token_index_N * (E + 1) + routing.expert_ids_N
    flat = routing.gates_N.new_zeros(T * (E + 1)).index_add(0, place_N, routing.gates_N)
    return flat.view(T, E + 1)[:, :E]


class HistoryBlock(nn.Module):
    """Pre-norm block: mixing of positions, then the FFN, which may be an MoE layer."""

    def __init__(self, config: HistoryModelConfig, ffn: nn.Module) -> None:
        super().__init__()
        self.norm1, self.norm2 = nn.LayerNorm(config.dim), nn.LayerNorm(config.dim)
        self.mixing = TokenMixing(config) if config.mixing == "mixture" else SelfAttention(config)
        self.ffn = ffn
        self.dropout = nn.Dropout(config.dropout)

    def forward(self, x_TD: Tensor, packing: Packing, context: core.RoutingContext) -> Tensor:
        """(T, D) to (T, D); ``context`` is of the padded (B, L) layout."""
        x_TD = x_TD + self.dropout(self.mixing(self.norm1(x_TD), packing))
        h_TD = self.norm2(x_TD)
        if isinstance(self.ffn, core.MoELayer):
            # Padded again, as what routers know is by sequence; padding is not computed.
            h_TD = packing.pack(self.ffn(packing.pad(h_TD), context))
        else:
            h_TD = self.ffn(h_TD)
        return x_TD + self.dropout(h_TD)


class HistoryModel(nn.Module):
    """Histories of items to scores of the next item.

    Args:
        config: the transformer.
        num_items: items, numbered from 1; 0 is padding.
        max_length: items of the longest history.
        moe: the MoE layer in place of the FFN of ``moe_blocks``; its router must be causal. None: a dense model.
        moe_blocks: which blocks; see ``apps.nets.blocks.resolve_blocks``. In a dense model: which blocks
            ``replaced_hidden_dim`` is for.
        replaced_hidden_dim: FFN hidden dim of those blocks in a dense model; None: that of the others.

    Raises:
        ValueError: a value out of its range, or a combination that cannot be built.
    """

    def __init__(
        self,
        config: HistoryModelConfig,
        *,
        num_items: int,
        max_length: int,
        moe: core.MoEConfig | None = None,
        moe_blocks: str | Sequence[int] = "all",
        replaced_hidden_dim: int | None = None,
    ) -> None:
        super().__init__()
        for name, value in (
            ("num_items", num_items),
            ("max_length", max_length),
            ("replaced_hidden_dim", replaced_hidden_dim),
        ):
            if value is not None and value < 1:
                raise ValueError(f"{name}={value} must be at least 1")
        if moe is not None and replaced_hidden_dim is not None:
            raise ValueError(
                f"replaced_hidden_dim={replaced_hidden_dim} is for a dense model: with moe, set moe.expert.hidden_dim"
            )
        self.config, self.num_items, self.max_length = config, num_items, max_length
        self.moe_blocks = resolve_blocks(moe_blocks, config.depth)
        self.item_embed = nn.Embedding(num_items + 1, config.dim, padding_idx=0)
        self.pos_embed = nn.Embedding(max_length, config.dim)
        self.embed_dropout = nn.Dropout(config.embed_dropout)
        self.blocks = nn.ModuleList()
        for i in range(config.depth):
            replaced = i in self.moe_blocks
            if replaced and moe is not None:
                ffn: nn.Module = moe.build(config.dim, causal=True)
            else:
                width = replaced_hidden_dim if replaced and replaced_hidden_dim else config.dense_hidden_dim
                ffn = nn.Sequential(cpu.Linear(config.dim, width), nn.GELU(), cpu.Linear(width, config.dim))
            self.blocks.append(HistoryBlock(config, ffn))
        self.norm = nn.LayerNorm(config.dim)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Xavier-uniform products, the experts' each by itself as a dense FFN's; embeddings normal."""
        for module in self.modules():
            if isinstance(module, nn.Linear):
                nn.init.xavier_uniform_(module.weight)
                nn.init.zeros_(module.bias)
        for layer in core.moe_layers(self).values():
            for name, weight in layer.experts.named_parameters():
                if name in ("w_in", "w_gate", "w_out"):
                    for expert in weight.unbind(0):
                        nn.init.xavier_uniform_(expert)
        nn.init.normal_(self.item_embed.weight, std=0.02)
        nn.init.normal_(self.pos_embed.weight, std=0.02)
        with torch.no_grad():
            self.item_embed.weight[0] = 0.0

    def encode(self, items_BS: Tensor) -> tuple[Tensor, Packing, Tensor]:
        """The last layer's output at each real item.

        Args:
            items_BS: int64 (B, S) item ids, 0 for padding, which may stand anywhere.

        Returns:
            (T, D) normed output, where T real items lie, and their int64 (T,) indices in the flattened ``items_BS``.

        Raises:
            ValueError: an id beyond ``num_items`` or negative, or a history longer than ``max_length``.
        """
        self._check(items_BS)
        packing, index_T = Packing.of(items_BS > 0)
        if packing.length > self.max_length:
            raise ValueError(f"a history of {packing.length} items is longer than max_length={self.max_length}")
        items_T = items_BS.flatten()[index_T]
        context = core.RoutingContext(
            valid_BS=packing.valid_BL(), token_ids_BS=packing.pad(items_T[:, None]).squeeze(-1)
        )
        x_TD = self.item_embed(items_T) * math.sqrt(self.config.dim) + self.pos_embed(packing.position_T)
        x_TD = self.embed_dropout(x_TD)
        for block in self.blocks:
            x_TD = block(x_TD, packing, context)
        return self.norm(x_TD), packing, index_T

    def _check(self, items_BS: Tensor) -> None:
        if items_BS.ndim != 2 or items_BS.is_floating_point():
            raise ValueError(f"items are {items_BS.dtype} of shape {tuple(items_BS.shape)}, not integers (B, S)")
        if items_BS.numel() == 0:
            return
        low, high = items_BS.aminmax()
        for value in (int(low), int(high)):
            if not 0 <= value <= self.num_items:
                raise ValueError(f"item id {value} is not in 0 to num_items={self.num_items} (0 is padding)")

    @property
    def output_weight(self) -> Tensor:
        """(num_items, D): row i scores item i + 1. Tied to the embedding."""
        return self.item_embed.weight[1:]

    def scores(self, h_BD: Tensor) -> Tensor:
        """float32 (B, num_items + 1) scores of each item as the next one, by id; that of padding is -inf."""
        # In bfloat16 many items would tie.
        with torch.autocast(h_BD.device.type, enabled=False):
            h_BD = h_BD if h_BD.dtype == torch.float64 else h_BD.float()
            logits_BV = cpu.linear(h_BD, self.output_weight.to(h_BD.dtype))
        return F.pad(logits_BV, (1, 0), value=-math.inf)

    def forward(self, items_BS: Tensor) -> Tensor:
        """(B, S) histories to (B, num_items + 1) scores of the item after the last one; see ``encode`` and ``scores``.

        A history without any item scores all items 0.
        """
        h_TD, packing, _ = self.encode(items_BS)
        return self.scores(last_of(h_TD, packing))


def last_of(h_TD: Tensor, packing: Packing) -> Tensor:
    """(B, D), the output at each row's last item; zeros where a row has none."""
    if len(h_TD) == 0:
        return h_TD.new_zeros(packing.num_rows, h_TD.shape[-1])
    last_BD = h_TD.index_select(0, packing.last_B.clamp_min(0))
    return last_BD.masked_fill((packing.last_B < 0)[:, None], 0.0)
