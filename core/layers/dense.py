"""``FeedForward``: the dense feed-forward layer of a block without experts."""

from __future__ import annotations

from torch import Tensor, nn

from ..experts.general import GENERAL_ACTIVATIONS
from ..kernels import Linear


class FeedForward(nn.Module):
    """``act(x w_in) w_out``, or ``(act(x w_gate) * (x w_in)) w_out`` if gated.

    Args:
        dim: D.
        hidden_dim: F.
        out_dim: width of the output.
        activation: a key of ``GENERAL_ACTIVATIONS``.
        gated, bias: as in ``DenseFFN``.
        dropout: of the hidden layer.
    """

    def __init__(
        self, dim: int, hidden_dim: int, out_dim: int, *, activation: str, gated: bool, bias: bool, dropout: float
    ) -> None:
        super().__init__()
        self.activation = activation
        self.w_in = Linear(dim, hidden_dim, bias=bias)
        self.w_gate = Linear(dim, hidden_dim, bias=bias) if gated else None
        self.w_out = Linear(hidden_dim, out_dim, bias=bias)
        self.dropout = nn.Dropout(dropout)

    def forward(self, x: Tensor) -> Tensor:
        """(..., D) to (..., D_out)."""
        act = GENERAL_ACTIVATIONS[self.activation]
        h = act(self.w_in(x)) if self.w_gate is None else act(self.w_gate(x)) * self.w_in(x)
        return self.w_out(self.dropout(h))

    def extra_repr(self) -> str:
        return f"activation={self.activation}"
