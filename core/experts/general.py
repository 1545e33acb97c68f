"""Feed-forward experts as a dense network may have them: any activation, biases and dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass, replace
from types import MappingProxyType
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor, nn

from ..contract import Rows
from ..fields import Count, OneOf, ShareBelowOne
from ..kernels import ACTIVATIONS, expert_linear, outside_autocast
from .base import ExpertConfig, Experts
from .products import autocast_together, first_linear, init_linear_, merged_linear, next_linear, weighted_sum

GENERAL_ACTIVATIONS: dict[str, Callable[[Tensor], Tensor]] = {
    **ACTIVATIONS,
    "quick_gelu": lambda x: x * torch.sigmoid(1.702 * x),
    "sigmoid": torch.sigmoid,
    "tanh": torch.tanh,
    "relu2": lambda x: F.relu(x).square(),
    "relu6": F.relu6,
    "leaky_relu": F.leaky_relu,
    "elu": F.elu,
    "mish": F.mish,
    "hardswish": F.hardswish,
}
"""Those that a ``GeneralFFN`` may have."""


class GeneralFFNExperts(Experts):
    """E networks ``dropout(act(x w_in + b_in)) w_out + b_out``, or gated ones, ``dropout(act(x w_gate + b_gate) * (x
    w_in + b_in)) w_out + b_out``.

    Parameters: ``w_in`` (E, D, F), ``w_out`` (E, F, D_out); ``w_gate`` (E, D, F) in gated ones; those of the biases
    ``b_in``, ``b_gate`` (E, F) and ``b_out`` (E, D_out) that the config asks for.
    """

    hidden_axes = MappingProxyType({"w_in": 2, "w_gate": 2, "b_in": 1, "b_gate": 1, "w_out": 1})
    linear_in = frozenset({"w_out", "b_out"})
    w_in: Tensor
    w_gate: Tensor | None

    def __init__(self, config: GeneralFFN, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__()
        hidden = config.hidden(dim)
        self.num_experts, self.activation, self.dropout = num_experts, config.activation, config.dropout
        for name, fan_in, width, used, has_bias in (
            ("in", dim, hidden, True, config.bias_in),
            ("out", hidden, out_dim, True, config.bias_out),
            ("gate", dim, hidden, config.gated, config.bias_gate),
        ):
            w = nn.Parameter(torch.empty(num_experts, fan_in, width)) if used else None
            self.register_parameter(f"w_{name}", w)
            self.register_parameter(f"b_{name}", nn.Parameter(torch.empty(num_experts, width)) if has_bias else None)
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as ``nn.Linear`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        for name in ("in", "gate", "out"):
            weight, bias = self._of(name)
            if weight is not None:
                init_linear_(weight, bias)

    def biases(self) -> list[Tensor]:
        return [b for _, b in map(self._of, ("in", "out", "gate")) if b is not None]

    def _of(self, name: str) -> tuple[Tensor | None, Tensor | None]:
        return getattr(self, f"w_{name}"), getattr(self, f"b_{name}")

    def _weights(self) -> tuple[Tensor | None, ...]:
        return (*self._of("in"), *self._of("gate"), *self._of("out"))

    def _hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Return the hidden layer, any shape, given the products before the activation."""
        act = GENERAL_ACTIVATIONS[self.activation]
        return F.dropout(act(up) if gate is None else act(gate) * up, self.dropout, self.training)

    def compute_rows(self, rows: Rows) -> Rows:
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(rows.x, *self._weights())
        offsets_E, backend = rows.offsets_E, self.backend
        up_RF = expert_linear(x, w_in, offsets_E, b_in, backend=backend)
        gate_RF = None if w_gate is None else expert_linear(x, w_gate, offsets_E, b_gate, backend=backend)
        return rows.with_output(expert_linear(self._hidden(up_RF, gate_RF), w_out, offsets_E, b_out, backend=backend))

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, x = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        taken = (None if w is None else w[:n] for w in self._weights())
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(x, *taken)
        gate_TnF = None if w_gate is None else first_linear(x, w_gate, b_gate, counts)
        return next_linear(self._hidden(first_linear(x, w_in, b_in, counts), gate_TnF), w_out, b_out)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        # As in ``FFNExperts``: the sum in the parameters' own dtype.
        with outside_autocast(x.device):
            mixed = [weighted_sum(weights, w) for w in self._weights()]
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(x, *mixed)
        gate = None if w_gate is None else merged_linear(x, w_gate, b_gate)
        return merged_linear(self._hidden(merged_linear(x, w_in, b_in), gate), w_out, b_out)

    def extra_repr(self) -> str:
        E, D, H = self.w_in.shape
        gated = ", gated" if self.w_gate is not None else ""
        return (
            f"num_experts={E}, dim={D}, hidden_dim={H}, activation={self.activation}{gated}, dropout={self.dropout}, "
            f"backend={self.backend}"
        )


@dataclass(frozen=True)
class GeneralFFN(ExpertConfig):
    """``dropout(act(x w_in + b_in)) w_out + b_out``, or gated ``dropout(act(x w_gate + b_gate) * (x w_in + b_in)) w_out
    + b_out``, with any of the biases. ``FFN``, ``SwiGLU`` and ``GEGLU`` have fused kernels for what they compute.

    Attributes:
        hidden_dim: F; None: 4 * dim, or where gated 8/3 * dim, up to the next multiple of 8.
        activation: a key of ``GENERAL_ACTIVATIONS``: those of ``FFN``, "quick_gelu" (``x sigmoid(1.702 x)``, OpenAI's
            CLIP), "sigmoid", "tanh", "relu2" (the square), "relu6", "leaky_relu", "elu", "mish" or "hardswish".
        gated: with ``w_gate``.
        bias_in, bias_gate, bias_out: which biases there are.
        dropout: probability that a number of the hidden layer is zero in training.

    Raises:
        ValueError: an unknown activation, a value out of its range, or ``bias_gate`` without ``gated``.
    """

    hidden_dim: Count | None = None
    activation: Annotated[str, OneOf(*GENERAL_ACTIVATIONS)] = "gelu"
    gated: bool = False
    bias_in: bool = True
    bias_gate: bool = False
    bias_out: bool = True
    dropout: ShareBelowOne = 0.0

    def __post_init__(self) -> None:
        super().__post_init__()
        if self.bias_gate and not self.gated:
            raise ValueError("bias_gate=True needs gated=True: there is no other gate")

    def hidden(self, dim: int) -> int:
        """Return F for this model dim, the default filled in."""
        if self.hidden_dim is not None:
            return self.hidden_dim
        return -(-8 * dim // 24) * 8 if self.gated else 4 * dim

    def narrowed(self, times: int, dim: int | None = None) -> GeneralFFN:
        if dim is None and self.hidden_dim is None:
            return self
        return replace(self, hidden_dim=self.divided(self.hidden(dim or 0), times))

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> GeneralFFNExperts:
        return GeneralFFNExperts(self, num_experts, dim, dim if out_dim is None else out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        hidden, out_dim = self.hidden(dim), dim if out_dim is None else out_dim
        biases = hidden * (self.bias_in + self.bias_gate) + out_dim * self.bias_out
        return hidden * (dim * (1 + self.gated) + out_dim) + biases

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        return 2 * self.hidden(dim) * (dim * (1 + self.gated) + (dim if out_dim is None else out_dim))
