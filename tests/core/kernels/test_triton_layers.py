"""Layers and routers on the Triton kernels, in the interpreter: against the eager ones, compiled, exported, counted."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor, nn

import core
from core.kernels import eager, triton_ops
from core.kernels.triton_ops import experts, gate, sort, sums
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
    grads = (torch.randn(T, K), torch.randn(E), torch.randn(1))
    chosen = (logits, logits.softmax(-1), torch.tensor([[0, 1]] * T), valid, True, True, 1.0)
    wants = [False, True, False, False, False, False]
    return {
        "places": (sort._places, (ids, E + 1)),
        "places in queues": (sort._ranks, (ids.view(T, K), torch.randperm(T), E + 1)),
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
        "gradient of combine": (
            sums._combine_backward,
            (torch.randn(T, D), torch.randn(T * K, D), rows, offsets, gates, torch.float32),
        ),
        "gradient of combine alone": (
            sums._combine_backward,
            (torch.randn(T, D), None, rows, offsets, None, torch.bfloat16),
        ),
        "gate": (gate._gate, (leaf(logits), torch.randn(E), valid, K, True, True, 1, 1, True, 1.0)),
        "gradient of gate": (gate._gate_backward, (torch.randn(T, E), *grads, *chosen)),
        "gradient of gates alone": (gate._gate_backward, (None, *grads, *chosen)),
    }


QUICK = ("test_schema", "test_faketensor")


@pytest.mark.parametrize("checks", [QUICK, pytest.param(None, marks=pytest.mark.slow)], ids=["quick", "all"])
@pytest.mark.parametrize("name", list(samples()))
def test_op_is_what_it_says_to_the_compiler(name, checks):
    op, args = samples()[name]
    torch.library.opcheck(op, args, **({} if checks is None else {"test_utils": checks}))
