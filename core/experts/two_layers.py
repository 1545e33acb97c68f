"""Common base of feed-forward experts with one hidden layer: their tensors, costs and matmuls."""

from __future__ import annotations

import math
from types import MappingProxyType
from typing import Any, ClassVar

import torch
from torch import Tensor, nn

from ..contract import Rows
from ..kernels import expert_linear, outside_autocast
from .adapters import CHILD, adapted, updates_of
from .base import ExpertConfig, Experts
from .products import autocast_together, first_linear, init_linear_, merged_linear, next_linear, weighted_sum

_ORDER = ("w_in", "b_in", "w_gate", "b_gate", "w_out", "b_out")


class TwoLayerExperts(Experts):
    """E networks ``hidden(x w_in + b_in, x w_gate + b_gate) w_out + b_out``, where ``hidden`` is a subclass's.

    Parameters: ``w_in``, ``w_gate`` (E, D, F), ``w_out`` (E, F, D_out), ``b_in``, ``b_gate`` (E, F) and ``b_out`` (E,
    D_out), as far as the config names them.
    """

    hidden_axes = MappingProxyType({"w_in": 2, "w_gate": 2, "b_in": 1, "b_gate": 1, "w_out": 1})
    linear_in = frozenset({"w_out", "b_out"})
    saved_order: ClassVar[tuple[str, ...]] = ("w_in", "w_out", "w_gate", "b_in", "b_out", "b_gate")
    """The parameters in the order of an optimizer's state."""

    w_in: Tensor
    w_out: Tensor
    w_gate: Tensor | None
    b_in: Tensor | None
    b_out: Tensor | None
    b_gate: Tensor | None

    def __init__(self, config: TwoLayerConfig, num_experts: int, dim: int, out_dim: int) -> None:
        super().__init__()
        self.num_experts, shapes = num_experts, config.shapes(dim, out_dim)
        for name in self.saved_order:
            tensor = torch.empty(num_experts, *shapes[name]) if name in shapes else None
            self.register_parameter(name, None if tensor is None else nn.Parameter(tensor))
        self.reset_parameters()

    def reset_parameters(self) -> None:
        """Start each expert as ``nn.Linear`` does: U(-1/sqrt(fan_in), 1/sqrt(fan_in))."""
        for weight, bias in ((self.w_in, self.b_in), (self.w_gate, self.b_gate), (self.w_out, self.b_out)):
            if weight is not None:
                init_linear_(weight, bias)

    def biases(self) -> list[Tensor]:
        return [b for b in (self.b_in, self.b_out, self.b_gate) if b is not None]

    def _weights(self) -> tuple[Any, ...]:
        """Return the tensors in ``_ORDER``, with their adapters."""
        weights = (getattr(self, name) for name in _ORDER)
        if CHILD not in self._modules:
            return tuple(weights)
        return tuple(adapted(w, updates_of(self, name)) for name, w in zip(_ORDER, weights, strict=True))

    def adapter_shapes(self) -> dict[str, tuple[int, int, int]]:
        matrices = {name: getattr(self, name) for name in ("w_in", "w_gate", "w_out")}
        return {name: tuple(w.shape) for name, w in matrices.items() if w is not None}

    def hidden(self, up: Tensor, gate: Tensor | None) -> Tensor:
        """Return the hidden layer, any shape, given the outputs of ``w_in`` and ``w_gate``."""
        raise NotImplementedError

    def compute_rows(self, rows: Rows) -> Rows:
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(rows.x, *self._weights())
        offsets_E, backend = rows.offsets_E, self.backend
        up_RF = expert_linear(x, w_in, offsets_E, b_in, backend=backend)
        gate_RF = None if w_gate is None else expert_linear(x, w_gate, offsets_E, b_gate, backend=backend)
        return rows.with_output(expert_linear(self.hidden(up_RF, gate_RF), w_out, offsets_E, b_out, backend=backend))

    def compute_each(self, x: Tensor, counts: tuple[int, ...] | None = None, real_T: Tensor | None = None) -> Tensor:
        counts = (self.num_experts,) if counts is None else counts
        n, x = sum(counts), x if x.ndim == 3 else x.unsqueeze(0)
        taken = (None if w is None else w[:n] for w in self._weights())
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(x, *taken)
        up_TnF = first_linear(x, w_in, b_in, counts)
        gate_TnF = None if w_gate is None else first_linear(x, w_gate, b_gate, counts)
        return next_linear(self.hidden(up_TnF, gate_TnF), w_out, b_out)

    def compute_merged(self, x: Tensor, weights: Tensor) -> Tensor:
        # The sum over experts in the parameters' own dtype: under autocast it is rounded once, after it.
        with outside_autocast(x.device):
            mixed = [weighted_sum(weights, w) for w in self._weights()]
        x, w_in, b_in, w_gate, b_gate, w_out, b_out = autocast_together(x, *mixed)
        gate = None if w_gate is None else merged_linear(x, w_gate, b_gate)
        return merged_linear(self.hidden(merged_linear(x, w_in, b_in), gate), w_out, b_out)


class TwoLayerConfig(ExpertConfig):
    """Base of the configs of such experts: a subclass says its hidden width and which tensors there are."""

    experts_class: ClassVar[type[Any]]

    def hidden(self, dim: int) -> int:
        """Return F for this model dim, the default filled in."""
        raise NotImplementedError

    def tensors(self) -> tuple[str, ...]:
        """Return the names of an expert's tensors."""
        raise NotImplementedError

    def shapes(self, dim: int, out_dim: int) -> dict[str, tuple[int, ...]]:
        """Return the shapes of an expert's tensors, by name."""
        F = self.hidden(dim)
        sizes = {"in": (dim, F), "gate": (dim, F), "out": (F, out_dim)}
        return {name: sizes[name[2:]] if name[0] == "w" else sizes[name[2:]][1:] for name in self.tensors()}

    def build(self, num_experts: int, dim: int, out_dim: int | None = None) -> Any:
        return self.experts_class(self, num_experts, dim, dim if out_dim is None else out_dim)

    def num_params(self, dim: int, out_dim: int | None = None) -> int:
        return sum(map(math.prod, self.shapes(dim, dim if out_dim is None else out_dim).values()))

    def flops_per_row(self, dim: int, out_dim: int | None = None) -> int:
        shapes = self.shapes(dim, dim if out_dim is None else out_dim).values()
        return 2 * sum(math.prod(shape) for shape in shapes if len(shape) == 2)


def two_thirds(dim: int) -> int:
    """Return 8/3 * dim, up to the next multiple of 8: gated, it has the parameters of a plain network of 4 * dim."""
    return -(-8 * dim // 24) * 8
