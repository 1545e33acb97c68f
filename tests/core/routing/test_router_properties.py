"""Properties of gates beyond the conformance suite: derivatives of all that losses read, graphs of dynamic sizes."""

import pytest
import torch
import torch._dynamo
from stepped import assert_same, step
from torch import Tensor
from torch.autograd import gradcheck
from torch.func import functional_call

from core import FFN, Balance, MoEConfig, RoutingContext, TokenChoice
from core.routing.given.per_sequence import Sentence, Task
from core.routing.learned import Attention, Cosine, Stable
from core.routing.pairs.adaptive import DynamicThreshold, NullExperts, Threshold, TokenRounding
from core.routing.pairs.assignment import Base, Sinkhorn
from core.routing.pairs.groups import Ensemble, Hierarchical, Prototypes
from core.routing.pairs.smooth import Dense, DenseToSparse, DSelectK

D, E = 4, 8
CONFIGS = {
    "prototypes": Prototypes(4),
    "threshold": Threshold(0.4, second_expert_policy="threshold"),
    "null-experts": NullExperts(4, 8),
    "dynamic-threshold": DynamicThreshold(3),
    "logit-norm": TokenChoice(2, logit_norm=1.0),
    "hierarchical": Hierarchical(4, 2, 1),
    "token-rounding": TokenRounding(2, tile=3),
    "token-rounding-1": TokenRounding(1, tile=4),
    "ensemble": Ensemble(2, top_k=2),
    "base": Base(),
    "sinkhorn": Sinkhorn(),
}
every_config = pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)


def layer_of(config, **options):
    """A layer with every score loss that applies, and its router's own."""
    terms = config.terms & {"load_balancing_loss", "router_z_loss", "importance", "mutual_information"}
    balance = Balance(**{"load_balancing_loss": 0.0, "router_z_loss": 0.0, **dict.fromkeys(terms, 1.0)})
    return MoEConfig(E, config, FFN(12), balance=balance, **options).build(D)


# Routers with the number of their experts: all whose gates' gradient is their derivative. Those of DynamicThreshold are
# steps, and it has tests of its own.
DIFFERENTIABLE = {
    **{name: (config, E) for name, config in CONFIGS.items() if name != "dynamic-threshold"},
    "sinkhorn-2": (Sinkhorn(top_k=2), 4),
    "cosine": (Cosine(), 5),
    "cosine-1": (Cosine(top_k=1), 5),
    "attention": (Attention(), 5),
    "attention-1": (Attention(top_k=1, normalize=False), 5),
    "stable": (Stable(5, 3), 3),
    "sentence": (Sentence(), 5),
    "sentence-1": (Sentence(top_k=1), 5),
    "task": (Task(3), 5),
    "task-1": (Task(3, top_k=1), 5),
    "dense": (Dense(), 5),
    "dselect-k": (DSelectK(), 4),
    "dselect-k of five": (DSelectK(), 5),
    "static dselect-k": (DSelectK(per_token=False, max_k=2), 5),
    "dense to sparse": (DenseToSparse(max_k=3), 5),
}


# In evaluation, the conformance suite checks the layer's gradients.
@pytest.mark.parametrize("name", DIFFERENTIABLE)
def test_gates_and_all_that_losses_read_pass_gradcheck(name):
    config, num_experts = DIFFERENTIABLE[name]
    router = config.build(D, num_experts).double()
    names = [n for n, _ in router.named_parameters()]
    context = RoutingContext(torch.rand(2, 4) < 0.8, token_ids_BS=torch.randint(5, (2, 4)), task_ids_B=torch.arange(2))

    def run(x: Tensor, *weights: Tensor) -> tuple[Tensor, ...]:
        torch.manual_seed(0)
        routing = functional_call(router, dict(zip(names, weights, strict=True)), (x, context))
        evidence = routing.evidence
        read = (evidence.scores_TE, evidence.balance_scores, evidence.logits_TE, *(evidence.extra or {}).values())
        unread = 0 * sum(tensor.sum() for tensor in (x, *weights))  # of an input that a router does not read
        # Infinite where a token cannot reach an expert.
        return routing.gates_N + unread, *(out.nan_to_num(neginf=0.0) for out in read if out is not None)

    x = torch.randn(2, 4, D, dtype=torch.float64, requires_grad=True)
    weights = [p.detach().clone().requires_grad_() for p in router.parameters()]
    assert router(x, context).gates_N.dtype == torch.float64
    assert gradcheck(run, (x, *weights), fast_mode=True)


@every_config
def test_scores_of_a_token_sum_to_one_or_are_brought_to_it(config):
    routing = config.build(D, E)(torch.randn(2, 7, D))
    assert routing.evidence.scores_TE.shape == (14, E)
    if not isinstance(config, (DynamicThreshold, Base, Sinkhorn)):  # sigmoid scores; the losses divide by their sum
        torch.testing.assert_close(routing.evidence.scores_TE.sum(-1), torch.ones(14))
    if routing.evidence.balance_scores is not None:
        torch.testing.assert_close(routing.evidence.balance_scores.sum(-1), torch.ones(14))


# The conformance suite compiles every gate; sizes of the batch enter these choices.
@pytest.mark.usefixtures("fresh_compiler")
@pytest.mark.parametrize(
    "name",
    ["base", *(pytest.param(n, marks=pytest.mark.slow) for n in ("threshold", "hierarchical", "token-rounding"))],
)
def test_compiled_with_dynamic_sizes_equals_eager(name):
    config = CONFIGS[name]
    layer = layer_of(config)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True, dynamic=True)
    for batch, length in ((3, 6), (2, 20)):
        x = torch.randn(batch, length, D)
        context = RoutingContext(valid_BS=torch.rand(batch, length) < 0.8)
        assert_same(step(layer, x, context, compiled), step(layer, x, context))


@pytest.mark.usefixtures("fresh_compiler")
def test_a_random_second_compiles_without_a_graph_break():
    # Second gates are about 0.45 at the start, each kept with that probability.
    layer = layer_of(Threshold(1.0))
    compiled, x = torch.compile(layer, backend="aot_eager", fullgraph=True), torch.randn(2, 40, D)
    steps = [step(layer, x, run=compiled) for _ in range(2)]
    assert not torch.equal(steps[0]["ids"], steps[1]["ids"])
