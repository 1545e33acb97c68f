"""The Triton kernels in the interpreter: each op against the oracle, and what is theirs alone."""

from __future__ import annotations

import copy
import itertools
import json
import os
import warnings
from types import SimpleNamespace

import pytest
import torch
from test_kernels import FLOAT32, assert_same, problem
from torch import Tensor, nn

import core
from core.kernels import eager, resolve_backend, triton_ops
from core.kernels.triton_ops import environment, experts, gate, launch, products, sort, sums, tuning
from core.kernels.triton_ops.tuning import Tile
from core.memory import kept_bytes
from core.routing.balance import balance_sums

pytest.importorskip("triton")
GATES = {
    "switch": (4, 1, {}),
    "top-3": (5, 3, {}),
    "all": (8, 8, {}),
    "v-moe": (8, 2, {"normalize": False}),
    "scaled": (6, 2, {"normalize": False, "scale": 2.5}),
    "sigmoid": (7, 3, {"score_func": "sigmoid"}),
    "sigmoid, not normalised": (12, 2, {"score_func": "sigmoid", "normalize": False}),
    "deepseek-v3": (12, 4, {"score_func": "sigmoid", "num_groups": 3, "limited_groups": 2, "scale": 2.5}),
    "deepseek-v2": (12, 2, {"num_groups": 6, "limited_groups": 2, "group_score": "max"}),
    "groups of one": (6, 3, {"num_groups": 6, "limited_groups": 3}),
    "many": (130, 8, {}),
    "dense": (20, 20, {}),
}


@pytest.mark.parametrize("tokens", [0, 1, 70])
@pytest.mark.parametrize("biased", [False, True])
@pytest.mark.parametrize("name", GATES)
def test_gate_equals_the_oracle_in_choice_gates_sums_and_gradients(name, biased, tokens):
    E, K, options = GATES[name]
    logits = torch.randn(tokens, E)
    bias = torch.randn(E) / 5 if biased else None
    valid = torch.rand(tokens) < 0.7
    exact, fused = logits.double().requires_grad_(), logits.clone().requires_grad_()
    a = eager.topk_gate(exact, K, bias_E=None if bias is None else bias.double(), **options)
    b = triton_ops.topk_gate(fused, K, bias_E=bias, valid_T=valid, **options)
    assert torch.equal(a.expert_ids_TK, b.expert_ids_TK)
    assert torch.equal(b.chosen_per_expert_E, eager.count_experts(a.expert_ids_TK[valid].flatten(), E))
    share = a.scores_TE / a.scores_TE.sum(-1, keepdim=True)
    expected = [a.scores_TE, a.gates_TK, share[valid].sum(0), exact.logsumexp(-1)[valid].square().sum()[None]]
    found = [b.scores_TE, b.gates_TK, b.sums["score"], b.sums["square"]]
    grads = [torch.randn(t.shape) for t in found]
    sum((t * g).sum() for t, g in zip(expected, grads, strict=True)).backward()
    sum((t * g).sum() for t, g in zip(found, grads, strict=True)).backward()
    for t, u in zip((*expected, exact.grad), (*found, fused.grad), strict=True):
        torch.testing.assert_close(u, t.float(), rtol=1e-5, atol=1e-5)


def test_gate_takes_the_lower_expert_of_equal_scores_and_never_one_that_is_not_there():
    equal = triton_ops.topk_gate(torch.zeros(2, 5), 3)
    assert equal.expert_ids_TK.tolist() == [[0, 1, 2], [0, 1, 2]]
    torch.testing.assert_close(equal.gates_TK, torch.full((2, 3), 1 / 3))
    logits = torch.randn(6, 5)
    logits[1], logits[4, 2] = torch.nan, torch.nan
    for options in ({}, {"score_func": "sigmoid", "normalize": False}, {"num_groups": 5, "limited_groups": 3}):
        wrong = triton_ops.topk_gate(logits, 2, **options)
        ids = wrong.expert_ids_TK
        assert ((ids >= 0) & (ids < 5)).all(), "NaN must not become an address"
        assert (ids[:, 0] != ids[:, 1]).all()
        # Else the rows of other tokens would be taken for this one's.
        assert torch.equal(wrong.chosen_per_expert_E, eager.count_experts(ids.flatten(), 5))


def test_gate_gives_an_expert_out_of_reach_no_score_and_no_gradient():
    logits = torch.tensor([[1.0, -torch.inf, 2.0]], requires_grad=True)
    best = triton_ops.topk_gate(logits, 2)
    (best.scores_TE[0, 0] + best.gates_TK[0, 0] + best.sums["square"].sum()).backward()
    assert best.expert_ids_TK.tolist() == [[2, 0]]
    assert best.scores_TE[0, 1] == 0
    assert logits.grad[0, 1] == 0
    assert logits.grad.isfinite().all()


