"""Every backend against the oracle: output and every gradient, over ragged sizes, odd widths and a garbage tail."""

from __future__ import annotations

import warnings

import pytest
import torch
from expert_problems import EXPERTS, FLOAT32, assert_same, problem
from fused import Calls
from grids import pairwise
from torch import Tensor

from core.kernels import BACKENDS, FFNWeights, RowIndex, eager, fallback, resolve_backend
from core.kernels.cpu import blocks, experts, products
from core.kernels.triton_ops import environment

WIDTHS = [(16, 8, 16), (8, 16, 12), (30, 20, 30), (30, 20, 7), (7, 30, 5)]
LOADS, TOKENS = ("spread", "one", "empty"), (0, 1, 7, 100, 600)
# Every expert meets every width, and by turns the numbers of tokens, the loads and the orders of the pairs.
FAST = [
    (backend, expert, *widths, TOKENS[(i + j) % 5], LOADS[(i + 2 * j) % 3], (i + j) % 2 == 0)
    for backend in ("eager", "cpu", "grouped")
    for i, expert in enumerate(EXPERTS)
    for j, widths in enumerate(WIDTHS)
]
# The interpreter is slow.
INTERPRETED = [
    pytest.param(
        *("triton", expert, *WIDTHS[i % 5], 33, LOADS[i % 3], i % 2 == 0),
        marks=[] if expert in ("relu", "gelu+bias", "identity", "geglu_tanh", "swiglu+bias") else [pytest.mark.slow],
    )
    for i, expert in enumerate(EXPERTS)
]


@pytest.mark.parametrize(
    "backend, expert, D, H, D_out, tokens, load, token_major",
    [*pairwise(of=FAST), *INTERPRETED, ("triton", "gelu", *WIDTHS[3], 0, "spread", True)],
)
def test_backend_equals_the_oracle(backend, expert, D, H, D_out, tokens, load, token_major):
    # Rows of 30 or 7 numbers are not whole 16-byte units; a hidden dim above and below the output's
    # takes the gate on either side of the second product.
    p = problem(tokens, D=D, H=H, D_out=D_out, expert=expert, load=load)
    actual = p.run(backend, torch.float32, token_major)
    assert_same(actual, p.run("eager", torch.float64), FLOAT32)
    idle = {"spread": [], "one": [0, 1, 3], "empty": [1, 3]}[load]
    for name in p.weights:
        assert not actual[f"d{name}"][idle].any(), f"an idle expert's d{name} is not zero"


@pytest.fixture(params=["torch", "onednn"])
def library(request, monkeypatch) -> str:
    """The library whose products ``cpu`` takes, at every size."""
    if request.param == "onednn" and not hasattr(torch.ops.mkldnn, "_linear_pointwise"):
        pytest.skip("torch is built without oneDNN")
    monkeypatch.setattr(products, "is_served_badly", lambda: request.param == "onednn")
    monkeypatch.setattr(blocks, "is_served_badly", lambda: request.param == "onednn")
    monkeypatch.setattr(products, "LEAST", 1)
    monkeypatch.setattr(products, "FEWEST_ROWS", 1)
    return request.param


@pytest.mark.parametrize(
    "expert, tokens, widths",
    pairwise(["gelu", "identity", "relu+bias", "swiglu", "geglu+bias"], [0, 7, 33, 600], [(16, 24, 12), (30, 7, 30)]),
)
def test_cpu_equals_the_oracle_by_either_library(library, expert, tokens, widths):
    D, H, D_out = widths
    p = problem(tokens, D=D, H=H, D_out=D_out, expert=expert, load="empty")
    assert_same(p.run("cpu", torch.float32), p.run("eager", torch.float64), FLOAT32)


@pytest.mark.parametrize(
    "expert, H, load",
    pairwise(["gelu", "identity", "relu+bias", "swiglu", "geglu+bias"], [8, 24], ["one", "empty", "spread"]),
)
def test_cpu_blocks_of_an_expert_add_up(library, monkeypatch, expert, H, load):
    monkeypatch.setattr(blocks, "BLOCK", 16)  # 100 tokens, 200 rows: 13 blocks of one expert
    p = problem(100, expert=expert, H=H, load=load)
    assert_same(p.run("cpu", torch.float32), p.run("eager", torch.float64), FLOAT32)


