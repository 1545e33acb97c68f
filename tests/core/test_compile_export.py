"""``torch.compile`` without a graph break and ``torch.export`` with dynamic token counts, against eager."""

from __future__ import annotations

import shutil
from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor, nn
from torch._dynamo.testing import CompileCounterWithBackend

from core import (
    FFN,
    GEGLU,
    Balance,
    MoEConfig,
    RoutingContext,
    SwiGLU,
    TokenChoice,
    aux_loss,
    record,
    update_expert_bias,
)

BALANCE = Balance(load_balancing=1.0, router_z=0.1, importance=1.0)
CONFIGS = {
    "dropless": MoEConfig(4, TokenChoice(2), FFN(12), balance=BALANCE),
    "switch": MoEConfig(4, TokenChoice(1), FFN(12, bias=True), capacity_factor=1.1, balance=BALANCE),
    "v-moe": MoEConfig(
        4, TokenChoice(2, normalize=False), GEGLU(12), capacity_factor=0.7, priority="score", group="sequence"
    ),
    "deepseek": MoEConfig(
        8,
        TokenChoice(2, score_func="sigmoid", expert_bias=True, num_groups=4, limited_groups=2, scale=2.5),
        SwiGLU(12),
        num_shared_experts=1,
    ),
}
VALID = RoutingContext(valid_BS=torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))


@pytest.fixture(autouse=True)
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def build(name: str, backend: str) -> nn.Module:
    return MoEConfig(**{**vars(CONFIGS[name]), "backend": backend}).build(8)


def step(model: nn.Module, run: nn.Module, x: Tensor, context: RoutingContext | None = None) -> dict[str, Tensor]:
    """Output, loss, decision and gradients of one training step of ``run``, a compiled or plain ``model``."""
    model.zero_grad()
    x = x.clone().requires_grad_()
    with record(model) as tape:
        y = run(x, context)
    (entry,) = tape.entries
    loss = aux_loss(tape)
    (y.square().sum() + loss).backward()
    found = {"y": y.detach(), "aux": loss.detach(), "dx": x.grad, "ids": entry.routing.expert_ids_N}
    found |= {"gates": entry.routing.gates_N.detach(), "load": entry.routing.tokens_per_expert_E}
    return found | {name: p.grad.clone() for name, p in model.named_parameters()}


def assert_same(found: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert found.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(found[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize("name", CONFIGS)
def test_compiled_layer_equals_eager_in_output_loss_gradients_and_tape(name, backend):
    layer = build(name, backend)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8)
    assert_same(step(layer, compiled, x, VALID), step(layer, layer, x, VALID))


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
def test_one_graph_serves_every_number_of_tokens_and_every_tape(backend):
    layer = build("switch", backend)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True)
    compiles = []
    for shape in ((2, 6, 8), (3, 5, 8), (4, 33, 8)):
        x = torch.randn(shape)
        assert_same(step(layer, compiled, x), step(layer, layer, x))
        compiles.append(counter.frame_count)
    assert compiles[-1] == compiles[0] > 0  # the first call alone compiles, maybe in two attempts


def test_a_step_does_not_recompile_for_its_own_tape():
    layer = build("deepseek", "cpu")
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    for _ in range(10):
        with record(layer) as tape:
            compiled(torch.randn(2, 6, 8)).sum().backward()
        update_expert_bias(layer, tape)
    assert counter.frame_count == 1


def test_the_compiled_layer_sees_the_moved_bias():
    layer = build("deepseek", "cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8)
    before = step(layer, compiled, x)
    layer.router.expert_bias += 5 * torch.eye(8)[int(before["load"].argmin())]
    after = step(layer, compiled, x)
    assert_same(after, step(layer, layer, x))
    assert not torch.equal(before["ids"], after["ids"])


def test_random_routing_compiles_without_a_graph_break():
    router = TokenChoice(2, noise="learned", jitter_eps=0.1, second="random")
    config = MoEConfig(4, router, FFN(12), capacity_factor=0.7, priority="random", balance=Balance(load=0.1))
    layer = config.build(8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8)
    found = [step(layer, compiled, x) for _ in range(2)]
    assert not torch.equal(found[0]["y"], found[1]["y"])  # the noise is drawn at each call
    for each in found:
        # Capacity ceil(0.7 * 2 * 12 / 4) = 5.
        assert int(each["load"].max()) <= 5
        assert all(tensor.isfinite().all() for tensor in each.values())
    layer.eval()
    assert_same({"y": compiled(x)}, {"y": layer(x)})


def test_a_compiled_model_with_autocast_keeps_its_router_in_float32():
    layer = build("dropless", "cpu")
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 6, 8)
    with record(layer) as tape:
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = compiled(x)
            expected = layer(x)
    plain, cast, _ = (entry.routing for entry in tape.entries)
    assert torch.equal(cast.logits_TE, plain.logits_TE)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
@pytest.mark.parametrize("backend", ["cpu"])
def test_inductor_equals_eager(backend):
    layer = build("switch", backend)
    compiled = torch.compile(layer, fullgraph=True)
    x = torch.randn(2, 6, 8)
    assert_same(step(layer, compiled, x), step(layer, layer, x))


@pytest.mark.parametrize("backend", ["cpu", "grouped"])
@pytest.mark.parametrize("name", CONFIGS)
def test_exported_layer_equals_eager_at_other_numbers_of_tokens(name, backend):
    layer = build(name, backend).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=512)
    exported = torch.export.export(layer, (torch.randn(2, 6, 8),), dynamic_shapes={"x": {0: batch, 1: length}})
    program = exported.module()
    for shape in ((2, 6, 8), (1, 1, 8), (5, 40, 8)):
        x = torch.randn(shape)
        torch.testing.assert_close(program(x), layer(x), rtol=1e-5, atol=1e-6)


def test_an_exported_layer_is_saved_and_loaded(tmp_path):
    layer = build("dropless", "cpu").eval()
    x = torch.randn(2, 6, 8)
    torch.export.save(torch.export.export(layer, (x,)), tmp_path / "layer.pt2")
    torch.testing.assert_close(torch.export.load(tmp_path / "layer.pt2").module()(x), layer(x), rtol=1e-5, atol=1e-6)