@pytest.mark.parametrize("pairs", [0, 1, 127, 128, 300])
@pytest.mark.parametrize("experts", [1, 3, 65])
def test_sort_equals_the_oracle(pairs, experts):
    ids = torch.randint(0, experts + 1, (pairs,))  # E: not computed
    counts = eager.count_experts(ids, experts)
    for name, expected in vars(eager.sort_pairs(ids, counts)).items():
        assert torch.equal(getattr(triton_ops.sort_pairs(ids, counts), name), expected), name


@pytest.mark.parametrize("tokens", [0, 1, 150])
@pytest.mark.parametrize("ordered", [False, True])
def test_places_in_the_queues_equal_the_oracle_by_position_and_by_score(tokens, ordered):
    queue = torch.randint(0, 6, (tokens, 3))
    served = torch.randperm(tokens) if ordered else None
    assert torch.equal(triton_ops.queue_ranks(queue, served, 6), eager.queue_ranks(queue, served, 6))


def test_places_in_the_queues_are_those_of_gshard():
    # First choices of all tokens before second ones; token 1 is served before token 0.
    queue = torch.tensor([[0, 1], [0, 0], [1, 0]])
    ranks = triton_ops.queue_ranks(queue, torch.tensor([1, 0, 2]), 2)
    assert ranks.tolist() == [[1, 1], [0, 2], [0, 3]]


@pytest.mark.parametrize("dtype, bound", [(torch.float32, FLOAT32), (torch.float16, 4e-3), (torch.bfloat16, 3e-2)])
@pytest.mark.parametrize("top_k", [1, 3, 8])
@pytest.mark.parametrize("token_major", [False, True])
def test_experts_equal_the_oracle_in_each_dtype_for_one_to_eight_experts_a_token(dtype, bound, top_k, token_major):
    p = problem(20, E=8, K=top_k, D=20, H=34, D_out=18, expert="swiglu+bias")
    assert_same(p.run("triton", dtype, token_major), p.run("eager", torch.float64), bound)


def test_experts_equal_the_oracle_where_a_token_takes_more_than_a_loop_unrolls():
    p = problem(6, E=18, K=18, D=20, H=34, D_out=18)
    assert_same(p.run("triton", torch.float32, True), p.run("eager", torch.float64), FLOAT32)


@pytest.mark.parametrize("frozen", ["experts", "w_in", "bias"])
@pytest.mark.parametrize("backend", ["cpu", "triton"])
def test_weights_that_do_not_learn_have_no_gradients_computed(backend, frozen):
    moe = core.MoEConfig(4, core.TokenChoice(top_k=2), core.SwiGLU(hidden_dim=6, bias=True), backend=backend).build(8)
    oracle = copy.deepcopy(moe)
    oracle.experts.backend = oracle.router.backend = oracle.dispatcher.backend = "eager"
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
    for expected, found in zip(*grads, strict=True):
        assert (found is None) == (expected is None)
        if found is not None:
            torch.testing.assert_close(found, expected)


@pytest.mark.parametrize("rows", [0, 4])
def test_tokens_that_do_not_learn_have_no_gradient_computed(rows):
    p = problem(rows, expert="swiglu+bias")
    ids = p.expert_ids_TK.flatten()
    placed = eager.sort_pairs(ids, eager.count_experts(ids, 4))
    gates = p.gates_TK.float().requires_grad_()
    weights = {name: w.float().requires_grad_() for name, w in p.weights.items()}
    pairs = {"inverse_N": placed.inverse_N, "top_k": 2}
    y = triton_ops.expert_ffn(
        p.x.float(),
        placed.order_R // 2,
        placed.offsets_E,
        gates.flatten()[placed.order_R],
        **weights,
        activation=p.activation,
        **pairs,
    )
    flops = core.count_flops(lambda: y.backward(p.dy.float()))
    # A product of 24 x 16 for dh and one for each matrix, none for dx.
    assert flops == 2 * int(placed.offsets_E[-1]) * 24 * 16 * 4
    expected = p.run("eager", torch.float64)
    found = {"gates": gates, **weights}
    assert_same({k: t.grad.double() for k, t in found.items()}, {k: expected[f"d{k}"] for k in found}, FLOAT32)


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


def test_experts_compute_the_same_bits_every_time_and_whatever_the_tile(monkeypatch):
    p = problem(70, D=20, H=40, expert="geglu+bias")
    first = p.run("triton", torch.float32)
    assert all(torch.equal(t, first[name]) for name, t in p.run("triton", torch.float32).items())
    fixed = tuning.INTERPRETED
    for tile in (Tile(16, 16, 4, 1, 1), Tile(64, 32, 4, 1, 4)):
        monkeypatch.setattr(tuning, "INTERPRETED", (tile,))
        # The tile of the rows' own sums is not tuned.
        monkeypatch.setattr(products, "tiles", lambda *_: fixed)
        monkeypatch.setattr(
            tuning.Tuner, "choose", lambda _, kernel, *__, tile=tile: fixed[0] if kernel == "hidden_grad" else tile
        )
        for name, t in p.run("triton", torch.float32).items():
            assert torch.equal(t, first[name]), f"{name} differs with {tile}"