@pytest.mark.parametrize("few, expert, tokens", pairwise([0, experts.FEW], EXPERTS, [0, 1, 7, 12, 600]))
def test_cpu_without_gradients_equals_the_oracle(library, monkeypatch, few, expert, tokens):
    """Few rows are computed for all experts at once, more by blocks; some pairs are dropped and two experts idle."""
    monkeypatch.setattr(experts, "FEW", few)
    p = problem(tokens, expert=expert, load="empty")
    y = {}
    for name, dtype in (("cpu", torch.float32), ("eager", torch.float64)):
        placed = eager.sort_pairs(p.expert_ids_TK.flatten(), eager.count_experts(p.expert_ids_TK.flatten(), 4))
        weights = {k: w.to(dtype) for k, w in p.weights.items()}
        gates_R, index_R = p.gates_TK.flatten().to(dtype)[placed.order_R], placed.order_R // 2
        run, given = BACKENDS[name].expert_ffn, (gates_R, FFNWeights(**weights), p.activation)
        by_index = run(p.x.to(dtype), RowIndex(index_R, placed.offsets_E), *given)
        gathered = run(p.x.to(dtype)[index_R], RowIndex(None, placed.offsets_E), *given)
        y[name] = {"y": by_index.double(), "rows": gathered.double()}
    assert_same(y["cpu"], y["eager"], FLOAT32)


@pytest.mark.parametrize(
    ("backend", "expert"), [(b, e) for b in BACKENDS for e in ("gelu+bias", "swiglu") if (b, e) != ("triton", "swiglu")]
)
def test_gathered_rows_equal_the_oracle_and_rows_past_the_last_offset_are_zero(backend, expert):
    # Rows 0-2 belong to expert 0, none to 1, 3-7 to 2, 8 to 3; row 9 to nobody.
    offsets = torch.tensor([3, 3, 8, 9], dtype=torch.int32)
    p = problem(10, K=1, expert=expert)
    out = {}
    for name, dtype in ((backend, torch.float32), ("eager", torch.float64)):
        x, gates = p.x.to(dtype).requires_grad_(), p.gates_TK.flatten().to(dtype).requires_grad_()
        weights = {k: w.to(dtype).requires_grad_() for k, w in p.weights.items()}
        y = BACKENDS[name].expert_ffn(x, RowIndex(None, offsets), gates, FFNWeights(**weights), p.activation)
        y.backward(p.dy.to(dtype))
        assert y.shape == (10, 16)
        assert y[9].abs().max() == 0
        assert x.grad[9].abs().max() == 0
        assert gates.grad[9] == 0
        out[dtype] = {"y": y.detach().double(), "dx": x.grad.double(), "dgates": gates.grad.double()}
        out[dtype] |= {f"d{k}": w.grad.double() for k, w in weights.items()}
    assert_same(out[torch.float32], out[torch.float64], FLOAT32)


