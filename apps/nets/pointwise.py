"""HSTU's mixing of positions: attention whose weights are not normalized, gated by the query."""

from __future__ import annotations

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from apps.nets.attention import Mask, attention_scores
from apps.nets.config import TransformerConfig
from apps.nets.packing import Packing
from core.kernels import cpu, outside_autocast


class PointwiseAttention(nn.Module):
    """Pointwise aggregated attention and its gate (HSTU, arXiv 2402.17152, equations 1 to 3).

        u, v, q, k = split(silu(W x + b))
        y_t = W_out (norm(sum over s <= t of silu(scale q_t k_s + bias_ts) / N v_s) * u_t)

    The weights of a query do not sum to 1: many similar keys count more than a few, which a softmax hides. N is a
    constant, so that neither padding nor the other sequences of a batch change an output. The norm is over all heads.

    Args:
        config: the transformer: width, heads, score scale and attention dropout.
        max_length: N.
    """

    def __init__(self, config: TransformerConfig, max_length: int) -> None:
        super().__init__()
        shape = config.shape
        self.num_heads, self.head_dim, self.max_length = shape.num_heads, shape.head_dim, max_length
        self.scale, self.dropout = config.score_scale, config.attn_dropout
        width = shape.num_heads * shape.head_dim
        self.uvqk = cpu.Linear(shape.dim, 4 * width, bias=config.bias)
        # Sums of a few values over N are small, and config's eps would hide them.
        self.norm = nn.LayerNorm(width, eps=1e-6)
        self.out = cpu.Linear(width, shape.dim, bias=config.bias)

    def forward(self, x: Tensor, mask: Mask, rotations: None = None, packing: Packing | None = None) -> Tensor:
        """Map (B, L, D) to (B, L, D), or with ``packing`` (T, D) to (T, D), under the interface of ``SelfAttention``.

        The scores that ``mask`` hides have the weight 0, for ``silu`` of them is 0.
        """
        u, vqk = F.silu(self.uvqk(x)).split((self.num_heads * self.head_dim, 3 * self.num_heads * self.head_dim), -1)
        vqk = vqk if packing is None else packing.pad(vqk)
        B, L, _ = vqk.shape
        heads = vqk.view(B, L, 3, self.num_heads, self.head_dim).permute(2, 0, 3, 1, 4)
        v, q, k = heads.reshape(3, B * self.num_heads, L, self.head_dim)
        with outside_autocast(x.device):
            weights = F.silu(attention_scores(q, k, mask, self.scale)) / self.max_length
            weights = F.dropout(weights, self.dropout, self.training)
            y = torch.bmm(weights, v)
        y_BLC = y.view(B, self.num_heads, L, self.head_dim).transpose(1, 2).flatten(2)
        return self.out(self.norm(y_BLC if packing is None else packing.pack(y_BLC)) * u)
