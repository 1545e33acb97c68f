"""``torch.compile`` without a graph break and ``torch.export`` with dynamic token counts, against eager."""

import shutil
import warnings

import pytest
import torch
import torch._dynamo
from stepped import assert_exports, assert_same, step
from torch import Tensor, nn
from torch._dynamo.backends.common import aot_autograd
from torch._dynamo.testing import CompileCounterWithBackend
from torch._functorch.aot_autograd import make_boxed_func
from torch.utils.checkpoint import checkpoint

from core import FFN, GEGLU, Balance, Hash, MoEConfig, RoutingContext, SwiGLU, TokenChoice, record, update_expert_bias

pytestmark = pytest.mark.usefixtures("fresh_compiler")
BALANCE = Balance(load_balancing_loss=1.0, router_z_loss=0.1, importance=1.0)
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


def build(name: str, backend: str) -> nn.Module:
    return MoEConfig(**{**vars(CONFIGS[name]), "backend": backend}).build(8)


# Tracing follows the config and the backend by themselves; the other configs are compiled by the tests below.
each_config = pytest.mark.parametrize(
    "name, backend",
    [
        ("v-moe", "cpu"),
        ("deepseek", "grouped"),
        *(pytest.param(name, "cpu", marks=pytest.mark.slow) for name in ("dropless", "switch")),
    ],
)


@each_config
def test_compiled_layer_equals_eager_in_output_loss_gradients_and_tape(name, backend):
    layer = build(name, backend)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 6, 8)
    assert_same(step(layer, x, VALID, compiled), step(layer, x, VALID))


def test_one_graph_serves_every_number_of_tokens_and_every_tape():
    layer, counter = build("switch", "cpu"), CompileCounterWithBackend("aot_eager")
    compiled, compiles = torch.compile(layer, backend=counter, fullgraph=True, dynamic=True), []
    for shape in ((2, 6, 8), (4, 33, 8)):
        x = torch.randn(shape)
        assert_same(step(layer, x, run=compiled), step(layer, x))
        compiles.append(counter.frame_count)
    assert compiles[-1] == compiles[0] > 0  # the first call alone compiles, maybe in two attempts


def test_the_compiled_layer_sees_the_moved_bias_and_does_not_recompile_for_its_own_tape():
    layer, x = build("deepseek", "cpu"), torch.randn(2, 6, 8)
    counter = CompileCounterWithBackend("aot_eager")
    compiled = torch.compile(layer, backend=counter, fullgraph=True)
    before = step(layer, x, run=compiled)
    for _ in range(3):
        with record(layer) as tape:
            compiled(x.clone().requires_grad_(), None).sum().backward()
        update_expert_bias(layer, tape)
    layer.router.expert_bias += 5 * torch.eye(8)[int(before["load"].argmin())]
    after = step(layer, x, run=compiled)
    assert_same(after, step(layer, x))
    assert not torch.equal(before["ids"], after["ids"])
    assert counter.frame_count == 1


def test_random_routing_compiles_without_a_graph_break():
    router = TokenChoice(2, noise="learned", jitter_eps=0.1, second_expert_policy="random")
    config = MoEConfig(4, router, FFN(12), capacity_factor=0.7, priority="random", balance=Balance(load=0.1))
    layer = config.build(8)
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 6, 8)
    steps = [step(layer, x, run=compiled) for _ in range(2)]
    assert not torch.equal(steps[0]["y"], steps[1]["y"])  # the noise is drawn at each call
    for each in steps:
        # Capacity ceil(0.7 * 2 * 12 / 4) = 5.
        assert int(each["load"].max()) <= 5
        assert all(tensor.isfinite().all() for tensor in each.values())
    layer.eval()
    assert_same({"y": compiled(x)}, {"y": layer(x)})


