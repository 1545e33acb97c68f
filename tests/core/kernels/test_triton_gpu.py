"""The Triton kernels on a card: sizes that fill it, graphs, and no word with the host. Run with: pytest -m gpu"""

from __future__ import annotations

import pytest
import torch

import core
from core.kernels import eager, triton_ops
from core.kernels.triton_ops import environment

pytestmark = [
    pytest.mark.gpu,
    pytest.mark.skipif(not torch.cuda.is_available(), reason="no CUDA device"),
    pytest.mark.skipif(environment.interpreted(), reason="the interpreter is on: run with -m gpu alone"),
]

SHAPES = {
    # T, D, E, K, F: ragged, few rows an expert, many small experts, one expert a token
    "ragged": (1000, 200, 7, 3, 136),
    "few rows": (33, 256, 64, 2, 128),
    "fine-grained": (4096, 512, 64, 8, 192),
    "switch": (2048, 512, 8, 1, 1024),
}
BOUNDS = {torch.float32: 1e-5, torch.bfloat16: 3e-2, torch.float16: 4e-3}


def layers(
    shape: str, dtype: torch.dtype, expert: core.FFN, router: core.RouterConfig | None = None
) -> tuple[torch.nn.Module, torch.nn.Module, torch.Tensor]:
    """The layer by Triton in ``dtype``, the oracle in float64, and tokens. ``router``: None: the shape's top-K."""
    T, D, E, K, F = SHAPES[shape]
    router = core.TokenChoice(top_k=K) if router is None else router
    expert = type(expert)(hidden_dim=F, activation=expert.activation, bias=expert.bias)
    torch.manual_seed(0)
    config = core.MoEConfig(E, router, expert, backend="triton")
    fused = config.build(D).cuda()
    with torch.no_grad():  # numbers that every dtype holds
        for p in fused.parameters():
            p.copy_(p.bfloat16())
    oracle = core.MoEConfig(E, router, expert, backend="eager").build(D).cuda().double()
    oracle.load_state_dict(fused.state_dict())
    fused.experts.to(dtype)
    return fused, oracle, torch.randn(1, T, D, device="cuda").bfloat16()


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "expert", [core.FFN(bias=True), core.FFN(activation="relu"), core.SwiGLU(), core.GEGLU(bias=True)]
)
@pytest.mark.parametrize("shape", SHAPES)
def test_layer_equals_the_oracle(shape, expert, dtype):
    fused, oracle, tokens = layers(shape, dtype, expert)
    actual, expected = {}, {}
    for moe, out, kind in ((fused, actual, dtype), (oracle, expected, torch.float64)):
        x = tokens.to(kind).requires_grad_()
        y = moe(x)
        y.square().mean().backward()
        out |= {"y": y.detach(), "dx": x.grad} | {n: p.grad for n, p in moe.named_parameters()}
    for name, t in expected.items():
        error = (actual[name].double() - t).norm() / t.norm()
        assert error <= BOUNDS[dtype], f"{name}: off by {error:.2e}"


@pytest.mark.parametrize("dtype", BOUNDS)
@pytest.mark.parametrize(
    "shape, expert, router",
    [
        ("fine-grained", core.SwiGLU(), None),
        ("fine-grained", core.GEGLU(bias=True), None),
        ("ragged", core.FFN(bias=True), None),
        ("switch", core.FFN(bias=True), None),
        ("fine-grained", core.SwiGLU(bias=True), core.ExpertChoice()),
    ],
    ids=["swiglu", "bias", "ragged", "one expert a token", "expert choice"],
)
def test_same_bits_every_time(shape, expert, router, dtype, monkeypatch):
    fused, _, tokens = layers(shape, dtype, expert, router)
    seen = []
    for tune in ("0", "1", "1"):  # the default tiles, then the measured ones
        monkeypatch.setenv("MOESAIC_TUNE", tune)
        x = tokens.to(dtype).requires_grad_()
        fused.zero_grad()
        y = fused(x)
        y.float().sum().backward()
        seen.append([y.detach(), x.grad, *(p.grad.clone() for p in fused.parameters())])
    for again in seen[1:]:
        assert all(torch.equal(a, b) for a, b in zip(seen[0], again, strict=True))