def test_experts_read_tensors_that_are_not_contiguous_and_not_aligned():
    p = problem(21, D=24, H=20, expert="swiglu")
    flat = torch.zeros(p.x.numel() + 1)
    E, D, H = p.weights["w_in"].shape
    placed = eager.sort_pairs(p.expert_ids_TK.flatten(), eager.count_experts(p.expert_ids_TK.flatten(), E))
    x = flat[1:].view_as(p.x).copy_(p.x)  # starts at byte 4
    weights = {name: w.float().transpose(1, 2).contiguous().transpose(1, 2) for name, w in p.weights.items()}
    gates = torch.stack([p.gates_TK.flatten()[placed.order_R].float()] * 2, 1)[:, 0]
    assert not any(w.is_contiguous() for w in weights.values())
    assert not gates.is_contiguous()
    y = triton_ops.expert_ffn(x, placed.order_R // 2, placed.offsets_E, gates, **weights, activation="silu")
    assert_same({"y": y.double()}, {"y": p.run("eager", torch.float64)["y"]}, FLOAT32)


def test_experts_of_another_dtype_than_the_tokens_are_refused():
    x, w = torch.randn(4, 8), torch.randn(2, 8, 8, dtype=torch.bfloat16)
    offsets, ones = torch.tensor([2, 4], dtype=torch.int32), torch.ones(4)
    with pytest.raises(ValueError, match=r"tokens are torch.float32 and expert weights torch.bfloat16: they must"):
        triton_ops.expert_ffn(x, None, offsets, ones, w, w, activation="relu")
    with pytest.raises(ValueError, match=r"tokens are torch.float32 and expert weights torch.bfloat16: they must"):
        triton_ops.expert_linear(x, w, offsets)


def test_more_experts_than_the_kernels_take_run_elsewhere_with_one_warning(monkeypatch):
    monkeypatch.setattr(experts, "MAX_EXPERTS", 3)
    monkeypatch.setattr(gate, "MAX_EXPERTS", 3)
    monkeypatch.setattr(sort, "MAX_BINS", 3)
    core.kernels.fallback._warn.cache_clear()
    p = problem(20, E=4)
    with pytest.warns(UserWarning, match=r"backend='triton' takes at most 3 experts, not 4: using 'grouped'"):
        found = p.run("triton", torch.float32)
    assert_same(found, p.run("eager", torch.float64), FLOAT32)
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        p.run("triton", torch.float32)
    logits = torch.randn(9, 4)
    with pytest.warns(UserWarning, match=r"the fused gate takes at most 3 experts, not 4: using 'eager'"):
        best = triton_ops.topk_gate(logits, 2)
    assert torch.equal(best.expert_ids_TK, eager.topk_gate(logits, 2).expert_ids_TK)
    ids = torch.randint(0, 5, (30,))
    assert torch.equal(triton_ops.sort_pairs(ids, eager.count_experts(ids, 4)).order_R, ids.argsort(stable=True))


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("dtype", [torch.float32, torch.bfloat16])
def test_combine_equals_the_oracle_where_tokens_have_any_number_of_rows(weighted, dtype):
    index, offsets = torch.tensor([3, 0, 3, 1, 3, 0, 2]), torch.tensor([2, 2, 5], dtype=torch.int32)
    rows = torch.randn(7, 40).to(dtype)
    rows[5:] = torch.nan  # past the last offset
    out = {}
    for name in ("eager", "triton"):
        y = rows.clone().requires_grad_()
        gates = torch.rand(7, generator=torch.Generator().manual_seed(1)).requires_grad_()
        total = core.kernels.BACKENDS[name].combine(y, index, offsets, gates if weighted else None, 5)
        total.backward(torch.ones(5, 40).cumsum(1).to(total.dtype))
        out[name] = {"y": total.detach(), "dy": y.grad[:5]} | ({"dgates": gates.grad} if weighted else {})
        assert (y.grad[5:] == 0).all()
        assert (total[4] == 0).all(), "a token without rows is zero"
    for key, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("weighted", [False, True])
@pytest.mark.parametrize("top_k", [1, 3])
def test_combine_of_token_major_pairs_equals_the_oracle(weighted, top_k):
    T, D = 7, 40
    ids = torch.rand(T, 4).argsort(-1)[:, :top_k].masked_fill(torch.rand(T, top_k) < 0.2, 4).flatten()
    placed = eager.sort_pairs(ids, eager.count_experts(ids, 4))
    index, live = placed.order_R // top_k, int(placed.offsets_E[-1])
    rows, gates = torch.randn(T * top_k, D), torch.rand(T * top_k)
    rows[live:], gates[live:] = torch.nan, torch.nan  # past the last offset
    pairs = {"inverse_N": placed.inverse_N, "top_k": top_k}
    out = {}
    for name in ("eager", "triton"):
        y, g = rows.clone().requires_grad_(), gates.clone().requires_grad_()
        total = core.kernels.BACKENDS[name].combine(y, index, placed.offsets_E, g if weighted else None, T, **pairs)
        total.backward(torch.ones(T, D).cumsum(1))
        out[name] = {"y": total.detach(), "dy": y.grad[:live]} | ({"dgates": g.grad[:live]} if weighted else {})
    for key, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][key], expected, rtol=1e-5, atol=1e-5)


