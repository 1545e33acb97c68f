"""``EncoderLayer``: the block of the published encoders that are read here, BERT's and CLIP's, whose feed-forward
network may be a mixture of experts."""

from __future__ import annotations

from collections.abc import Sequence
from typing import Any

import torch
import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from apps.nets.blocks import FFNConfig, MoEs, feed, ffn_configs, moe_configs, resolve_blocks


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network, each with a residual and a norm.

    Args:
        dim: D.
        num_heads: heads of the attention; must divide ``dim``.
        ffn: the feed-forward network, or the MoE layer in its place.
        eps: of the norms.
        norm_first: each part reads the normalized input, as in CLIP; False: each sum is normalized, as in BERT.
        causal: a token sees no later one.
        dropout: probability behind the attention and behind the feed-forward network.

    Raises:
        ValueError: ``num_heads`` does not divide ``dim``.
    """

    def __init__(
        self,
        dim: int,
        num_heads: int,
        ffn: FFNConfig,
        eps: float,
        *,
        norm_first: bool,
        causal: bool = False,
        dropout: float = 0.0,
    ) -> None:
        super().__init__()
        if dim % num_heads:
            raise ValueError(f"dim={dim} is not divisible by num_heads={num_heads}")
        self.num_heads, self.norm_first, self.causal, self.dropout = num_heads, norm_first, causal, dropout
        self.query, self.key, self.value, self.out = (nn.Linear(dim, dim) for _ in range(4))
        self.norm_1, self.norm_2 = nn.LayerNorm(dim, eps), nn.LayerNorm(dim, eps)
        self.ffn = ffn.build(dim, causal=causal)

    def forward(
        self, x_BSD: Tensor, is_real_BS: Tensor | None = None, context: core.RoutingContext | None = None
    ) -> Tensor:
        """Map tokens (B, S, D) to (B, S, D).

        Args:
            x_BSD: the tokens.
            is_real_BS: bool, False for padding, which no token sees; None: all are real.
            context: for an MoE layer; None: it knows nothing of the tokens.
        """
        context = context or core.RoutingContext()
        if self.norm_first:
            x_BSD = x_BSD + self._dropped(self._attend(self.norm_1(x_BSD), is_real_BS))
            return x_BSD + self._dropped(feed(self.ffn, self.norm_2(x_BSD), context))
        x_BSD = self.norm_1(x_BSD + self._dropped(self._attend(x_BSD, is_real_BS)))
        return self.norm_2(x_BSD + self._dropped(feed(self.ffn, x_BSD, context)))

    def _attend(self, x_BSD: Tensor, is_real_BS: Tensor | None) -> Tensor:
        q, k, v = (
            part(x_BSD).unflatten(2, (self.num_heads, -1)).transpose(1, 2)
            for part in (self.query, self.key, self.value)
        )
        # Padding comes after the text: a causal mask hides it already.
        mask = None if is_real_BS is None or self.causal else is_real_BS[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


class EncoderTower(nn.Module):
    """Base of the published encoders of BERT's and CLIP's layouts.

    Args:
        config: the sizes: ``dim``, ``depth``, ``num_heads`` and ``dense_ffn``.
        ffn: of ``moe_blocks``: an MoE layer, a list with one for each, or another dense network; None: as the others.
        moe_blocks: which layers; see ``apps.nets.blocks.resolve_blocks``.

    Attributes:
        out_dim: numbers of a vector.
        moes: the different MoE layers' configs.
        moe_blocks: numbers of the layers whose network is ``ffn``.
        grad_checkpointing: compute each layer again in the backward, to save memory.

    Raises:
        ValueError: a combination that cannot be built.
    """

    grad_checkpointing = False
    layers: nn.ModuleList

    def __init__(self, config: Any, ffn: FFNConfig | MoEs | None, moe_blocks: str | Sequence[int]) -> None:
        super().__init__()
        self.config, self.out_dim, self.ffn, self.moes = config, config.dim, ffn, moe_configs(ffn)
        self.moe_blocks = () if ffn is None else resolve_blocks(moe_blocks, config.depth)

    def build_layers(self, eps: float, **options: Any) -> nn.ModuleList:
        """Return the layers; ``options`` are those of ``EncoderLayer``."""
        config = self.config
        ffns = ffn_configs(config.dense_ffn, config.depth, self.ffn, self.moe_blocks)
        return nn.ModuleList(EncoderLayer(config.dim, config.num_heads, ffn, eps, **options) for ffn in ffns)

    def through(self, x_BSD: Tensor, is_real_BS: Tensor | None, context: core.RoutingContext) -> Tensor:
        """Map tokens through the layers; arguments as ``EncoderLayer.forward`` has them."""
        for layer in self.layers:
            if self.grad_checkpointing and self.training:
                x_BSD = checkpoint(layer, x_BSD, is_real_BS, context, use_reentrant=False)
            else:
                x_BSD = layer(x_BSD, is_real_BS, context)
        return x_BSD


class TextEncoder(EncoderTower):
    """Base of those that read texts."""

    def is_real(self, ids_BL: Tensor) -> Tensor:
        """Return bool (B, L), False for padding."""
        raise NotImplementedError

    def known(self, ids_BL: Tensor, context: core.RoutingContext | None) -> core.RoutingContext:
        """Return the MoE layers' context: the given one, or padding and ids if there is none.

        Raises:
            ValueError: a text is longer than ``max_positions``.
        """
        if not torch.compiler.is_exporting() and ids_BL.shape[1] > self.config.max_positions:
            raise ValueError(f"a text of {ids_BL.shape[1]} subwords exceeds max_positions={self.config.max_positions}")
        return context or core.RoutingContext(valid_BS=self.is_real(ids_BL), token_ids_BS=ids_BL)


def init_encoder(model: nn.Module) -> None:
    """Start a model as BERT does, in place: matrices from a normal distribution of standard deviation 0.02, biases at
    0.

    Matrices of experts start as copies of the matrices of the network that they replace.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, core.Experts):
            module.init_each(lambda weight: nn.init.trunc_normal_(weight, std=0.02))
