"""Feed-forward experts as a dense network may have them: any activation, biases and dropout."""

from __future__ import annotations

from collections.abc import Callable
from dataclasses import dataclass
from typing import Annotated

import torch
import torch.nn.functional as F
from torch import Tensor

from ..fields import Count, OneOf, ShareBelowOne
from ..kernels import ACTIVATIONS
from .two_layers import TwoLayerConfig, TwoLayerExperts, two_thirds

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


class GeneralFFNExperts(TwoLayerExperts):
    """E networks ``dropout(act(x w_in + b_in)) w_out + b_out``, or gated ones, ``dropout(act(x w_gate + b_gate) * (x
    w_in + b_in)) w_out + b_out``.

    Parameters: ``w_in`` (E, D, F), ``w_out`` (E, F, D_out); ``w_gate`` (E, D, F) in gated ones; the biases ``b_in``,
    ``b_gate`` (E, F) and ``b_out`` (E, D_out) that the config asks for.
    """

    saved_order = ("w_in", "b_in", "w_out", "b_out", "w_gate", "b_gate")
    shown = ("activation", "dropout")

    def __init__(self, config: GeneralFFN, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__(config, num_experts, dim, out_dim)
        self.activation, self.dropout = config.activation, config.dropout

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        act = GENERAL_ACTIVATIONS[self.activation]
        return F.dropout(act(up) if gate is None else act(gate) * up, self.dropout, self.training)


@dataclass(frozen=True)
class GeneralFFN(TwoLayerConfig):
    """``dropout(act(x w_in + b_in)) w_out + b_out``, or gated ``dropout(act(x w_gate + b_gate) * (x w_in + b_in)) w_out
    + b_out``, with any of the biases. ``FFN``, ``SwiGLU`` and ``GEGLU`` have fused kernels for their formulas.

    Attributes:
        hidden_dim: F; None: 4 * dim, or if gated 8/3 * dim, up to the next multiple of 8.
        activation: a key of ``GENERAL_ACTIVATIONS``: the activations of ``FFN``, "quick_gelu" (``x sigmoid(1.702 x)``,
            OpenAI's CLIP), "sigmoid", "tanh", "relu2" (the square), "relu6", "leaky_relu", "elu", "mish" or
            "hardswish".
        gated: with ``w_gate``.
        bias_in, bias_gate, bias_out: which biases there are.
        dropout: probability that a number of the hidden layer is zero in training.

    Raises:
        ValueError: an unknown activation, a value out of its range, or ``bias_gate`` without ``gated``.
    """

    experts_class = GeneralFFNExperts

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
        if self.hidden_dim is not None:
            return self.hidden_dim
        return two_thirds(dim) if self.gated else 4 * dim

    def tensors(self) -> tuple[str, ...]:
        biases = {"b_in": self.bias_in, "b_gate": self.bias_gate, "b_out": self.bias_out}
        return ("w_in", "w_out", *(["w_gate"] if self.gated else []), *(name for name, used in biases.items() if used))