@pytest.mark.parametrize("tasks", [0, 2])
def test_the_rows_of_a_token_are_found_without_a_sort(monkeypatch, tasks):
    router, expert = core.TokenChoice(top_k=2), core.MLP((6,))
    if tasks:
        moe = core.MMoE(4, expert, router, backend="triton").build(8, tasks)
    else:
        moe = core.MoEConfig(4, router, expert, backend="triton").build(8)

    def sorts(*_, **__):
        raise AssertionError("a general sort, and a search for what the pairs' own sort has found")

    monkeypatch.setattr(torch.Tensor, "argsort", sorts)
    monkeypatch.setattr(sums, "rows_by_token", sorts)
    moe(torch.randn(5, 8)).sum().backward()


def test_combine_keeps_the_rows_only_where_gates_learn_from_them():
    index, offsets = torch.tensor([0, 2, 0, 1]), torch.tensor([1, 3], dtype=torch.int32)
    y, gates = torch.randn(4, 100, requires_grad=True), torch.rand(4, requires_grad=True)
    for weights in (None, gates):
        kept = []
        with torch.autograd.graph.saved_tensors_hooks(lambda t, kept=kept: kept.append(t.numel()) or t, lambda t: t):
            triton_ops.combine(y, index, offsets, weights, 3)
        assert (max(kept) >= y.numel()) == (weights is not None)


def test_rows_by_token_are_those_of_a_general_sort(monkeypatch):
    index, offsets = torch.randint(0, 9, (300,)), torch.tensor([100, 280], dtype=torch.int32)
    counted = sums.rows_by_token(index, offsets, 9)
    monkeypatch.setattr(sums, "MAX_BINS", 9)
    for a, b in zip(counted, sums.rows_by_token(index, offsets, 9), strict=True):
        assert torch.equal(a, b)


def test_rows_by_token_list_each_tokens_rows_in_order():
    rows, starts = sums.rows_by_token(torch.tensor([2, 0, 2, 0]), torch.tensor([1, 3], dtype=torch.int32), 3)
    assert starts.tolist() == [0, 1, 1, 3]
    assert rows.tolist()[:3] == [1, 0, 2]  # row 3 is past the last offset