def test_a_compiled_model_with_autocast_keeps_its_router_in_float32():
    layer = build("dropless", "cpu")
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 6, 8)
    with record(layer) as tape:
        layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y, expected = compiled(x), layer(x)
    plain, cast, _ = (entry.routing for entry in tape.entries)
    assert torch.equal(cast.evidence.logits_TE, plain.evidence.logits_TE)
    assert y.dtype == torch.bfloat16
    assert torch.equal(y, expected)


@pytest.mark.parametrize(
    "backend, forward, backward",
    [("cpu", "cpu_expert_ffn", "cpu_expert_ffn_backward"), ("grouped", "grouped_mm", "grouped_mm_dw")],
)
def test_a_compiled_layer_runs_the_ops_of_its_backend_forward_and_backward(backend, forward, backward):
    graphs = []

    def keep(graph, _):
        graphs.append({str(node.target) for node in graph.graph.nodes})
        return make_boxed_func(graph.forward)

    compiler = aot_autograd(fw_compiler=keep, bw_compiler=keep)
    torch.compile(build("switch", backend), fullgraph=True, backend=compiler)(torch.randn(2, 6, 8)).sum().backward()
    for ops, name in zip(graphs, (forward, backward), strict=True):
        assert f"moesaic.{name}.default" in ops


@pytest.mark.skipif(shutil.which("g++") is None, reason="inductor needs a C++ compiler")
def test_inductor_equals_eager():
    layer = build("switch", "cpu")
    compiled, x = torch.compile(layer, fullgraph=True), torch.randn(2, 6, 8)
    assert_same(step(layer, x, run=compiled), step(layer, x))


@each_config
def test_exported_layer_equals_eager_at_other_numbers_of_tokens(name, backend):
    assert_exports(build(name, backend).eval(), 8)


class Checkpointed(nn.Module):
    """Two layers, each in an activation checkpoint."""

    def __init__(self) -> None:
        super().__init__()
        self.blocks = nn.ModuleList([build("dropless", "cpu"), build("dropless", "cpu")])

    def forward(self, x: Tensor, context: RoutingContext | None = None) -> Tensor:
        for block in self.blocks:
            x = x + checkpoint(block, x, context, use_reentrant=False)
        return x


def test_a_model_compiled_around_its_checkpoints_is_one_graph_while_it_is_recorded(monkeypatch):
    monkeypatch.setattr(torch._dynamo.config, "skip_fwd_side_effects_in_bwd_under_checkpoint", True)
    model, counter, x = Checkpointed(), CompileCounterWithBackend("aot_eager"), torch.randn(2, 6, 8)
    assert_same(step(model, x, run=torch.compile(model, backend=counter, fullgraph=True)), step(model, x))
    assert counter.frame_count == 1


def test_a_layer_with_a_context_is_exported_by_its_own_signature_saved_and_loaded(tmp_path):
    layer = MoEConfig(4, Hash(10), FFN(12)).build(8).eval()

    def inputs(B: int, S: int) -> tuple[Tensor, RoutingContext]:
        valid_BS = torch.arange(S) < torch.arange(S, S - B, -1)[:, None]
        return torch.randn(B, S, 8), RoutingContext(valid_BS, token_ids_BS=torch.randint(10, (B, S)))

    both = {0: torch.export.Dim.DYNAMIC, 1: torch.export.Dim.DYNAMIC}
    # A dimension of each of the context's fields that are there.
    program = torch.export.export(layer, inputs(2, 6), dynamic_shapes={"x": both, "context": [both, both]})
    with warnings.catch_warnings():
        warnings.simplefilter("error")
        warnings.filterwarnings("ignore", "The given buffer is not writable")  # of torch itself, before 2.13
        torch.export.save(program, tmp_path / "layer.pt2")
        loaded = torch.export.load(tmp_path / "layer.pt2").module()
    for B, S in ((2, 6), (3, 7)):
        given = inputs(B, S)
        torch.testing.assert_close(loaded(*given), layer(*given))
