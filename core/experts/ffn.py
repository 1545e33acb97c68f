"""Feed-forward experts: two matmuls, or three if they are gated."""

from __future__ import annotations

from dataclasses import dataclass
from typing import Annotated

from torch import Tensor

from ..contract import Rows
from ..fields import Count, OneOf
from ..kernels import ACTIVATIONS, FFNWeights, RowIndex, expert_ffn, linear
from .products import autocast_together
from .two_layers import TwoLayerConfig, TwoLayerExperts, two_thirds


class FFNExperts(TwoLayerExperts):
    """E feed-forward networks: ``act(x w_in + b_in) w_out + b_out``, gated when ``w_gate`` is there.

    Parameters: ``w_in`` (E, D, F), ``w_out`` (E, F, D_out); ``w_gate`` (E, D, F) in gated ones; ``b_in`` (E, F) and
    ``b_out`` (E, D_out) with bias.
    """

    takes_index = True
    shown = ("activation",)

    def __init__(self, config: FFN, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__(config, num_experts, dim, out_dim)
        self.activation = config.activation

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        act = ACTIVATIONS[self.activation]
        return act(up) if gate is None else act(gate) * up

    def compute_rows(self, rows: Rows) -> Rows:
        w_in, b_in, w_gate, _, w_out, b_out = self._weights()
        x, *weights = autocast_together(rows.x, w_in, w_out, b_in, b_out, w_gate)
        inverse_N, top_k = getattr(rows.plan, "inverse_N", None), getattr(rows.plan, "top_k", None)
        index = RowIndex(None if rows.gathered else rows.row_index_R, rows.offsets_E, inverse_N, top_k)
        y = expert_ffn(x, index, rows.gates_R, FFNWeights(*weights), self.activation, backend=self.backend)
        return rows.with_output(y, weighted=True, combined=not rows.gathered)

    def compute_dense(self, x: Tensor) -> Tensor:
        act, (w_in, b_in, w_gate, _, w_out, b_out) = ACTIVATIONS[self.activation], self._weights()
        y = None
        for e in range(self.num_experts):
            h = linear(x, w_in[e].t(), None if b_in is None else b_in[e])
            h = act(h) if w_gate is None else act(linear(x, w_gate[e].t())) * h
            y_e = linear(h, w_out[e].t(), None if b_out is None else b_out[e])
            y = y_e if y is None else y + y_e
        assert y is not None
        return y


@dataclass(frozen=True)
class FFN(TwoLayerConfig):
    """``act(x w_in + b_in) w_out + b_out``.

    Attributes:
        hidden_dim: F; None: 4 * dim.
        activation: "relu", "gelu", "silu" or "gelu_tanh" (GELU's approximation).
        bias: with ``b_in`` and ``b_out``.

    Raises:
        ValueError: an unknown activation, or ``hidden_dim`` below 1.
    """

    experts_class = FFNExperts

    hidden_dim: Count | None = None
    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
    bias: bool = False

    def hidden(self, dim: int) -> int:
        return 4 * dim if self.hidden_dim is None else self.hidden_dim

    def tensors(self) -> tuple[str, ...]:
        return ("w_in", "w_out", *(("b_in", "b_out") if self.bias else ()))


@dataclass(frozen=True)
class SwiGLU(FFN):
    """``(act(x w_gate) * (x w_in)) w_out`` with SiLU (Shazeer, arXiv 2002.05202). ``b_in`` belongs to ``w_in``.

    Attributes:
        hidden_dim: F; None: 8/3 * dim, up to the next multiple of 8, for the parameters of a plain FFN of 4 * dim.
    """

    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "silu"

    def hidden(self, dim: int) -> int:
        return two_thirds(dim) if self.hidden_dim is None else self.hidden_dim

    def tensors(self) -> tuple[str, ...]:
        return (*super().tensors(), "w_gate")


@dataclass(frozen=True)
class GEGLU(SwiGLU):
    """``SwiGLU`` with GELU instead of SiLU (arXiv 2002.05202)."""

    activation: Annotated[str, OneOf(*ACTIVATIONS)] = "gelu"
