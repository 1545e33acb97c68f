"""One expert in place of random ones: it is the layer's evaluation, whose parameters are the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

from core import (
    FFN,
    IA3,
    MLP,
    AttentionExperts,
    ClampedSwiGLU,
    ExpertConfig,
    Identity,
    LoRA,
    MoEConfig,
    Random,
    RoutingContext,
    SwiGLU,
    TokenChoice,
    average_experts,
    count_flops,
    record,
)
from core.telemetry import RoutingStats

MERGED = Random(per="batch", evaluation="merged")
EXPERTS = [
    FFN(12, bias=True),
    SwiGLU(12),
    ClampedSwiGLU(12, bias=True),
    MLP((12, 8), norm="layer"),
    LoRA(3, 6.0),
    IA3(),
]


def built(expert: ExpertConfig, **options):
    """Return a layer of four experts that are unlike each other."""
    layer = MoEConfig(4, MERGED, expert, **options).build(8)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return layer


def test_in_evaluation_the_matrices_are_averaged_and_not_the_outputs():
    layer = MoEConfig(2, MERGED, LoRA(1)).build(1)
    with torch.no_grad():
        layer.experts.w_a.copy_(torch.tensor([[[1.0]], [[3.0]]]))
        layer.experts.w_b.copy_(torch.tensor([[[2.0]], [[4.0]]]))
    x = torch.full((1, 3, 1), 10.0)
    # The means are 2 and 3: 10 * 2 * 3. The outputs 10 * 1 * 2 and 10 * 3 * 4 have the mean 70.
    assert layer.eval()(x).flatten().tolist() == [60.0] * 3
    assert set(layer.train()(x).flatten().tolist()) <= {20.0, 120.0}
    average = MoEConfig(2, Random(evaluation="average"), LoRA(1)).build(1).eval()
    average.load_state_dict(layer.state_dict())
    assert average(x).flatten().tolist() == [70.0] * 3


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda e: type(e).__name__)
def test_one_expert_is_the_layer_in_evaluation(expert):
    layer = built(expert, num_shared_experts=1, shared_expert=FFN(6), shared_gate="mix", output_bias=True).eval()
    nn.init.normal_(layer.output_bias)
    x = torch.randn(2, 5, 8)
    one = average_experts(layer)
    torch.testing.assert_close(one(x), layer(x), rtol=1e-5, atol=1e-6)
    for name, mean in one.expert.weights_of(0).items():
        expected = torch.stack([layer.experts.weights_of(e)[name] for e in range(4)]).mean(0)
        torch.testing.assert_close(mean, expected)
    # The router goes, and three of four experts.
    gone = sum(p.numel() for p in layer.experts.parameters()) * 3 // 4
    assert sum(p.numel() for p in one.parameters()) == sum(p.numel() for p in layer.parameters()) - gone
    before = layer(x)
    with torch.no_grad():
        for parameter in one.parameters():
            parameter.zero_()
    assert torch.equal(layer(x), before)  # they are copies


def test_one_expert_costs_what_an_expert_does():
    x = torch.randn(2, 5, 8)
    assert count_flops(average_experts(built(FFN(12)).eval()), x) == 10 * FFN(12).flops_per_row(8)


def test_a_batch_takes_one_expert_in_training_and_all_of_it_in_evaluation():
    layer, x = built(FFN(12)), torch.randn(2, 5, 8)
    valid = torch.tensor([[True] * 5, [True] * 3 + [False] * 2])
    loads = []
    for training in (True, False):
        with record(layer.train(training)) as tape:
            layer(x, RoutingContext(valid))
        loads.append(sorted(tape.entries[0].routing.tokens_per_expert_E.tolist()))
        assert int(RoutingStats.from_tape(tape).layers[""].num_tokens) == 8
    assert loads == [[0, 0, 0, 8], [8, 8, 8, 8]]


def test_padding_comes_out_zero_and_reaches_no_gradient():
    layer, x = built(FFN(12, bias=True)).eval(), torch.randn(2, 3, 8)
    x[0, 2] = torch.nan
    y = layer(x, RoutingContext(torch.tensor([[True, True, False], [True, True, True]])))
    assert not y[0, 2].any()
    y.sum().backward()
    assert all(p.grad.isfinite().all() for p in layer.parameters())


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: MoEConfig(4, MERGED, Identity()).build(8),
            "IdentityExperts cannot be merged: it has no",
        ),
        (
            lambda: MoEConfig(4, MERGED, MLP((4,), norm="batch")).build(8, 4),
            "MLPExperts with statistics of its tokens cannot be merged",
        ),
        (lambda: MoEConfig(4, MERGED, capacity_factor=1.0), "capacity_factor=1.0 does not apply to Random"),
        (
            lambda: MoEConfig(4, MERGED, AttentionExperts()),
            "AttentionExperts computes attention: not with",
        ),
        (lambda: average_experts(MoEConfig(4, TokenChoice(), Identity()).build(8)), "IdentityExperts cannot be merged"),
        (lambda: average_experts(nn.Linear(2, 2)), "a Linear has no experts to average"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
