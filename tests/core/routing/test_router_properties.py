"""Properties of gates beyond the conformance suite: derivatives of all that losses read, graphs of dynamic sizes."""

from __future__ import annotations

from collections.abc import Iterator

import pytest
import torch
import torch._dynamo
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from core import FFN, Balance, MoEConfig, RoutingContext, TokenChoice, aux_losses, record
from core.routing.adaptive import DynamicThreshold, NullExperts, Threshold, TokenRounding
from core.routing.groups import Ensemble, Hierarchical, Prototypes

D, E = 6, 8
CONFIGS = {
    "prototypes": Prototypes(4),
    "threshold": Threshold(0.4, second="threshold"),
    "null-experts": NullExperts(4, 8),
    "dynamic-threshold": DynamicThreshold(3),
    "logit-norm": TokenChoice(2, logit_norm=1.0),
    "hierarchical": Hierarchical(4, 2, 1),
    "token-rounding": TokenRounding(2, tile=3),
    "token-rounding-1": TokenRounding(1, tile=4),
    "ensemble": Ensemble(2, top_k=2),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


@pytest.fixture
def _fresh_compiler() -> Iterator[None]:
    torch._dynamo.reset()
    yield
    torch._dynamo.reset()


def layer_of(config, **options):
    """A layer with every score loss that applies, and its router's own."""
    terms = config.terms & {"load_balancing", "router_z", "importance", "mutual_information"}
    balance = Balance(**{"load_balancing": 0.0, "router_z": 0.0, **dict.fromkeys(terms, 1.0)})
    return MoEConfig(E, config, FFN(12), balance=balance, **options).build(D)


def step(layer, run, x: Tensor, context: RoutingContext | None = None) -> dict[str, Tensor]:
    """Output, loss, decision and gradients of one step."""
    layer.zero_grad()
    x = x.clone().requires_grad_()
    with record(layer) as tape:
        y = run(x, context)
    loss = aux_losses(tape).total
    (y.square().sum() + loss).backward()
    routing = tape.entries[0].routing
    results = {"y": y.detach(), "aux": loss.detach(), "dx": x.grad, "gates": routing.gates_N.detach()}
    results |= {"ids": routing.expert_ids_N, "load": routing.tokens_per_expert_E}
    return results | {name: p.grad.clone() for name, p in layer.named_parameters() if p.grad is not None}


def assert_same(actual: dict[str, Tensor], expected: dict[str, Tensor]) -> None:
    assert actual.keys() == expected.keys()
    for name, tensor in expected.items():
        torch.testing.assert_close(actual[name], tensor, rtol=1e-5, atol=1e-6, msg=lambda m, n=name: f"{n}: {m}")


@pytest.mark.parametrize("name", [n for n in CONFIGS if n != "dynamic-threshold"])
@pytest.mark.parametrize("training", [True, False])
def test_gates_scores_and_logits_pass_gradcheck(name, training):
    # DynamicThreshold's gradient is not that of its gates, which are steps: it has tests of its own.
    router = CONFIGS[name].build(D, E).double().train(training)
    names = [n for n, _ in router.named_parameters()]

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        routing = functional_call(router, dict(zip(names, weights, strict=True)), (x,))
        evidence = routing.evidence
        outputs = (routing.gates_N, evidence.scores_TE, evidence.balance_scores, evidence.logits_TE)
        # Infinite where a token cannot reach an expert.
        return tuple(out.nan_to_num(neginf=0.0) for out in outputs if out is not None)

    x = torch.randn(2, 5, D, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in router.parameters()]
    routing = router(x)
    assert routing.gates_N.dtype == torch.float64
    assert gradcheck(run, (x, *weights))


@every_config
def test_scores_of_a_token_sum_to_one_or_are_brought_to_it(config):
    routing = config.build(D, E)(torch.randn(2, 7, D))
    assert routing.evidence.scores_TE.shape == (14, E)
    if not isinstance(config, DynamicThreshold):  # sigmoid scores; the losses divide by their sum
        torch.testing.assert_close(routing.evidence.scores_TE.sum(-1), torch.ones(14))
    if routing.evidence.balance_scores is not None:
        torch.testing.assert_close(routing.evidence.balance_scores.sum(-1), torch.ones(14))


@pytest.mark.usefixtures("_fresh_compiler")
@every_config
def test_compiled_without_a_graph_break_equals_eager(config):
    layer = layer_of(config)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 6), (2, 20)):
        x = torch.randn(batch, length, D)
        context = RoutingContext(valid_BS=torch.rand(batch, length) < 0.8)
        assert_same(step(layer, compiled, x, context), step(layer, layer, x, context))


@pytest.mark.usefixtures("_fresh_compiler")
def test_a_random_second_compiles_without_a_graph_break():
    # Second gates are about 0.45 at the start, each kept with that probability.
    layer = layer_of(Threshold(1.0))
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    x = torch.randn(2, 40, D)
    steps = [step(layer, compiled, x) for _ in range(2)]
    assert not torch.equal(steps[0]["ids"], steps[1]["ids"])


@every_config
def test_exported_layer_equals_eager_at_other_numbers_of_tokens(config):
    layer = layer_of(config).eval()
    batch, length = torch.export.Dim("batch", min=1, max=64), torch.export.Dim("length", min=1, max=512)
    exported = torch.export.export(layer, (torch.randn(2, 6, D),), dynamic_shapes={"x": {0: batch, 1: length}})
    for shape in ((2, 6, D), (1, 1, D), (5, 40, D)):
        x = torch.randn(shape)
        torch.testing.assert_close(exported.module()(x), layer(x), rtol=1e-5, atol=1e-6)
