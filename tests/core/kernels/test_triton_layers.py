"""Layers and routers on the Triton kernels, in the interpreter: against the eager ones, compiled, exported, counted."""

from __future__ import annotations

import pytest
import torch
from fused import Calls
from torch import Tensor, nn

import core
from core import kernels
from core.kernels import eager, triton_ops
from core.memory import kept_bytes
from core.routing.balance.terms import balance_sums

pytest.importorskip("triton")


def layer(backend: str, router: core.TokenChoice, **options: object) -> nn.Module:
    torch.manual_seed(3)
    return core.MoEConfig(4, router, core.SwiGLU(hidden_dim=24), backend=backend, **options).build(20)


@pytest.mark.parametrize(
    "router, options",
    [
        (core.TokenChoice(top_k=2), {"capacity_factor": 0.5, "priority": "score", "group": "sequence"}),
        pytest.param(core.TokenChoice(top_k=2, score_func="sigmoid", expert_bias=True), {}, marks=pytest.mark.slow),
        (
            core.TokenChoice(top_k=2, noise="fixed", noise_std=1.0),
            {"balance": core.Balance(load=0.01, importance=0.01)},
        ),
        pytest.param(core.ExpertChoice(), {}, marks=pytest.mark.slow),
        (core.SoftSlots(), {"balance": core.Balance(load_balancing_loss=0, router_z_loss=0)}),
    ],
    ids=["by score", "sigmoid and bias", "noise", "expert choice", "soft"],
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
    "config, training, gates, summed",
    [
        (core.Hierarchical(num_groups=2, top_groups=2, top_k=1), True, 2, set()),
        (core.Hierarchical(num_groups=4, top_groups=1, top_k=2), False, 2, set()),
        (core.Ensemble(num_members=2, top_k=2), True, 1, {"square"}),
        (core.Threshold(), True, 1, {"score", "square"}),
        (core.Threshold(second_expert_policy="threshold"), False, 1, {"score", "square"}),
        (core.TokenRounding(top_k=2, tile=4), True, 1, {"score", "square"}),
        (core.TokenRounding(top_k=2, tile=4), False, 1, {"score", "square"}),
    ],
    ids=lambda value: type(value).__name__,
)
def test_gates_that_choose_the_best_of_some_logits_are_the_fused_one(monkeypatch, config, training, gates, summed):
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
        losses = balance_sums(routing, router.terms - {"localized"})  # it needs the types of the sequences
        (routing.gates_N.square().sum() + sum(t.sum() for t in losses.values())).backward()
        grads = {name: p.grad for name, p in router.named_parameters()}
        out[backend] = {"ids": routing.expert_ids_N, "gates": routing.gates_N, **losses, **grads}
        assert set(routing.evidence.sums or {}) == (summed if backend == "triton" else set())
    assert len(calls) == gates
    for name, expected in out["eager"].items():
        torch.testing.assert_close(out["triton"][name], expected, rtol=1e-5, atol=1e-5)
    merged = core.Merge("meo", top_k=2).build(20, 5)
    weights = merged(x).weights_GE
    merged.backend = "triton"
    monkeypatch.setattr(eager, "topk_gate", None)
    torch.testing.assert_close(merged(x).weights_GE, weights)


@pytest.mark.filterwarnings("ignore:All-NaN slice")  # NumPy's, which interprets
def test_a_router_of_nan_gives_no_token_a_finite_output():
    moe = layer("triton", core.TokenChoice(top_k=2))
    with torch.no_grad():
        for p in moe.router.parameters():
            p.fill_(torch.nan)
    assert moe(torch.randn(1, 5, 20)).isnan().all()


def test_the_balance_losses_take_the_sums_of_the_fused_gate():
    moe = layer("triton", core.TokenChoice(top_k=2), balance=core.Balance(importance=0.1))
    with core.record(moe) as tape:
        moe(torch.randn(1, 12, 20))
    (entry,) = tape.entries
    assert set(entry.routing.evidence.sums) == {"score", "square"}
    assert entry.routing.evidence.sums["score"].sum().item() == pytest.approx(12, rel=1e-5)  # one for each token
    assert all(not t.requires_grad for t in tape.detach().entries[0].routing.evidence.sums.values())