def layer(backend: str, router: core.TokenChoice, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return core.MoEConfig(4, router, core.SwiGLU(hidden_dim=24), backend=backend, **options).build(20)


@pytest.mark.parametrize(
    "router, options",
    [
        (core.TokenChoice(top_k=2), {}),
        (core.TokenChoice(top_k=1), {"capacity_factor": 0.75}),
        (core.TokenChoice(top_k=2), {"capacity_factor": 0.5, "priority": "score", "group": "sequence"}),
        (core.TokenChoice(top_k=2, score_func="sigmoid", expert_bias=True), {}),
        (core.TokenChoice(top_k=2, second="random"), {}),
        (
            core.TokenChoice(top_k=2, noise="fixed", noise_std=1.0),
            {"balance": core.Balance(load=0.01, importance=0.01)},
        ),
        (core.ExpertChoice(), {}),
        (core.SoftSlots(), {"balance": core.Balance(load_balancing=0, router_z=0)}),
    ],
    ids=["top-2", "capacity", "by score", "sigmoid and bias", "gshard", "noise", "expert choice", "soft"],
)
def test_layer_computes_and_learns_what_the_eager_one_does(router, options):
    out = {}
    for backend in ("eager", "triton"):
        moe = layer(backend, router, **options)
        x = torch.randn(2, 9, 20, generator=torch.Generator().manual_seed(4)).requires_grad_()
        valid = torch.arange(18).view(2, 9) % 5 != 4
        torch.manual_seed(5)
        with core.record(moe) as tape:
            y = moe(x, core.RoutingContext(valid_BS=valid))
        losses = core.aux_loss(tape)
        (y.sum() + losses).backward()
        out[backend] = {"y": y, "loss": losses, "dx": x.grad} | {n: p.grad for n, p in moe.named_parameters()}
    for name, expected in out["eager"].items():
        torch.testing.assert_close(
            out["triton"][name], expected, rtol=1e-4, atol=1e-5, msg=lambda m, n=name: f"{n}: {m}"
        )


@pytest.mark.parametrize(
    "config, gates, summed",
    [
        (core.Hierarchical(num_groups=2, top_groups=2, top_k=1), 2, set()),
        (core.Hierarchical(num_groups=4, top_groups=1, top_k=2), 2, set()),
        (core.Ensemble(num_members=2, top_k=2), 1, {"square"}),
        (core.Threshold(), 1, {"score", "square"}),
        (core.Threshold(second="threshold", eval_second="always"), 1, {"score", "square"}),
        (core.TokenRounding(top_k=2, tile=4), 1, {"score", "square"}),
    ],
    ids=["hierarchical", "one group", "ensemble", "threshold", "always", "rounding"],
)
@pytest.mark.parametrize("training", [False, True])
def test_gates_that_choose_the_best_of_some_logits_are_the_fused_one(monkeypatch, config, gates, summed, training):
    calls = []
    fused = triton_ops.topk_gate
    monkeypatch.setattr(triton_ops, "topk_gate", lambda *args, **options: calls.append(args) or fused(*args, **options))
    valid = core.RoutingContext(valid_BS=torch.arange(18).view(2, 9) % 5 != 4)
    x, out = torch.randn(2, 9, 20), {}
    router = config.build(20, 8).train(training)
    for backend in ("eager", "triton"):
        router.zero_grad()
        router.backend = backend
        torch.manual_seed(5)
        routing = router(x, valid)
        losses = balance_sums(routing, router.terms)
        (routing.gates_N.square().sum() + sum(t.sum() for t in losses.values())).backward()
        grads = {name: p.grad for name, p in router.named_parameters()}
        out[backend] = {"ids": routing.expert_ids_N, "gates": routing.gates_N, **losses, **grads}
        assert set(routing.sums or {}) == (summed if backend == "triton" else set())
    assert len(calls) == gates
    for name, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][name], expected, rtol=1e-5, atol=1e-5)


def test_merged_experts_are_chosen_by_the_fused_gate(monkeypatch):
    router, x = core.Merge("meo", top_k=2).build(20, 5), torch.randn(3, 4, 20)
    expected = router(x).weights_GE
    router.backend = "triton"
    monkeypatch.setattr(eager, "topk_gate", None)
    torch.testing.assert_close(router(x).weights_GE, expected)


def test_the_balance_losses_take_the_sums_of_the_fused_gate():
    moe = layer("triton", core.TokenChoice(top_k=2), balance=core.Balance(importance=0.1))
    with core.record(moe) as tape:
        moe(torch.randn(1, 12, 20))
    (entry,) = tape.entries
    assert set(entry.routing.sums) == {"score", "square"}
    assert entry.routing.sums["score"].sum().item() == pytest.approx(12, rel=1e-5)  # one for each token
    assert all(not t.requires_grad for t in tape.detach().entries[0].routing.sums.values())


def test_only_tokens_and_pre_activations_are_kept_for_the_backward():
    T, D, F, K = 64, 96, 24, 2
    moe = core.MoEConfig(4, core.TokenChoice(top_k=K), core.SwiGLU(hidden_dim=F), backend="triton").build(D)
    kept = kept_bytes(moe, torch.randn(1, T, D, requires_grad=True))
    pre_activations, outputs = 4 * 2 * T * K * F, 4 * T * K * D
    # The rest is indices, gates and logits: a tenth of the outputs, or of the hidden rows.
    assert pre_activations <= kept < pre_activations + outputs / 4


@pytest.mark.parametrize("grad", [False, True])
def test_compiled_layer_has_no_graph_break(grad):
    moe = layer("triton", core.TokenChoice(top_k=2), capacity_factor=1.0)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x = torch.randn(2, 7, 20, requires_grad=grad)
    with torch.set_grad_enabled(grad):
        torch.testing.assert_close(compiled(x), moe(x))
    if grad:
        compiled(x).sum().backward()
        found = x.grad.clone()
        x.grad = None
        moe(x).sum().backward()
        torch.testing.assert_close(found, x.grad)


def test_exported_layer_takes_another_number_of_tokens():
    moe = layer("triton", core.TokenChoice(top_k=2)).eval()
    length = torch.export.Dim("length", min=2, max=64)
    program = torch.export.export(moe, (torch.randn(1, 8, 20),), dynamic_shapes=({1: length},))
    x = torch.randn(1, 13, 20)
    torch.testing.assert_close(program.module()(x), moe(x))