def relative_errors(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> dict[str, float]:
    return {name: ((actual[name] - t).norm() / t.norm()).item() for name, t in expected.items()}


def dense_bfloat16_errors(expert: str) -> dict[str, float]:
    """Errors of one plain bfloat16 FFN on autograd, with tokens and weights like ``problem``'s, gate on the output."""
    p = problem(300, E=1, K=1, D=64, H=96, expert=expert)
    act = eager.ACTIVATIONS[p.activation]
    out = {}
    for dtype in (torch.bfloat16, torch.float64):
        x, gates = p.x.to(dtype).requires_grad_(), p.gates_TK.to(dtype).requires_grad_()
        w = {k: v[0].to(dtype).requires_grad_() for k, v in p.weights.items()}
        h = x @ w["w_in"] + w.get("b_in", 0)
        h = act(x @ w["w_gate"]) * h if "w_gate" in w else act(h)
        y = (h @ w["w_out"] + w.get("b_out", 0)) * gates
        y.backward(p.dy.to(dtype))
        leaves = {"x": x, "gates": gates, **w}
        out[dtype] = {"y": y.detach().double(), **{f"d{k}": t.grad.double() for k, t in leaves.items()}}
    return relative_errors(out[torch.bfloat16], out[torch.float64])


@pytest.mark.parametrize(
    ("backend", "expert", "tokens", "load"),
    [
        ("eager", "geglu", 300, "spread"),
        ("cpu", "relu", 300, "spread"),
        ("cpu", "gelu+bias", 3 * blocks.BLOCK // 2, "one"),  # gradients summed over 3 blocks of one expert
        ("cpu", "swiglu", 3 * blocks.BLOCK // 2, "one"),
        ("grouped", "gelu+bias", 300, "spread"),
        ("grouped", "swiglu", 300, "spread"),
        pytest.param("triton", "swiglu", 48, "spread", marks=pytest.mark.slow),
    ],
)
def test_bfloat16_is_as_exact_as_a_dense_bfloat16_ffn(backend, expert, tokens, load):
    dense = dense_bfloat16_errors(expert)
    p = problem(tokens, D=64, H=96, expert=expert, load=load)
    errors = relative_errors(p.run(backend, torch.bfloat16), p.run("eager", torch.float64))
    for name, error in errors.items():
        # A half more than the dense one: its rounded gate and the sum over two experts are roundings of their own.
        assert error <= 1.5 * dense[name], f"{name}: {error:.2e}, a dense FFN's {dense[name]:.2e}"


@pytest.mark.parametrize(
    "backend, expert, H",
    [
        ("eager", "swiglu", 2),
        *(("cpu", "gelu", 2), ("cpu", "silu+bias", 5), ("cpu", "relu", 5)),
        *(("cpu", "identity", 2), ("cpu", "geglu+bias", 2), ("cpu", "swiglu", 5)),
    ],
)
def test_gradients_pass_gradcheck_in_float64(monkeypatch, backend, expert, H):
    monkeypatch.setattr(blocks, "BLOCK", 2)
    p = problem(4, E=2, D=2, H=H, D_out=3, expert=expert)
    ids_N = p.expert_ids_TK.flatten()
    placed = eager.sort_pairs(ids_N, eager.count_experts(ids_N, 2))
    assert (placed.offsets_E.diff() > 2).any()  # an expert of more than one block
    names = list(p.weights)

    def run(x: Tensor, gates_R: Tensor, *weights: Tensor) -> Tensor:
        named = dict(zip(names, weights, strict=True))
        rows = RowIndex(placed.order_R // 2, placed.offsets_E)
        return BACKENDS[backend].expert_ffn(x, rows, gates_R, FFNWeights(**named), p.activation)

    inputs = (p.x, p.gates_TK.flatten()[placed.order_R], *p.weights.values())
    assert torch.autograd.gradcheck(run, tuple(t.clone().requires_grad_() for t in inputs))


def test_gradients_of_the_oracles_combine_pass_gradcheck():
    rows, offsets = torch.tensor([0, 2, 0, 1]), torch.tensor([1, 3], dtype=torch.int32)
    y, gates = torch.randn(4, 3, dtype=torch.float64), torch.rand(4, dtype=torch.float64)
    inputs = (y.requires_grad_(), gates.requires_grad_())
    assert torch.autograd.gradcheck(lambda y, g: eager.combine(y, RowIndex(rows, offsets), g, 3), inputs)


@pytest.mark.parametrize("backend, expert", [("cpu", "gelu+bias"), ("grouped", "swiglu"), ("triton", "swiglu")])
def test_a_second_backward_through_the_same_graph_gives_the_same_gradients(backend, expert):
    p = problem(20, expert=expert)
    ids_N = p.expert_ids_TK.flatten()
    placed = eager.sort_pairs(ids_N, eager.count_experts(ids_N, 4))
    leaves = [t.float().requires_grad_() for t in (p.x, p.gates_TK.flatten()[placed.order_R], *p.weights.values())]
    named = dict(zip(p.weights, leaves[2:], strict=True))
    rows = RowIndex(placed.order_R // 2, placed.offsets_E)
    y = BACKENDS[backend].expert_ffn(leaves[0], rows, leaves[1], FFNWeights(**named), p.activation)
    first = torch.autograd.grad(y, leaves, p.dy.float(), retain_graph=True)
    second = torch.autograd.grad(y, leaves, p.dy.float())
    assert all(torch.equal(a, b) for a, b in zip(first, second, strict=True))


def poison_freed_memory(*shapes: tuple[int, ...]) -> None:
    """Leave NaN in memory that the next allocations of these shapes may get."""
    for _ in range(3):
        blocks = [torch.full(shape, torch.nan) for shape in shapes]
        del blocks


@pytest.mark.parametrize(
    "backend, expert, token_major",
    [
        *((b, e, t) for b in ("eager", "cpu", "grouped") for e, t in (("gelu+bias", True), ("identity", False))),
        *(("cpu", "swiglu", False), ("grouped", "swiglu+bias", True), ("triton", "swiglu+bias", True)),
        ("triton", "gelu", False),
    ],
)
def test_nan_in_rows_past_the_last_offset_reaches_neither_output_nor_gradients(backend, expert, token_major):
    # The last four of 12 tokens are NaN, with NaN gates, and are routed nowhere.
    clean = problem(12, expert=expert)
    clean.expert_ids_TK[8:] = 4
    dirty = problem(12, expert=expert)
    dirty.expert_ids_TK[8:] = 4
    dirty.x[8:] = torch.nan
    dirty.gates_TK[8:] = torch.nan
    poison_freed_memory((24, 16), (24, 24), (12, 16), (4, 16, 24), (4, 24, 16))
    actual = dirty.run(backend, torch.float32, token_major)
    assert_same(actual, clean.run("eager", torch.float64), FLOAT32)
    for name in ("y", "dx", "dgates"):
        assert actual[name][8:].abs().max() == 0, name


@pytest.mark.parametrize("expert", ["gelu+bias", "swiglu"])
def test_nan_past_the_last_offset_stays_there_by_either_library(library, expert):
    test_nan_in_rows_past_the_last_offset_reaches_neither_output_nor_gradients("cpu", expert, True)


@pytest.mark.parametrize("backend", ["grouped", "triton"])
def test_rows_of_another_width_than_the_weights_are_refused(backend):
    kernels, w = BACKENDS[backend], torch.zeros(2, 8, 8)
    for rows, width in ((0, 3), (4, 12)):
        x, offsets = torch.zeros(rows, width), torch.full((2,), rows, dtype=torch.int32)
        for run in (
            lambda x=x, offsets=offsets: kernels.expert_linear(x, w, offsets),
            lambda x=x, offsets=offsets: kernels.expert_ffn(
                x, RowIndex(None, offsets), torch.ones(len(x)), FFNWeights(w, w), "relu"
            ),
        ):
            with pytest.raises(ValueError, match=f"rows have width {width}, the experts' matrices take 8"):
                run()


def test_combine_ignores_nan_past_the_last_offset_in_output_and_gradients():
    y = torch.tensor([[1.0], [2.0], [3.0], [torch.nan]], requires_grad=True)
    gates = torch.tensor([0.5, 1.0, 2.0, torch.nan], requires_grad=True)
    rows = torch.tensor([1, 0, 1, 0])
    out = eager.combine(y, RowIndex(rows, torch.tensor([2, 3], dtype=torch.int32)), gates, 3)
    # Token 0: 1.0 * 2; token 1: 0.5 * 1 + 2 * 3; token 2 has no row; row 3 is past the last offset.
    assert out.tolist() == [[2.0], [6.5], [0.0]]
    out.sum().backward()
    assert y.grad.tolist() == [[0.5], [1.0], [2.0], [0.0]]
    assert gates.grad.tolist() == [1.0, 2.0, 3.0, 0.0]


@pytest.mark.parametrize(
    "backend, ops, expert",
    [
        ("cpu", {"moesaic::cpu_expert_ffn", "moesaic::cpu_expert_ffn_backward"}, "gelu+bias"),
        ("grouped", {"moesaic::grouped_mm", "moesaic::grouped_mm_dw"}, "swiglu"),
    ],
)
def test_custom_ops_pass_opcheck(backend, ops, expert):
    # Schema (nothing mutated, no alias), fake against real, autograd registration, aot dispatch with dynamic shapes.
    # Every pair is computed: what the ops keep for the backward is undefined past the last offset.
    p = problem(9, expert=expert, load="full")
    with Calls() as recorded:
        p.run(backend, torch.float32)
    assert {op.name() for op, *_ in recorded.calls.values()} == ops
    for op, args, kwargs in recorded.calls.values():
        differentiable = not op.name().endswith(("_backward", "_dw"))
        fresh = tuple(
            a.detach().clone().requires_grad_(differentiable and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in args
        )
        torch.library.opcheck(op, fresh, kwargs)


def test_sort_pairs_is_stable_and_its_inverse_finds_each_pair():
    # Pairs 0..5 of experts 2, 0, E, 2, 0, 1 (E = 3): by expert, earlier first, the uncomputed pair 2 last.
    ids = torch.tensor([2, 0, 3, 2, 0, 1])
    counts = eager.count_experts(ids, 3)
    assert counts.tolist() == [2, 1, 2]
    placed = eager.sort_pairs(ids, counts)
    assert placed.order_R.tolist() == [1, 4, 5, 0, 3, 2]
    assert placed.inverse_N.tolist() == [3, 0, 5, 4, 1, 2]
    assert placed.offsets_E.tolist() == [2, 3, 5]
    assert placed.offsets_E.dtype == torch.int32


def test_capacity_ranks_serve_each_queue_by_priority():
    # Queue 0 holds pairs 0, 2, 3 with priorities 5, 1, 3: places 2, 0, 1. Queue 1 holds pair 1. Queue 2 holds pair 4.
    ranks = eager.capacity_ranks(torch.tensor([0, 1, 0, 0, 2]), torch.tensor([5, 4, 1, 3, 0]), 3)
    assert ranks.tolist() == [2, 0, 0, 1, 0]


@pytest.mark.parametrize(
    "factor, top_k, tokens, experts, expected",
    [
        (1.0, 2, 6, 4, 3),  # 12 / 4
        (1.0, 1, 5, 2, 3),  # 2.5
        (1.1, 1, 100, 10, 11),  # 1.1 * 10 is 11.000000000000002 in floats: still 11
        (1.1, 1, 10, 1, 11),
        (1.05, 2, 40, 4, 21),  # 1.05 * 20
        (0.1, 1, 1, 8, 1),  # at least one where there is a token
        (1.25, 2, 0, 8, 0),
        (0.7, 3, 100, 3, 70),
        (1 / 3, 2, 4096 * 12, 8, 4096),  # a third of 12 * 4096 / 4, although 0.333... has 16 digits
        (2 / 3, 1, 3, 2, 1),
    ],
)
def test_capacity_is_the_exact_ceiling(factor, top_k, tokens, experts, expected):
    ratio = eager.whole_ratio(factor)
    assert eager.capacity(ratio, top_k, tokens, experts) == expected
    assert eager.capacity(ratio, top_k, torch.tensor([tokens, 0]), experts).tolist() == [expected, 0]


def test_backend_auto_is_cpu_on_cpu_and_grouped_on_cuda_where_triton_does_not_run(monkeypatch):
    monkeypatch.setattr(environment, "triton_version", lambda: None)
    assert resolve_backend("auto", "cpu", torch.float64) == "cpu"
    fallback._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"backend='auto' runs 'grouped' on cuda: triton is not installed \(pip inst"):
        assert resolve_backend("auto", "cuda", torch.bfloat16) == "grouped"
    assert resolve_backend("auto", "cuda", torch.float64) == "eager"
    assert resolve_backend("auto", "mps", torch.float32) == "eager"


@pytest.mark.parametrize("backend, device, dtype", [("grouped", "cpu", torch.float64), ("cpu", "cuda", torch.float32)])
def test_backend_that_cannot_run_falls_back_to_eager_with_one_warning(backend, device, dtype):
    fallback._warn.cache_clear()
    with pytest.warns(UserWarning, match=f"backend='{backend}' does not run {dtype} on {device}"):
        assert resolve_backend(backend, device, dtype) == "eager"
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        assert resolve_backend(backend, device, dtype) == "eager"
    with pytest.raises(ValueError, match=r"backend='fused' is not one of auto, eager, cpu, grouped, triton"):
        resolve_backend("fused", "cpu", torch.float32)