def test_only_tokens_and_pre_activations_are_kept_for_the_backward():
    T, D, F, K = 32, 96, 24, 2
    moe = core.MoEConfig(4, core.TokenChoice(top_k=K), core.SwiGLU(hidden_dim=F), backend="triton").build(D)
    kept = kept_bytes(moe, torch.randn(1, T, D, requires_grad=True))
    pre_activations, outputs = 4 * 2 * T * K * F, 4 * T * K * D
    # The rest is indices, gates and logits: a tenth of the outputs, or of the hidden rows.
    assert pre_activations <= kept < pre_activations + outputs / 4


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_layer_has_no_graph_break():
    moe = layer("triton", core.TokenChoice(top_k=2), capacity_factor=1.0)
    compiled = torch.compile(moe, fullgraph=True, backend="aot_eager")
    x, steps = torch.randn(2, 7, 20), []
    for run in (compiled, moe):
        leaf = x.clone().requires_grad_()
        y = run(leaf)
        y.sum().backward()
        steps.append((y, leaf.grad))
    torch.testing.assert_close(*steps)


def run_every_op() -> None:
    """Call each op of the kernels forward and backward, with and without what is optional."""
    ids_N = torch.tensor([0, 2, 1, 0, 2, 1, 2, 0, 1, 2])  # every pair is computed: other rows are never written
    placed = eager.sort_pairs(ids_N, eager.count_experts(ids_N, 3))
    rows = {"any": kernels.RowIndex(placed.order_R // 2, placed.offsets_E)}
    rows["token-major"] = kernels.RowIndex(placed.order_R // 2, placed.offsets_E, placed.inverse_N, 2)
    leaves = ((5, 8), (10,), (3, 8, 6), (3, 6, 8), (3, 6), (3, 8), (3, 8, 6), (10, 8))
    x, gates, w_in, w_out, b_in, b_out, w_gate, y_RD = (torch.randn(shape, requires_grad=True) for shape in leaves)
    triton_ops.expert_ffn(x, rows["token-major"], gates, kernels.FFNWeights(w_in, w_out), "gelu").sum().backward()
    for index, given in ((rows["any"], gates), (rows["token-major"], None)):
        triton_ops.combine(y_RD, index, given, 5).sum().backward()
    weights = kernels.FFNWeights(w_in, w_out, b_in, b_out, w_gate)
    triton_ops.expert_ffn(x, rows["any"], gates, weights, "silu").sum().backward()
    triton_ops.expert_linear(y_RD, w_in, placed.offsets_E, b_in).sum().backward()
    triton_ops.sort_pairs(ids_N, eager.count_experts(ids_N, 3))
    triton_ops.queue_ranks(ids_N.view(5, 2), torch.randperm(5), 4)
    valid, bias_E = torch.tensor([True, True, False, True, True]), torch.randn(3)
    logits = torch.randn(5, 3, requires_grad=True)
    best = triton_ops.topk_gate(logits, 2, bias_E=bias_E, valid_T=valid)
    (best.gates_TK.sum() + best.scores_TE.square().sum() + best.sums["square"].sum()).backward()
    triton_ops.topk_gate(logits, 2).gates_TK.sum().backward()


QUICK = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("checks", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["quick", "all"])
def test_ops_are_what_they_say_to_the_compiler(checks):
    with Calls() as seen:
        run_every_op()
    forward = {"places", "queue_ranks", "expert_ffn", "linear", "rows_by_token", "combine", "gate"}
    backward = {"expert_ffn_backward", "linear_dw", "combine_backward", "gate_backward"}
    assert {call[0].name() for call in seen.calls.values()} == {
        f"moesaic::triton_{name}" for name in forward | backward
    }
    for op, args, kwargs in seen.calls.values():
        differentiable = not op.name().endswith(("_backward", "_dw"))
        fresh = tuple(
            a.detach().clone().requires_grad_(differentiable and a.is_floating_point()) if isinstance(a, Tensor) else a
            for a in args
        )
        torch.library.opcheck(op, fresh, kwargs, **({} if checks is None else {"test_utils": checks}))
