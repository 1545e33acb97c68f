"""``EncoderLayer``: the block of the published encoders that are read here, BERT's and CLIP's, whose feed-forward
network may be a mixture of experts."""

from __future__ import annotations

from collections.abc import Iterable

import torch.nn.functional as F
from torch import Tensor, nn
from torch.utils.checkpoint import checkpoint

import core
from apps.nets.blocks import FFNConfig, feed


class EncoderLayer(nn.Module):
    """Attention, then a feed-forward network, each with a residual and a norm.

    Args:
        dim: D.
        num_heads: heads of the attention; must divide ``dim``.
        ffn: the feed-forward network, or the MoE layer in its place.
        eps: of the norms.
        norm_first: each part reads the normalised input, as in CLIP; False: each sum is normalised, as in BERT.
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
        # Padding stands behind the text: a causal mask hides it already.
        mask = None if is_real_BS is None or self.causal else is_real_BS[:, None, None]
        y = F.scaled_dot_product_attention(q, k, v, attn_mask=mask, is_causal=self.causal)
        return self.out(y.transpose(1, 2).flatten(2))

    def _dropped(self, x: Tensor) -> Tensor:
        return F.dropout(x, self.dropout, self.training)


def through(
    layers: Iterable[nn.Module],
    x_BSD: Tensor,
    is_real_BS: Tensor | None,
    context: core.RoutingContext,
    recompute: bool = False,
) -> Tensor:
    """Return the output (B, S, D) of layers, one after the other.

    Args:
        layers: ``EncoderLayer``s.
        x_BSD, is_real_BS, context: as ``EncoderLayer.forward`` has them.
        recompute: compute each layer again in the backward, to save memory.
    """
    for layer in layers:
        if recompute:
            x_BSD = checkpoint(layer, x_BSD, is_real_BS, context, use_reentrant=False)
        else:
            x_BSD = layer(x_BSD, is_real_BS, context)
    return x_BSD


def init_encoder(model: nn.Module) -> None:
    """Start a model as BERT does, in place: matrices from a normal distribution of deviation 0.02, biases at 0.

    Matrices of experts start as those of the network that they stand for.
    """
    for module in model.modules():
        if isinstance(module, (nn.Linear, nn.Embedding, nn.Conv2d)):
            nn.init.trunc_normal_(module.weight, std=0.02)
            if getattr(module, "bias", None) is not None:
                nn.init.zeros_(module.bias)  # type: ignore[arg-type]
        elif isinstance(module, core.Experts):
            module.init_each(lambda weight: nn.init.trunc_normal_(weight, std=0.02))
