"""Problems for the experts of every backend: output and gradients in float64, and how two answers are compared."""

from __future__ import annotations

from dataclasses import dataclass

import torch
from torch import Tensor

from core.kernels import BACKENDS, FFNWeights, RowIndex, eager

# name: (activation, with w_gate, with biases)
EXPERTS = {
    "relu": ("relu", False, False),
    "gelu": ("gelu", False, False),
    "silu": ("silu", False, False),
    "identity": ("identity", False, False),
    "relu+bias": ("relu", False, True),
    "gelu+bias": ("gelu", False, True),
    "silu+bias": ("silu", False, True),
    "gelu_tanh+bias": ("gelu_tanh", False, True),
    "geglu_tanh": ("gelu_tanh", True, False),
    "geglu": ("gelu", True, False),
    "swiglu": ("silu", True, False),
    "geglu+bias": ("gelu", True, True),
    "swiglu+bias": ("silu", True, True),
}


@dataclass
class Problem:
    """Tokens, pairs and weights in float64; ``run`` computes them with a backend in a dtype."""

    x: Tensor
    expert_ids_TK: Tensor  # E where a pair is not computed
    gates_TK: Tensor
    weights: dict[str, Tensor]
    activation: str
    dy: Tensor

    def run(self, backend: str, dtype: torch.dtype, token_major: bool = True) -> dict[str, Tensor]:
        """Return the output and the gradient of each input, in float64."""
        T, K = self.expert_ids_TK.shape
        E = len(self.weights["w_in"])
        ids_N = self.expert_ids_TK.flatten()
        placed = eager.sort_pairs(ids_N, eager.count_experts(ids_N, E))
        x = self.x.detach().to(dtype).requires_grad_()
        gates = self.gates_TK.detach().to(torch.float64 if dtype == torch.float64 else torch.float32).requires_grad_()
        weights = {name: w.detach().to(dtype).requires_grad_() for name, w in self.weights.items()}
        y = BACKENDS[backend].expert_ffn(
            x,
            RowIndex(placed.order_R // K, placed.offsets_E, *((placed.inverse_N, K) if token_major else ())),
            gates.flatten()[placed.order_R],
            FFNWeights(**weights),
            self.activation,
        )
        y.backward(self.dy.to(dtype))
        grads = {"x": x, "gates": gates, **weights}
        return {"y": y.detach().double(), **{f"d{name}": t.grad.double() for name, t in grads.items()}}


def problem(
    T: int,
    *,
    E: int = 4,
    K: int = 2,
    D: int = 16,
    H: int = 24,
    D_out: int | None = None,
    expert: str = "gelu",
    load: str = "spread",
) -> Problem:
    """Return a problem of ``T`` tokens.

    ``load`` is "spread", with a few dropped pairs; "one", where one expert takes all; "empty", where the experts 1 and
    E - 1 take none; or "full", where every pair is computed.
    """
    activation, gated, bias = EXPERTS[expert]
    D_out = D if D_out is None else D_out
    g = torch.Generator().manual_seed(7)

    def randn(*shape: int) -> Tensor:
        # Numbers that bfloat16 holds exactly: every dtype then computes the same problem.
        return torch.randn(*shape, generator=g).bfloat16().double()

    if load == "one":
        ids = torch.full((T, K), 2)
    else:
        ids = torch.rand(T, E, generator=g).argsort(-1)[:, :K]
        if load == "empty":
            ids = torch.where((ids == 1) | (ids == E - 1), 0, ids)
        if load != "full":
            ids[torch.rand(T, K, generator=g) < 0.1] = E
    weights = {"w_in": randn(E, D, H) / 4, "w_out": randn(E, H, D_out) / 4}
    if gated:
        weights["w_gate"] = randn(E, D, H) / 4
    if bias:
        weights |= {"b_in": randn(E, H), "b_out": randn(E, D_out)}
    gates = torch.rand(T, K, generator=g).bfloat16().double()
    return Problem(randn(T, D), ids, gates, weights, activation, randn(T, D_out))


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor], bound: float) -> None:
    """Check that no tensor is off by more than ``bound`` times the largest element of the expected one."""
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        assert actual[name].shape == tensor.shape, name
        error = (actual[name] - tensor).abs().max().item() if tensor.numel() else 0.0
        largest = tensor.abs().max().item() if tensor.numel() else 0.0
        assert error <= bound * largest, f"{name}: off by {error:.2e}, largest element {largest:.2e}"


# Sums of a few hundred float32 products, each off by at most 6e-8: the error grows as the root of their number.
FLOAT32 = 2e-6
