"""``torch.func``, forward-mode and second derivatives of a layer: the oracle's, whatever the backend."""

from __future__ import annotations

from collections.abc import Callable

import pytest
import torch
from grids import pairwise
from torch import Tensor
from torch.autograd import forward_ad

from core import FFN, MLP, ExpertChoice, MoE, MoEConfig, SoftSlots, SwiGLU, TokenChoice
from core.kernels import BACKENDS, FFNWeights, RowIndex, cpu, resolve_backend

EXPERTS = {"swiglu": SwiGLU(6), "ffn": FFN(6, bias=True), "mlp": MLP((6, 4), activation="silu")}


def layer(backend: str, expert: str = "swiglu") -> MoE:
    torch.manual_seed(1)
    return MoEConfig(3, TokenChoice(2), EXPERTS[expert], backend=backend).build(4)


def squares(layer: MoE) -> Callable[[Tensor], Tensor]:
    return lambda x: layer(x).square().sum()


def directional(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    """The derivative of f at x along v by central differences, whose error at this step is about 1e-3 of it."""
    step = 1e-2
    return (f(x + step * v) - f(x - step * v)) / (2 * step)


def forward_mode(f: Callable[[Tensor], Tensor], x: Tensor, v: Tensor) -> Tensor:
    with forward_ad.dual_level():
        return forward_ad.unpack_dual(f(forward_ad.make_dual(x, v))).tangent


DERIVATIVES: dict[str, Callable[[Callable[[Tensor], Tensor], Tensor, Tensor], Tensor]] = {
    "jvp": lambda f, x, v: torch.func.jvp(f, (x,), (v,))[1],
    "jacfwd": lambda f, x, v: (torch.func.jacfwd(f)(x) * v).sum(),
    "grad": lambda f, x, v: (torch.func.grad(f)(x) * v).sum(),
    "jacrev": lambda f, x, v: (torch.func.jacrev(f)(x) * v).sum(),
    "forward_ad": forward_mode,
}


@pytest.mark.parametrize("backend, derivative, expert", pairwise(BACKENDS, DERIVATIVES, ["swiglu", "mlp"]))
def test_a_derivative_along_a_direction_is_the_same_in_every_way(backend, derivative, expert):
    x, v = torch.randn(1, 3, 4), torch.randn(1, 3, 4)
    oracle = squares(layer("eager", expert))
    (backward,) = torch.autograd.grad(oracle(leaf := x.clone().requires_grad_()), leaf)
    expected = (backward * v).sum()
    torch.testing.assert_close(expected, directional(oracle, x, v).detach(), rtol=2e-2, atol=1e-3)
    torch.testing.assert_close(DERIVATIVES[derivative](squares(layer(backend, expert)), x, v), expected)


def test_every_backend_is_the_oracle_under_a_transform_alone():
    seen = []

    def f(x: Tensor) -> Tensor:
        seen.extend(resolve_backend(name, "cpu", torch.float32) for name in ("auto", "cpu", "grouped"))
        return x.sum()

    torch.func.grad(f)(torch.ones(2))
    f(torch.ones(2))
    assert seen == ["eager"] * 3 + ["cpu", "cpu", "grouped"]
    with pytest.raises(ValueError, match="backend='fused' is not one of"):
        torch.func.grad(lambda x: x.sum() if resolve_backend("fused", "cpu", torch.float32) else x)(torch.ones(2))


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize("expert", EXPERTS)
def test_a_penalty_on_the_gradient_has_the_oracles_gradients(backend, expert):
    x = torch.randn(1, 5, 4)
    actual = {}
    for name in ("eager", backend):
        model = layer(name, expert)
        leaves = [x.clone().requires_grad_(), *model.parameters()]
        # Of the tokens' and the weights' gradients: each product's gradient is differentiated once more.
        grads = torch.autograd.grad(squares(model)(leaves[0]), leaves, create_graph=True)
        penalty = sum((g.square().sum() for g in grads), torch.zeros(()))
        actual[name] = [penalty, *torch.autograd.grad(penalty, leaves)]
    for fast, oracle in zip(actual[backend], actual["eager"], strict=True):
        torch.testing.assert_close(fast, oracle, rtol=1e-4, atol=1e-4 * oracle.abs().max().item())


def test_a_weight_given_twice_has_the_gradient_of_both_places():
    # (silu(x w) * x w) w_out with one w for both: the gradient of the tied weight is the sum of the two.
    model = layer("cpu")
    model.experts.w_gate = model.experts.w_in
    x = torch.randn(1, 5, 4)
    (once,) = torch.autograd.grad(squares(model)(x), model.experts.w_in)
    (again,) = torch.autograd.grad(squares(model)(x), model.experts.w_in, create_graph=True)
    torch.testing.assert_close(again, once)


def test_triton_says_that_it_has_no_second_derivative():
    if not BACKENDS["triton"].supports(torch.device("cpu"), torch.float32):
        pytest.skip("Triton does not run here")
    x, w = torch.ones(1, 2), torch.ones(1, 2, 2, requires_grad=True)
    y = BACKENDS["triton"].expert_linear(x, w, torch.tensor([1], dtype=torch.int32))
    (grad,) = torch.autograd.grad(y.square().sum(), w, create_graph=True)
    with pytest.raises(RuntimeError, match="backend='triton' has first derivatives alone: use backend='eager'"):
        grad.square().sum().backward()


@pytest.mark.parametrize("transform", [lambda f: f, torch.func.grad], ids=["outputs", "gradients"])
def test_vmap_over_a_choice_is_refused_and_over_experts_of_equal_loads_it_is_not(transform):
    x = torch.randn(2, 1, 4, 4)
    f = squares(layer("auto"))
    with pytest.raises(ValueError, match="vmap cannot map over a routing, whose counts differ: give the layer the b"):
        torch.func.vmap(transform(f))(x)
    for router in (SoftSlots(), ExpertChoice()):
        equal = squares(MoEConfig(3, router, SwiGLU(6)).build(4))
        expected = torch.stack([transform(equal)(each) for each in x])
        torch.testing.assert_close(torch.func.vmap(transform(equal))(x), expected)


@pytest.mark.parametrize(
    "activation, gated, bias",
    [("relu", False, True), ("gelu", True, False), ("silu", True, True), ("identity", False, False)],
)
def test_second_derivatives_of_the_cpu_op_are_those_of_differences_also_of_undefined_gradients(activation, gated, bias):
    # Tokens 0 to 2 with two experts each; expert 1 has no rows.
    T, E, D, F, K = 3, 3, 2, 3, 2
    row_index = torch.tensor([0, 1, 2, 0, 1, 2])
    offsets = torch.tensor([3, 3, 6], dtype=torch.int32)

    def of(*shape: int) -> torch.Tensor:
        return torch.randn(*shape, dtype=torch.float64, requires_grad=True)

    x, gates, w_in, w_out = of(T, D), of(T * K), of(E, D, F), of(E, F, D)
    options = {"b_in": of(E, F), "b_out": of(E, D)} if bias else {}
    options |= {"w_gate": of(E, D, F)} if gated else {}

    def run(x, gates, w_in, w_out, *rest):
        named = dict(zip(options, rest, strict=True))
        return cpu.expert_ffn(x, RowIndex(row_index, offsets), gates, FFNWeights(w_in, w_out, **named), activation)

    assert torch.autograd.gradgradcheck(run, (x, gates, w_in, w_out, *options.values()))