def test_checkpointed_layer_has_the_same_gradients_under_autocast():
    moe, x = layer("triton", core.TokenChoice(top_k=2)), torch.randn(1, 9, 20)
    grads = []
    for checkpoint in (False, True):
        leaf = x.clone().requires_grad_()
        with torch.autocast("cpu", torch.bfloat16):
            y = torch.utils.checkpoint.checkpoint(moe, leaf, use_reentrant=False) if checkpoint else moe(leaf)
        assert y.dtype == torch.bfloat16
        y.float().sum().backward()
        grads.append(leaf.grad)
    assert torch.equal(*grads)


def samples() -> dict[str, tuple[object, tuple[object, ...]]]:
    T, K, E, D, F = 5, 2, 3, 8, 6
    # Every pair is computed: pre-activations of rows past the last offset are never written.
    ids = torch.tensor([0, 2, 1, 0, 2, 1, 2, 0, 1, 2])
    placed = eager.sort_pairs(ids, eager.count_experts(ids, E))
    rows, offsets = placed.order_R // K, placed.offsets_E
    x, w_in, w_out = torch.randn(T, D), torch.randn(E, D, F), torch.randn(E, F, D)
    gates, logits, valid = torch.rand(T * K), torch.randn(T, E), torch.tensor([True, True, False, True, True])

    def leaf(t: Tensor) -> Tensor:
        return t.clone().requires_grad_()

    ffn = (leaf(x), rows, offsets, leaf(gates), leaf(w_in), leaf(w_out))
    biases = (leaf(torch.randn(E, F)), leaf(torch.randn(E, D)))
    # Every token has two rows.
    by_token = rows.argsort(stable=True), torch.arange(0, T * K + 1, K)
    pre, plain = torch.randn(T * K, F), (x, rows, offsets, gates, w_in, w_out)
    grads = (torch.randn(T, E), torch.randn(T, K), torch.randn(E), torch.randn(1))
    wants = [False, True, False, False, False, False]
    return {
        "places": (sort.places, (ids, E + 1, 0, 0, None)),
        "places in queues": (sort.places, (ids, E + 1, T, K, torch.randperm(T))),
        "experts": (experts._expert_ffn, (*ffn, None, None, None, placed.inverse_N, None, K, "gelu", True)),
        "gated experts": (experts._expert_ffn, (*ffn, *biases, leaf(w_in), *by_token, 0, "silu", True)),
        "backward": (
            experts._expert_ffn_backward,
            (torch.randn(T, D), *plain, None, None, None, placed.inverse_N, None, pre, pre[:0], K, "gelu", wants),
        ),
        "linear": (experts._linear, (leaf(torch.randn(T * K, D)), leaf(w_in), offsets, leaf(biases[0]), False)),
        "gradient of linear": (
            experts._linear_dw,
            (torch.randn(T * K, D), torch.randn(T * K, F), offsets, [False, True]),
        ),
        "rows by token": (sums.rows_by_token, (rows, offsets, T)),
        "combine": (sums._combine, (leaf(torch.randn(T * K, D)), rows, offsets, leaf(gates), *by_token, T, 0)),
        "combine pairs": (
            sums._combine,
            (leaf(torch.randn(T * K, D)), rows, offsets, None, placed.inverse_N, None, T, K),
        ),
        "gate": (gate._gate, (leaf(logits), torch.randn(E), valid, K, True, True, 1, 1, True, 1.0)),
        "gradient of gate": (
            gate._gate_backward,
            (*grads, logits, logits.softmax(-1), torch.tensor([[0, 1]] * T), valid, True, True, 1.0),
        ),
    }


@pytest.mark.parametrize("name", list(samples()))
def test_op_is_what_it_says_to_the_compiler(name):
    op, args = samples()[name]
    torch.library.opcheck(op, args)


def test_flops_of_the_kernels_are_counted():
    T, K, E, D, F = 16, 2, 4, 20, 24
    moe = layer("triton", core.TokenChoice(top_k=K))
    x = torch.randn(1, T, D, requires_grad=True)
    experts_forward = 2 * T * K * 3 * D * F
    assert core.flops.count_flops(moe, x) == experts_forward + 2 * T * D * E
    y = moe(x)
    assert core.flops.count_flops(y.sum().backward) == 2 * experts_forward + 2 * 2 * T * D * E


@pytest.mark.parametrize(
    "chosen, interpreted", [("not slow and not gpu", "1"), ("slow", "1"), ("", "1"), ("gpu", "0"), ("gpu or slow", "0")]
)
def test_the_kernels_of_these_tests_are_interpreted_on_a_machine_with_a_card_too(
    pytestconfig, monkeypatch, chosen, interpreted
):
    plugin = pytestconfig.pluginmanager.getplugin(str(pytestconfig.rootpath / "tests" / "conftest.py"))
    monkeypatch.setenv("TRITON_INTERPRET", "unset")  # and put back afterwards
    monkeypatch.setattr(torch.cuda, "is_available", lambda: True)
    plugin.pytest_configure(SimpleNamespace(getoption=lambda _: chosen))
    assert os.environ["TRITON_INTERPRET"] == interpreted


