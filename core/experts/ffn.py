"""Feed-forward experts: two products, or three where they are gated."""

from __future__ import annotations

from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, OneOf
from ..kernels import ACTIVATIONS, FFNWeights, RowIndex, expert_ffn, linear, outside_autocast
from .base import ExpertConfig, Experts
from .products import autocast_together, first_linear, init_linear_, merged_linear, next_linear, weighted_sum


class FFNExperts(Experts):
    """E feed-forward networks: ``act(x w_in + b_in) w_out + b_out``, gated when ``w_gate`` is there.

    Parameters: ``w_in`` (E, D, F), ``w_out`` (E, F, D_out); ``w_gate`` (E, D, F) in gated ones; ``b_in`` (E, F) and
    ``b_out`` (E, D_out) with bias.
    """

    takes_index = True
    hidden_axes = MappingProxyType({"w_in": 2, "w_gate": 2, "b_in": 1, "w_out": 1})
    linear_in = frozenset({"w_out", "b_out"})

    def __init__(
        self,
        num_experts: int,
        dim: int,
        hidden_dim: int,
        out_dim: int | None = None,
        *,
        activation: str = "gelu",
        gated: bool = False,
        bias: bool = False,
    ) -> None:
        super().__init__()
        out_dim = dim if out_dim is None else out_dim
        self.num_experts, self.activation = num_experts, activation
        self.w_in = nn.Parameter(torch.empty(num_experts, dim, hidden_dim))
        self.w_out = nn.Parameter(torch.empty(num_experts, hidden_dim, out_dim))
        self.w_gate = nn.Parameter(torch.empty(num_experts, dim, hidden_dim)) if gated else None
        self.b_in = nn.Parameter(torch.empty(num_experts, hidden_dim)) if bias else None
        self.b_out = nn.Parameter(torch.empty(num_experts, out_dim)) if bias else None
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as ``nn.Linear`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_gate, None), (self.w_out, self.b_out)):
            if weight is not None:
                init_linear_(weight, bias)

    def biases(self) -> list[Tensor]:
        return [b for b in (self.b_in, self.b_out) if b is not None]

    def _weights(self) -> tuple[Tensor | None, ...]:
        return self.w_in, self.w_out, self.b_in, self.b_out, self.w_gate

    def compute_rows(self, rows: Rows) -> Rows:
        x, *weights = autocast_together(rows.x, *self._weights())
        inverse_N, top_k = getattr(rows.plan, "inverse_N", None), getattr(rows.plan, "top_k", None)
        index = RowIndex(None if rows.gathered else rows.row_index_R, rows.offsets_E, inverse_N, top_k)
        y = expert_ffn(x, index, rows.gates_R, FFNWeights(*weights), self.activation, backend=self.backend)
        return rows.with_output(y, weighted=True, combined=not rows.gathered)

    def compute_dense(self, x: Tensor) -> Tensor:
        act = ACTIVATIONS[self.activation]
        y = None
        for e in range(self.num_experts):
            h = linear(x, self.w_in[e].t(), None if self.b_in is None else self.b_in[e])
            h = act(h) if self.w_gate is None else act(linear(x, self.w_gate[e].t())) * h
            y_e = linear(h, self.w_out[e].t(), None if self.b_out is None else self.b_out[e])
            y = y_e if y is None else y + y_e
        assert y is not None
        return y

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, x = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        taken = (None if w is None else w[:n] for w in self._weights())
        x, w_in, w_out, b_in, b_out, w_gate = autocast_together(x, *taken)
        act = ACTIVATIONS[self.activation]
        h_TnF = first_linear(x, w_in, b_in, counts)
        h_TnF = act(h_TnF) if w_gate is None else act(first_linear(x, w_gate, None, counts)) * h_TnF
        return next_linear(h_TnF, w_out, b_out)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        # The sum over experts in the parameters' own dtype: under autocast it is rounded once, after it.
        with outside_autocast(x.device):
            mixed = [weighted_sum(weights, w) for w in self._weights()]
        x, w_in, w_out, b_in, b_out, w_gate = autocast_together(x, *mixed)
        act = ACTIVATIONS[self.activation]
        h = merged_linear(x, w_in, b_in)
        h = act(h) if w_gate is None else act(x @ w_gate) * h
        return merged_linear(h, w_out, b_out)

    def extra_repr(self) -> str:
        E, D, H = self.w_in.shape
        gated = ", gated" if self.w_gate is not None else ""
        return f"num_experts={E}, dim={D}, hidden_dim={H}, activation={self.activation}{gated}, backend={self.backend}"


@dataclass(frozen=True)
class FFN(ExpertConfig):
    """``act(x w_in + b_in) w_out + b_out``.

    Attributes:
        hidden_dim: F; None: 4 * dim.
        activation: "relu", "gelu", "silu" or "gelu_tanh" (GELU's approximation).
        bias: with ``b_in`` and ``b_out``.

    Raises:
        ValueError: an unknown activation, or ``hidden_dim`` below 1.
    """

    hidden_dim: Count | None = None
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    bias: bool = False

    def hidden(self, dim: int) -> int:
        """Return F for this model dim, the default filled in."""
        return 4 * dim if self.hidden_dim is None else self.hidden_dim

    def narrowed(self, times: int, dim: int | None = None) -> FFN:
        if dim is None and self.hidden_dim is None:
            return self
        return replace(self, hidden_dim=self.divided(self.hidden(dim or 0), times))

    def matrices(self) -> int:
        """Return the number of products that widen to F."""
        return 1

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> FFNExperts:
        return FFNExperts(
            num_experts,
            dim,
            self.hidden(dim),
            out_dim,
            activation=self.activation,
            gated=self.matrices() == 2,
            bias=self.bias,
        )

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        out_dim = dim if out_dim is None else out_dim
        hidden = self.hidden(dim)
        return hidden * (dim * self.matrices() + out_dim) + (hidden + out_dim if self.bias else 0)

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        out_dim = dim if out_dim is None else out_dim
        return 2 * self.hidden(dim) * (dim * self.matrices() + out_dim)


@dataclass(frozen=True)
class SwiGLU(FFN):
    """``(act(x w_gate) * (x w_in)) w_out`` with SiLU (Shazeer, arXiv 2002.05202). ``b_in`` belongs to ``w_in``.

    Attributes:
        hidden_dim: F; None: 8/3 * dim, up to the next multiple of 8, for the parameters of a plain FFN of 4 * dim.
    """

    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "silu"

    def hidden(self, dim: int) -> int:
        return -(-8 * dim // 24) * 8 if self.hidden_dim is None else self.hidden_dim

    def matrices(self) -> int:
        return 2


@dataclass(frozen=True)
class GEGLU(SwiGLU):
    """``SwiGLU`` with GELU in place of SiLU (arXiv 2002.05202)."""

    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
