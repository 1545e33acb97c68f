"""Picked rows of tables: one-neuron experts and the best keys, held to loops in output and gradients."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

from core.kernels import best_keys, neurons, table_rows

T, K, D, N, E = 11, 6, 8, 5, 9


@pytest.fixture(autouse=True)
def small_chunks(monkeypatch):
    """Make every call go through several chunks, the last of which is shorter."""
    monkeypatch.setattr(table_rows, "CHUNK_BYTES", 4 * K * D * 8)


def made(dtype: torch.dtype = torch.float64) -> dict[str, Tensor]:
    g = torch.Generator().manual_seed(0)
    ids_TK = torch.randint(E - 1, (T, K), generator=g)  # the last expert is idle
    ids_TK[1, 0] = ids_TK[1, 1]  # taken twice by one token
    ids_TK[2, 3] = E  # not computed
    ids_TK[5] = E  # a token without any expert
    return {
        "x": torch.randn(T, D, generator=g, dtype=dtype),
        "u": torch.randn(E, D, generator=g, dtype=dtype),
        "v": torch.randn(E, N, generator=g, dtype=dtype),
        "ids": ids_TK,
        "gates": torch.rand(T, K, generator=g, dtype=dtype),
    }


def loop(x: Tensor, u: Tensor, v: Tensor, ids: Tensor, gates: Tensor) -> Tensor:
    rows = []
    for t in range(T):
        y = torch.zeros(N, dtype=x.dtype)
        for k in range(K):
            i = int(ids[t, k])
            if i < E:
                y = y + gates[t, k] * torch.nn.functional.gelu(x[t] @ u[i]) * v[i]
        rows.append(y)
    return torch.stack(rows)


def gradients(fn, tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    leaves = {n: t.clone().requires_grad_(t.is_floating_point()) for n, t in tensors.items()}
    y = fn(**leaves)
    weight = torch.randn(y.shape, dtype=y.dtype, generator=torch.Generator().manual_seed(1))
    (y * weight).sum().backward()
    grads = {n: t.grad for n, t in leaves.items() if t.is_floating_point()}
    return {"y": y.detach(), **{n: g.to_dense() if g.is_sparse else g for n, g in grads.items()}}


@pytest.mark.parametrize("backend, row_sparse", [("auto", False), ("auto", True), ("eager", False)])
def test_neurons_are_the_loop_in_output_and_gradients(backend, row_sparse):
    expected = gradients(loop, made())

    def run(x, u, v, ids, gates):
        return neurons(x, u, v, ids, gates, "gelu", row_sparse=row_sparse, backend=backend)

    for name, value in gradients(run, made()).items():
        torch.testing.assert_close(value, expected[name], rtol=1e-12, atol=1e-12, msg=lambda m, n=name: f"{n}: {m}")


def test_a_worked_example():
    # act = ReLU. Token (1, 2): expert 0 has u = (1, 1), 1 + 2 = 3, times gate 1/2 and v = 10: 15. Expert 1 has
    # u = (-1, 0), relu(-1) = 0. Expert 2 has u = (0, 2), 4, times 1/4 and v = -1: -1, taken twice: -2. Sum 13.
    u, v = torch.tensor([[1.0, 1.0], [-1.0, 0.0], [0.0, 2.0]]), torch.tensor([[10.0], [7.0], [-1.0]])
    ids, gates = torch.tensor([[0, 1, 2, 2]]), torch.tensor([[0.5, 1.0, 0.25, 0.25]])
    assert neurons(torch.tensor([[1.0, 2.0]]), u, v, ids, gates, "relu").tolist() == [[13.0]]


def test_the_sparse_gradient_has_the_picked_rows_alone():
    tensors = made()
    u = tensors["u"].requires_grad_()
    neurons(**{**rename(tensors), "u": u}, activation="gelu", row_sparse=True).sum().backward()
    picked = tensors["ids"].unique()
    assert u.grad.is_sparse
    assert u.grad._indices()[0].tolist() == picked[picked < E].tolist()


def rename(tensors: dict[str, Tensor]) -> dict[str, Tensor]:
    return {{"x": "x_TD", "ids": "ids_TK", "gates": "gates_TK"}.get(n, n): t for n, t in tensors.items()}


def test_where_nothing_is_computed_the_output_and_the_gradients_are_zero():
    tensors = rename(made())
    tensors["ids_TK"] = torch.full((T, K), E)
    tensors["x_TD"] = torch.full((T, D), torch.nan).requires_grad_()
    u = tensors["u"].requires_grad_()
    for row_sparse in (False, True):
        u.grad = None
        y = neurons(**tensors, activation="gelu", row_sparse=row_sparse)
        y.sum().backward()
        assert not y.any()
        assert not u.grad.to_dense().any()
        assert not row_sparse or u.grad._nnz() == 0


def test_half_precision_tables_are_summed_in_float32():
    tensors = rename(made(torch.bfloat16))
    y = neurons(**tensors, activation="gelu")
    exact = neurons(**{n: t.double() if t.is_floating_point() else t for n, t in tensors.items()}, activation="gelu")
    assert y.dtype == torch.bfloat16
    torch.testing.assert_close(y.double(), exact, rtol=2**-8, atol=1e-6)


def test_second_derivatives():
    tensors = made()

    def run(x, u, v, gates):
        return neurons(x, u, v, tensors["ids"], gates, "gelu")

    inputs = tuple(tensors[n].clone().requires_grad_() for n in ("x", "u", "v", "gates"))
    assert torch.autograd.gradgradcheck(run, inputs)


def test_the_best_keys_are_those_of_all_products():
    g = torch.Generator().manual_seed(2)
    q, keys = torch.randn(37, 4, generator=g, dtype=torch.float64), torch.randn(10, 4, generator=g, dtype=torch.float64)
    best = (q @ keys.t()).topk(3)
    grads = []
    for backend in ("auto", "eager"):
        q_leaf, keys_leaf = q.clone().requires_grad_(), keys.clone().requires_grad_()
        values, index = best_keys(q_leaf, keys_leaf, 3, backend=backend)
        assert torch.equal(index, best.indices)
        torch.testing.assert_close(values, best.values)
        (values * torch.arange(3.0)).sum().backward()
        grads.append((q_leaf.grad, keys_leaf.grad))
    torch.testing.assert_close(grads[0], grads[1])
    inputs = (q.clone().requires_grad_(), keys.clone().requires_grad_())
    assert torch.autograd.gradgradcheck(lambda q, k: best_keys(q, k, 3)[0], inputs)