def test_what_is_missing_is_named(monkeypatch):
    cpu, cuda = torch.device("cpu"), torch.device("cuda")
    assert environment.missing(cpu, torch.float32) is None
    assert environment.missing(cpu, torch.float64) == "the kernels have no torch.float64"
    monkeypatch.setenv("TRITON_INTERPRET", "0")
    assert "interpreter" in environment.missing(cpu, torch.float32)
    with pytest.warns(UserWarning, match=r"backend='triton' does not run torch.bfloat16 on cpu: a CPU runs Triton in"):
        assert resolve_backend("triton", "cpu", torch.bfloat16) == "eager"
    assert environment.missing(torch.device("mps"), torch.float32) == "the kernels are for CUDA, not for mps"
    monkeypatch.setattr(environment, "card", lambda *_: (7, 5))
    assert environment.missing(cuda, torch.float16) == "a card of sm_75 is older than sm_80"
    with pytest.warns(UserWarning, match=r"backend='auto' runs 'grouped' on cuda: a card of sm_75 is older than sm_80"):
        assert resolve_backend("auto", "cuda", torch.float16) == "grouped"
    monkeypatch.setattr(environment, "triton_version", lambda: (2, 1))
    assert environment.missing(cuda, torch.float16).startswith("triton 2.1 is older than 3.6 (pip install")
    monkeypatch.setattr(environment, "triton_version", lambda: None)
    with pytest.warns(UserWarning, match=r"backend='triton' runs 'grouped' on cuda: triton is not installed"):
        assert resolve_backend("triton", "cuda", torch.bfloat16) == "grouped"
    assert environment.missing(cuda, torch.float16) == "triton is not installed (pip install 'moesaic[kernels]')"


def test_auto_takes_the_kernels_on_a_card_that_runs_them(monkeypatch):
    monkeypatch.setattr(environment, "card", lambda *_: (9, 0))
    assert resolve_backend("auto", "cuda", torch.bfloat16) == "triton"
    assert resolve_backend("auto", "cuda", torch.float64) == "eager"
    assert resolve_backend("auto", "cpu", torch.bfloat16) == "cpu"


def test_the_card_that_counts_is_that_of_the_tensors(monkeypatch):
    monkeypatch.setattr(environment, "_capability", lambda index: [(9, 0), (7, 5)][index])
    monkeypatch.setattr(torch.cuda, "current_device", lambda: 0)
    assert (
        resolve_backend("auto", "cuda", torch.bfloat16) == resolve_backend("auto", "cuda:0", torch.float16) == "triton"
    )
    core.kernels.fallback._warn.cache_clear()
    with pytest.warns(UserWarning, match=r"backend='auto' runs 'grouped' on cuda: a card of sm_75 is older than sm_80"):
        assert resolve_backend("auto", "cuda:1", torch.bfloat16) == "grouped"
    assert tuning.tuner("A card") is tuning.tuner("A card")
    assert tuning.tuner("A card") is not tuning.tuner("Another")


def test_a_tile_is_measured_for_each_way_a_product_is_taken(monkeypatch):
    x, w, offsets, gates = torch.randn(4, 8), torch.randn(2, 8, 8), torch.tensor([2, 4]), torch.rand(4)
    with launch.written_down() as found:
        for options in ({}, {"bias": w[:, 0]}, {"gates_R": gates}, {"second": (x, w)}, {"transposed": True}):
            products.linear(x, w, offsets, x, **options)
        monkeypatch.setattr(products, "_flags", lambda _: {"PRECISION": "tf32"})
        products.linear(x, w, offsets, x)
    assert found[0].flags() == ("ieee",)
    assert found[1].flags() == ("BIAS", "ieee")
    assert len({start.flags() for start in found}) == len(found)


def half_tiles(kernel: str, rows: float) -> list[tuple[int, int]]:
    return [(t.m, t.n) for t in tuning.tiles(kernel, (64, 64), torch.bfloat16, rows)]


