"""The products of the experts in Triton's interpreter, against the oracle on outputs and gradients."""

from __future__ import annotations

import copy
import itertools
import warnings

import pytest
import torch
from expert_problems import FLOAT32, assert_same, problem
from fused import Operations, Severed

import core
from core.kernels import FFNWeights, RowIndex, eager, triton_ops
from core.kernels.triton_ops import gate, products, quantized, sort

pytest.importorskip("triton")


BOUNDS = {torch.float32: FLOAT32, torch.float16: 4e-3, torch.bfloat16: 3e-2}


@pytest.mark.parametrize(
    "dtype, top_k, token_major, H",
    [
        (torch.float32, 3, False, 34),
        (torch.float32, 18, True, 8),  # more than a loop unrolls
        (torch.float16, 1, False, 34),
        (torch.bfloat16, 3, True, 34),
    ],
)
def test_experts_equal_the_oracle_in_each_dtype_for_one_to_many_experts_a_token(dtype, top_k, token_major, H):
    # Tiles have 32 columns in the interpreter: 34 hidden numbers are two tiles.
    # An expert has one tile of rows here; test_kernels.py has more.
    p = problem(4, E=max(3, top_k), K=top_k, D=20, H=H, D_out=18, expert="swiglu+bias")
    assert_same(p.run("triton", dtype, token_major), p.run("eager", torch.float64), BOUNDS[dtype])


@pytest.mark.parametrize(
    "backend, frozen", [("cpu", "experts"), ("cpu", "w_in"), ("cpu", "bias"), ("triton", "experts"), ("triton", "bias")]
)
def test_weights_that_do_not_learn_have_no_gradients_computed(backend, frozen):
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.SwiGLU(hidden_dim=6, bias=True), backend=backend).build(8)
    oracle = copy.deepcopy(moe)
    oracle.backend = "eager"
    x = torch.randn(2, 5, 8)
    for m in (moe, oracle):
        for name, p in m.experts.named_parameters():
            p.requires_grad_(
                not (frozen == "experts" or name == frozen or (frozen == "bias" and name.startswith("b_")))
            )
    leaves = [x.clone().requires_grad_() for _ in range(2)]
    counted = []
    for m, leaf in zip((moe, oracle), leaves, strict=True):
        y = m(leaf)
        counted.append(core.count_flops(y.square().sum().backward))
    torch.testing.assert_close(leaves[0].grad, leaves[1].grad, rtol=1e-4, atol=1e-5)
    for (name, p), q in zip(moe.named_parameters(), oracle.parameters(), strict=True):
        assert (p.grad is None) == (q.grad is None), name
        if p.grad is not None:
            torch.testing.assert_close(p.grad, q.grad, rtol=1e-4, atol=1e-5)
    # 20 pairs, each 3 products of 8 x 6 for the inputs and one for each weight that learns; the router 2 of 8 x 4.
    learning = {"experts": 0, "w_in": 2, "bias": 3}[frozen]
    assert counted[0] == 2 * 20 * 48 * (3 + learning) + 2 * 2 * 10 * 8 * 4


@pytest.mark.parametrize("learns", list(itertools.product([False, True], repeat=3)), ids=str)
def test_one_product_has_the_gradients_that_are_wanted_and_no_other(monkeypatch, learns):
    launched = []
    for kernel in ("linear", "weight_grad", "column_sums"):
        run = getattr(products, kernel)
        monkeypatch.setattr(
            products,
            kernel,
            lambda *args, run=run, kernel=kernel, **rest: launched.append(kernel) or run(*args, **rest),
        )
    offsets, dy = torch.tensor([2, 5], dtype=torch.int32), torch.randn(6, 3)
    values = torch.randn(6, 4), torch.randn(2, 4, 3), torch.randn(2, 3)
    grads = []
    for backend in (eager, triton_ops):
        x, w, b = (t.clone().requires_grad_(wanted) for t, wanted in zip(values, learns, strict=True))
        y = backend.expert_linear(x, w, offsets, b)
        launched.clear()
        if y.requires_grad:
            flops = core.count_flops(lambda y=y: y.backward(dy))
        grads.append([t.grad for t in (x, w, b)])
    wanted = [kernel for kernel, on in zip(("linear", "weight_grad", "column_sums"), learns, strict=True) if on]
    assert launched == wanted
    if wanted:
        assert flops == 2 * 5 * 4 * 3 * (learns[0] + learns[1])
    for expected, actual in zip(*grads, strict=True):
        assert (actual is None) == (expected is None)
        if actual is not None:
            torch.testing.assert_close(actual, expected)