def test_nothing_waits_for_the_host():
    fused, _, tokens = layers("fine-grained", torch.bfloat16, core.SwiGLU())
    x = tokens.requires_grad_()

    def step() -> None:
        with core.record(fused) as tape:
            y = fused(x)
        (y.float().sum() + core.aux_loss(tape)).backward()
        core.RoutingStats.from_tape(tape)

    step()  # compiled and tuned
    torch.cuda.set_sync_debug_mode("error")
    try:
        step()
    finally:
        torch.cuda.set_sync_debug_mode("default")


@pytest.mark.parametrize("bias", [False, True])
@pytest.mark.parametrize("shape", ["fine-grained", "switch"])
def test_step_is_captured_in_a_cuda_graph_and_follows_new_tokens(shape, bias):
    fused, _, tokens = layers(shape, torch.bfloat16, core.SwiGLU(bias=bias))
    x = tokens.clone().requires_grad_()

    def step() -> list[torch.Tensor]:
        # Not ``backward``: it would leave gradients in memory that the graph does not own.
        y = fused(x)
        return [y.detach(), *torch.autograd.grad(y.float().square().mean(), [x, *fused.parameters()])]

    side = torch.cuda.Stream()
    side.wait_stream(torch.cuda.current_stream())
    with torch.cuda.stream(side):
        for _ in range(3):  # compiled, tuned, and warm
            step()
    torch.cuda.current_stream().wait_stream(side)
    graph = torch.cuda.CUDAGraph()
    with torch.cuda.graph(graph):
        captured = step()
    with torch.no_grad():
        x.copy_(torch.randn_like(x))
    graph.replay()
    for actual, expected in zip(captured, step(), strict=True):
        assert torch.equal(actual, expected)


def test_compiled_by_inductor():
    fused, _, tokens = layers("ragged", torch.bfloat16, core.SwiGLU())
    compiled = torch.compile(fused, fullgraph=True)
    torch.testing.assert_close(compiled(tokens), fused(tokens), rtol=2e-2, atol=2e-2)


@pytest.mark.parametrize("experts", [8, 32, 64, 130])
def test_a_token_of_nan_is_counted_where_it_goes(experts):
    logits = torch.randn(100, experts, device="cuda")
    logits[3], logits[7, 2] = torch.nan, torch.nan
    best = triton_ops.topk_gate(logits, 2)
    assert best.gates_TK.isnan().all(1).nonzero().flatten().tolist() == [3, 7]
    assert (best.expert_ids_TK[:, 0] != best.expert_ids_TK[:, 1]).all()
    assert torch.equal(best.chosen_per_expert_E, eager.count_experts(best.expert_ids_TK.flatten(), experts))


def test_sort_and_gate_equal_the_oracle_at_size():
    T, E, K = 32768, 64, 8
    logits = torch.randn(T, E, device="cuda")
    fused, exact = triton_ops.topk_gate(logits, K), eager.topk_gate(logits, K)
    assert torch.equal(fused.expert_ids_TK, exact.expert_ids_TK)
    torch.testing.assert_close(fused.gates_TK, exact.gates_TK)
    ids = fused.expert_ids_TK.flatten()
    counts = eager.count_experts(ids, E)
    assert torch.equal(fused.chosen_per_expert_E, counts)
    assert torch.equal(triton_ops.sort_pairs(ids, counts).order_R, eager.sort_pairs(ids, counts).order_R)
    served = torch.randperm(T, device="cuda")
    queue = fused.expert_ids_TK
    assert torch.equal(triton_ops.queue_ranks(queue, served, E), eager.queue_ranks(queue, served, E))