def test_tiles_are_not_much_taller_than_an_expert_has_rows(monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    assert half_tiles("linear", 4096)[0] == (128, 256)
    assert half_tiles("linear", 16) == [(32, 128)]
    assert half_tiles("linear", 1) == [(16, 128)]
    # Either the wide tensor-core instruction for all that may be tried, or one height alone.
    for kernel, rows in itertools.product(("up", "up_geglu", "up_swiglu", "linear"), (4096, 64, 32, 8)):
        heights = {m for m, _ in half_tiles(kernel, rows)}
        assert min(heights) >= 64 or len(heights) == 1
    assert len(half_tiles("hidden_grad", 4096)) == 1, "its sums depend on the tile: it is not tuned"
    # Masks take registers, and so do rows that are no multiple of 16 bytes.
    for widths, tile in (
        ((2048, 1408), (128, 256)),
        ((2040, 1400), (128, 128)),
        ((2042, 1408), (64, 64)),
        ((2048, 1401), (64, 64)),
    ):
        first = tuning.tiles("linear", widths, torch.bfloat16, 4096)[0]
        assert (first.m, first.n) == tile


def test_tuner_measures_a_shape_once_keeps_it_and_survives_a_broken_file(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(tmp_path))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    asked = []

    def fastest(candidates, run):
        asked.append(candidates)
        return candidates[2]

    monkeypatch.setattr(tuning, "_fastest", fastest)
    args = ("linear", (64, 2048, 1408), ("BIAS", "ieee"), torch.bfloat16, 4096.0, lambda tile: None)
    expected = tuning.PLAIN[2]
    tuner = tuning.Tuner("A card/1")
    assert tuner.choose(*args) == tuner.choose(*args) == expected
    assert len(asked) == 1
    (file,) = tmp_path.iterdir()
    assert list(json.loads(file.read_text())) == ["linear/bfloat16/13/64/2048/1408/BIAS/ieee"]
    assert tuning.Tuner("A card/1").choose(*args) == expected
    assert len(asked) == 1, "another process reads what was measured"
    file.write_text("{")
    assert tuning.Tuner("A card/1").choose(*args) == expected
    assert len(asked) == 2
    assert "cannot be read" in caplog.text
    monkeypatch.setenv("MOESAIC_TUNE", "0")
    assert tuning.Tuner("A card/1").choose(*args) == tuning.PLAIN[0]
    monkeypatch.delenv("MOESAIC_TUNE")
    monkeypatch.setattr(tuning, "MAX_SHAPES", 1)
    assert tuner.choose("linear", (8, 64, 64), *args[2:]) == tuning.PLAIN[0], "the list is bounded"
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: True)
    assert tuning.Tuner("A card/1").choose("linear", (9, 64, 64), *args[2:]) == tuning.PLAIN[0]


def test_tiles_that_cannot_be_kept_are_measured_in_each_process(monkeypatch, tmp_path, caplog):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    (tmp_path / "file").write_text("in the way of a folder")
    monkeypatch.setenv("MOESAIC_TUNING_CACHE", str(tmp_path / "file"))
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, run: candidates[1])
    replaced = []
    monkeypatch.setattr(tuning.os, "replace", lambda *paths: replaced.append(paths))
    tuner = tuning.Tuner("A card/1")
    for width in (64, 128, 256):
        args = ("linear", (64, 2048, width), (), torch.bfloat16, 4096.0, lambda tile: None)
        assert tuner.choose(*args) == tuner.choose(*args) == tuning.PLAIN[1]
    assert not replaced
    assert caplog.text.count("measured tiles are not kept") == 1


def test_a_tile_of_an_older_list_is_measured_anew_and_without_memory_the_default_runs(monkeypatch):
    monkeypatch.setattr(tuning, "interpreted", lambda: False)
    monkeypatch.setattr(torch.cuda, "is_current_stream_capturing", lambda: False)
    answers = iter([None, tuning.PLAIN[2]])
    monkeypatch.setattr(tuning, "_fastest", lambda candidates, run: next(answers))
    tuner = tuning.Tuner("A card/1")
    tuner.loaded = True
    tuner.best["linear/bfloat16/13/64/2048/1408/BIAS/ieee"] = Tile(16, 16, 1, 1)
    args = ("linear", (64, 2048, 1408), (), torch.bfloat16, 4096.0, lambda tile: None)
    assert tuner.choose(*args) == tuning.PLAIN[0]
    assert tuner.choose(*args) == tuner.choose(*args) == tuning.PLAIN[2]


def test_tiles_that_need_more_than_the_card_has_are_passed_over(monkeypatch):
    from triton.runtime.errors import OutOfResources

    def run(tile: Tile) -> None:
        if tile.m == 128:
            raise OutOfResources(300_000, 232_448, "shared memory")

    times = {64: 2.0, 32: 1.0}
    last: list[Tile] = []

    def bench(fn, **_):
        fn()
        return times[last[-1].m]

    monkeypatch.setattr("triton.testing.do_bench", bench)
    tiles = (Tile(128, 64, 8, 3), Tile(64, 64, 4, 3), Tile(32, 64, 4, 3))
    assert tuning._fastest(tiles, lambda tile: (last.append(tile), run(tile))) == tiles[2]

    def full(*_, **__):
        raise torch.OutOfMemoryError

    monkeypatch.setattr("triton.testing.do_bench", full)
    assert tuning._fastest(tiles, run) is None, "the timer's own memory is not there"