def test_tokens_that_do_not_learn_have_no_gradient_computed():
    p = problem(4, expert="swiglu+bias")
    ids = p.expert_ids_TK.flatten()
    placed = eager.sort_pairs(ids, eager.count_experts(ids, 4))
    gates = p.gates_TK.float().requires_grad_()
    weights = {name: w.float().requires_grad_() for name, w in p.weights.items()}
    rows = RowIndex(placed.order_R // 2, placed.offsets_E, placed.inverse_N, 2)
    gates_R = gates.flatten()[placed.order_R]
    y = triton_ops.expert_ffn(p.x.float(), rows, gates_R, FFNWeights(**weights), p.activation)
    flops = core.count_flops(lambda: y.backward(p.dy.float()))
    # A product of 24 x 16 for dh and one for each matrix, none for dx.
    assert flops == 2 * int(placed.offsets_E[-1]) * 24 * 16 * 4
    expected = p.run("eager", torch.float64)
    actual = {"gates": gates, **weights}
    assert_same({k: t.grad.double() for k, t in actual.items()}, {k: expected[f"d{k}"] for k in actual}, FLOAT32)


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_the_backward_is_given_no_zeros_for_what_has_no_gradient(backend):
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.SwiGLU(hidden_dim=48), backend=backend).build(8)
    y = moe(torch.randn(1, 16, 8, requires_grad=True))
    dy = torch.randn_like(y)
    with Operations() as seen:
        y.backward(dy)
    assert f"{backend}_expert_ffn_backward" in seen.names
    # Pre-activations are 32 rows of 48; the gates' gradients are zeros that rows without an expert keep.
    assert seen.zeros
    assert max(shape.numel() for shape in seen.zeros) < 32 * 48
    if backend == "triton":
        assert torch.Size((16, 4)) not in seen.zeros, "the scores, which no loss has read"


@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_experts_whose_output_has_no_gradient_have_none(backend):
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.FFN(hidden_dim=6), backend=backend).build(8)
    x = torch.randn(1, 5, 8, requires_grad=True)
    Severed.apply(moe(x)).sum().backward()
    assert all(t.grad is None for t in (x, *moe.parameters()))


@pytest.mark.parametrize("offsets", [[0, 0, 0], [33, 33, 40], [1, 30, 69], [70, 70, 70], [0, 2, 2, 9, 32]])
def test_one_product_sets_the_rows_that_no_expert_computes_to_zero(offsets):
    x, w, ends = torch.randn(70, 12), torch.randn(len(offsets), 12, 40), torch.tensor(offsets, dtype=torch.int32)
    x[offsets[-1] :] = torch.nan
    y = torch.full((70, 40), torch.nan)
    products.linear(x, w, ends, y, clear=True)
    torch.testing.assert_close(y, eager.expert_linear(x, w, ends))
    assert (y[offsets[-1] :] == 0).all()


def test_tf32_is_asked_for_by_either_of_torch_s_names():
    weight, x = torch.randn(2, 4, 6), torch.randn(3, 4)
    matmul = torch.backends.cuda.matmul
    before = matmul.fp32_precision
    assert products._flags(x)["PRECISION"] == "ieee"
    try:
        matmul.fp32_precision = "tf32"
        assert products._flags(x)["PRECISION"] == "tf32"
        assert products._flags(x.bfloat16())["PRECISION"] == "ieee"
        triton_ops.expert_linear(x, weight, torch.tensor([1, 3], dtype=torch.int32))  # torch's old name is now an error
    finally:
        matmul.fp32_precision = before


def apart(t):
    """Return the same numbers, each with another one after it in memory."""
    return torch.stack((t, torch.full_like(t, 99)), -1)[..., 0]


STRIDED = ("row_index", "offsets", "inverse", "gates", "b_in", "b_out", "w_in", "w_out")


