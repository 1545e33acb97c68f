"""Self-attention of experts: heads that are chosen token by token, with keys and values that all of them share."""

from __future__ import annotations

import torch
from torch import Tensor, nn

import core
from apps.nets.attention import Mask, attend, attention_weights
from apps.nets.blocks import FFNConfig, MoEs, moe_configs
from apps.nets.config import TransformerConfig
from apps.nets.decode_cache import Step
from apps.nets.past import Past
from apps.nets.positions import rotate


def attention_experts(moe: core.MoEConfig) -> core.AttentionExperts:
    """Return the experts of an ``attention_moe``.

    Raises:
        ValueError: they do not attend.
    """
    if not isinstance(moe.expert, core.AttentionExperts):
        raise ValueError(f"attention_moe.expert is {type(moe.expert).__name__}, and must be AttentionExperts")
    return moe.expert


def check_attention(config: TransformerConfig, moe: core.MoEConfig | None) -> None:
    """Raise an error for attention experts that do not work in a transformer.

    Raises:
        ValueError: experts that do not attend, positions that are biases of fixed heads, an odd head that is to be
            rotated, or norms of queries and keys.
    """
    if moe is None:
        return
    expert = attention_experts(moe)
    if config.positions == "relative":
        raise ValueError("positions='relative' has a bias for each head, which attention_moe's chosen heads have not")
    if config.qk_norm != "none":
        raise ValueError(f"qk_norm={config.qk_norm!r} is of fixed heads, and attention_moe's are chosen")
    if config.positions == "rotary" and expert.head_dim % 2:
        raise ValueError(f"attention_moe.expert.head_dim={expert.head_dim} must be even for positions='rotary'")


class ExpertAttention(nn.Module):
    """A ``core.AttentionMoE`` that replaces ``SelfAttention``, with the transformer's positions, dropout and cache.

    Args:
        config: the transformer: its rotations, score scale and dropout; its numbers of heads are not asked.
        moe: the attention experts and their router.
        causal: the stack is.
    """

    def __init__(self, config: TransformerConfig, moe: core.MoEConfig, *, causal: bool) -> None:
        super().__init__()
        check_attention(config, moe)
        self.dropout = config.attn_dropout
        head_dim = attention_experts(moe).head_dim
        self.scale = head_dim**-0.5 if config.attention_scale is None else config.attention_scale
        heads = moe.build(config.shape.dim, causal=causal)
        assert isinstance(heads, core.AttentionMoE)
        self.heads = heads

    def reset_heads(self) -> None:
        """Start queries, keys and values Xavier-uniform, each at ``1 / sqrt(2)`` of the usual scale."""
        for weight in (*self.heads.kv.weight.chunk(2), *self.heads.experts.w_q):
            nn.init.xavier_uniform_(weight, gain=2**-0.5)

    def forward(
        self,
        x_BLD: Tensor,
        mask: Mask,
        rotations: Tensor | None,
        context: core.RoutingContext,
        seen_BLD: Tensor | None = None,
        past: Past | None = None,
    ) -> Tensor:
        """Map (B, L, D) to (B, L, D).

        Args:
            x_BLD: the tokens.
            mask: for one head, the same for all.
            rotations: from ``positions.rotations``.
            context: routing context of the tokens.
            seen_BLD: the source of keys and values; None: the tokens.
            past: as in ``SelfAttention.forward``.
        """

        def attended(q_BLPhd: Tensor, k_BLhd: Tensor, v_BLhd: Tensor) -> Tensor:
            q_BLPhd, k_BLhd = _rotated(q_BLPhd, k_BLhd, rotations)
            P, h = q_BLPhd.shape[2:4]
            own = mask
            if mask.bias is not None and mask.bias.shape[0] > 1:
                own = Mask(mask.bias.repeat_interleave(P * h, 0), mask.causal)
            q = q_BLPhd.permute(0, 3, 2, 1, 4).flatten(1, 2)
            k, v = k_BLhd.transpose(1, 2), v_BLhd.transpose(1, 2)
            if past is not None:
                k, v = past.join(k, v)
            k, v = k.repeat_interleave(P, 1), v.repeat_interleave(P, 1)
            y = attend(q, k, v, own, self.scale, self.dropout if self.training else 0.0)
            return y.unflatten(1, (h, P)).permute(0, 3, 2, 1, 4)

        return self.heads(x_BLD, context, attend=attended, seen=seen_BLD)

    def step(self, x_RD: Tensor, layer: int, given: Step, seen_RD: Tensor | None = None) -> Tensor:
        """Compute the next position of each row.

        Args:
            x_RD: (R, D).
            layer: of the stack: this one.
            given: arguments that all layers share; the cache holds the one set of keys and values, with the experts'
                heads and one query a key.
            seen_RD: as in ``forward``.

        Returns:
            (R, D).
        """

        def attended(q_R1Phd: Tensor, k_R1hd: Tensor, v_R1hd: Tensor) -> Tensor:
            q_R1Phd, k_R1hd = _rotated(q_R1Phd, k_R1hd, given.rotations)
            (R, _, P, h, d), K, bias = q_R1Phd.shape, given.cache.copies, given.bias
            keys, values = given.cache.write(layer, torch.cat((k_R1hd, v_R1hd), 1))
            N = R // K
            q = q_R1Phd.reshape(N, K, P, h, d).permute(0, 3, 2, 1, 4).reshape(N * h, P * K, d)
            # One query of each copy has the mask that its others have.
            own = None if bias is None else bias.unsqueeze(1).expand(-1, P, -1, -1).flatten(1, 2)
            y = torch.bmm(attention_weights(q, keys, Mask(own), self.scale), values)
            return y.view(N, h, P, K, d).permute(0, 3, 2, 1, 4).reshape(R, 1, P, h, d)

        seen_R1D = None if seen_RD is None else seen_RD.unsqueeze(1)
        return self.heads(x_RD.unsqueeze(1), given.context, attend=attended, seen=seen_R1D).squeeze(1)


def _rotated(q_BLPhd: Tensor, k_BLhd: Tensor, rotations: Tensor | None) -> tuple[Tensor, Tensor]:
    """Return queries and keys, rotated by their positions if these are rotary."""
    if rotations is None:
        return q_BLPhd, k_BLhd
    q_BLHd = rotate(q_BLPhd.flatten(2, 3), rotations.to(q_BLPhd.dtype))
    return q_BLHd.unflatten(2, q_BLPhd.shape[2:4]), rotate(k_BLhd, rotations.to(k_BLhd.dtype))


def check_rows(
    config: TransformerConfig, ffn: FFNConfig | MoEs | None, attention: core.MoEConfig | None = None
) -> None:
    """Raise an error unless experts are an FFN, which works row by row, or attention experts that fit.

    Raises:
        ValueError: naming the experts.
    """
    check_attention(config, attention)
    for moe in moe_configs(ffn):
        if moe.expert.layer_kind != "rows":
            name = type(moe.expert).__name__
            hint = ": AttentionExperts stand in attention_moe" if moe.expert.layer_kind == "attention" else ""
            raise ValueError(f"moe.expert is {name}, which is no FFN{hint}")
