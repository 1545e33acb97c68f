"""``DenseFFN``: the feed-forward layer of a block without experts, under ``MoEConfig``'s interface."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from ..experts.general import GENERAL_ACTIVATIONS
from ..fields import Checked, Count, OneOf, ShareBelowOne
from ..layers import FeedForward
from ..registry import register_config


@register_config
@dataclass(frozen=True)
class DenseFFN(Checked):
    """A dense feed-forward layer, to be built at any width. A block takes this or a ``MoEConfig``.

    Attributes:
        hidden_dim: F; None: 4 * dim.
        activation: "relu", "gelu", "gelu_tanh" (its approximation), "silu", or another of ``GeneralFFN``.
        gated: the layer is ``(act(x w_gate) * (x w_in)) w_out``, instead of ``act(x w_in) w_out``: GEGLU, SwiGLU (arXiv
            2002.05202).
        bias: each linear layer has a bias.
        dropout: of the hidden layer.

    Raises:
        ValueError: a value out of its range.

    Example::

        layer = DenseFFN(hidden_dim=256).build(dim=64)
    """

    hidden_dim: Count | None = None
    activation: Annotated[str, OneOf(*GENERAL_ACTIVATIONS)] = "gelu"
    gated: bool = False
    bias: bool = True
    dropout: ShareBelowOne = 0.0

    def hidden(self, dim: int) -> int:
        """Return F for this model dim, the default filled in."""
        return 4 * dim if self.hidden_dim is None else self.hidden_dim

    def build(self, dim: int, out_dim: int | None = None, *, causal: bool = False) -> FeedForward:
        """Return the layer for tokens of width ``dim``; ``causal`` is ``MoEConfig``'s, and any dense layer is."""
        return FeedForward(
            dim,
            self.hidden(dim),
            dim if out_dim is None else out_dim,
            activation=self.activation,
            gated=self.gated,
            bias=self.bias,
            dropout=self.dropout,
        )

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters of the layer, equal to the sum of ``numel`` of the built one."""
        hidden, out, inward = self.hidden(dim), dim if out_dim is None else out_dim, 2 if self.gated else 1
        return hidden * (dim * inward + out) + (inward * hidden + out if self.bias else 0)

    def active_params(self, dim: int, out_dim: int | None = None) -> int:
        """Return the parameters that one token touches: all."""
        return self.num_params(dim, out_dim)

    def flops_per_token(self, dim: int, out_dim: int | None = None, *, tokens_per_sequence: int | None = None) -> int:
        """Return the forward FLOPs of a token, two a multiply-add; activations are not counted."""
        out, inward = dim if out_dim is None else out_dim, 2 if self.gated else 1
        return 2 * self.hidden(dim) * (dim * inward + out)