@pytest.mark.parametrize("token_major", [False, True])
def test_arguments_may_have_any_strides(token_major):
    T, E, K, D, F = 12, 3, 2, 8, 6
    ids_N = torch.rand(T, E).argsort(-1)[:, :K].flatten()
    placed = eager.sort_pairs(ids_N, eager.count_experts(ids_N, E))
    given = {"x": torch.randn(T, D), "w_in": torch.randn(E, D, F), "w_out": torch.randn(E, F, D)}
    given |= {"b_in": torch.randn(E, F), "b_out": torch.randn(E, D), "gates": torch.rand(T * K)}
    given |= {"row_index": placed.order_R // K, "offsets": placed.offsets_E, "inverse": placed.inverse_N}
    given |= {"y_RD": torch.randn(T * K, D)}
    dy, actual = torch.randn(T, D), {}
    for backend in (triton_ops, eager):
        is_apart = backend is triton_ops
        own = {k: apart(t) if is_apart and k in STRIDED else t.clone() for k, t in given.items()}
        leaves = {k: t.requires_grad_() for k, t in own.items() if t.is_floating_point()}
        rows = RowIndex(own["row_index"], own["offsets"], *((own["inverse"], K) if token_major else ()))
        weights = FFNWeights(*(own[k] for k in ("w_in", "w_out", "b_in", "b_out")))
        y = backend.expert_ffn(own["x"], rows, own["gates"], weights, "gelu")
        y.backward(apart(dy) if is_apart else dy)
        summed = backend.combine(own["y_RD"], rows, own["gates"], T)
        multiplied = backend.expert_linear(own["y_RD"], own["w_in"], own["offsets"], own["b_in"])
        (summed.square().sum() + multiplied.square().sum()).backward()
        tensors = {"y": y, "summed": summed, "multiplied": multiplied} | {f"d{k}": t.grad for k, t in leaves.items()}
        actual[backend] = {k: t.detach().double() for k, t in tensors.items()}
    assert_same(actual[triton_ops], actual[eager], FLOAT32)


def test_shapes_that_do_not_go_together_are_refused():
    x, w_in, w_out = torch.randn(4, 8), torch.randn(2, 8, 6), torch.randn(2, 6, 8)
    offsets, ones = torch.tensor([2, 4], dtype=torch.int32), torch.ones(4)

    def run(offsets=offsets, gates=ones, w_out=w_out, activation="relu", **more):
        triton_ops.expert_ffn(x, RowIndex(None, offsets), gates, FFNWeights(w_in, w_out, **more), activation)

    run()
    for wrong, words in (
        ({"w_out": torch.randn(2, 7, 8)}, r"w_out has shape \(2, 7, 8\), which must be \(2, 6, 8\)"),
        ({"w_out": torch.randn(1, 6, 8)}, r"w_out has shape \(1, 6, 8\), which must be \(2, 6, 8\)"),
        ({"b_out": torch.randn(2, 9)}, r"b_out has shape \(2, 9\), which must be \(2, 8\)"),
        ({"b_in": torch.randn(2, 8)}, r"b_in has shape \(2, 8\), which must be \(2, 6\)"),
        ({"w_gate": torch.randn(2, 8, 7)}, r"w_gate has shape \(2, 8, 7\), which must be \(2, 8, 6\)"),
        ({"offsets": torch.ones(3, dtype=torch.int32)}, r"offsets_E has shape \(3,\), which must be \(2,\)"),
        ({"gates": torch.ones(3)}, r"gates_R has shape \(3,\), which must be \(4,\)"),
        ({"activation": "tanh"}, r"activation='tanh' is not one of"),
    ):
        with pytest.raises(ValueError, match=words):
            run(**wrong)
    with pytest.raises(ValueError, match=r"b has shape \(2, 8\), which must be \(2, 6\)"):
        triton_ops.expert_linear(x, w_in, offsets, torch.randn(2, 8))
    half, words = w_in.bfloat16(), r"tokens are torch.float32 and expert weights torch.bfloat16: they must"
    with pytest.raises(ValueError, match=words):
        triton_ops.expert_ffn(x, RowIndex(None, offsets), ones, FFNWeights(half, w_out.bfloat16()), "relu")
    with pytest.raises(ValueError, match=words):
        triton_ops.expert_linear(x, half, offsets)
    with pytest.raises(ValueError, match=r"row_index_R has shape \(3,\), which must be \(4,\)"):
        triton_ops.combine(x, RowIndex(torch.arange(3), offsets), None, 4)
    for wrong, words in (
        ({"top_k": 5}, "top_k=5 is not in 1 to 4"),
        ({"score_func": "relu"}, "score_func='relu' is not"),
        ({"bias_E": torch.zeros(3)}, r"bias_E has shape \(3,\), which must be \(4,\)"),
        ({"valid_T": torch.ones(8, dtype=torch.bool)}, r"valid_T has shape \(8,\), which must be \(9,\)"),
    ):
        with pytest.raises(ValueError, match=words):
            triton_ops.topk_gate(torch.randn(9, 4), **{"top_k": 2, **wrong})


def test_more_experts_than_the_kernels_take_run_elsewhere_with_one_warning(monkeypatch):
    monkeypatch.setattr(quantized, "MAX_EXPERTS", 3)
    monkeypatch.setattr(gate, "MAX_EXPERTS", 3)
    monkeypatch.setattr(sort, "MAX_BINS", 3)
    core.kernels.fallback._warn.cache_clear()
    p = problem(20, E=4)
    with pytest.warns(UserWarning, match=r"backend='triton' takes at most 3 experts, not 4: using 'grouped'"):
        actual = p.run("triton", torch.float32)
    assert_same(actual, p.run("eager", torch.float64), FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.run("triton", torch.float32)
    logits = torch.randn(9, 4)
    with pytest.warns(UserWarning, match=r"the fused gate takes at most 3 experts, not 4: using 'eager'"):
        best = triton_ops.topk_gate(logits, 2)
    assert torch.equal(best.expert_ids_TK, eager.topk_gate(logits, 2).expert_ids_TK)
    ids = torch.randint(0, 5, (30,))
    assert torch.equal(triton_ops.sort_pairs(ids, eager.count_experts(ids, 4)).order_R, ids.argsort(stable=True))
