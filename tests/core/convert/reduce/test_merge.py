"""One expert in place of random ones: it is the layer's evaluation, whose parameters are the mean."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import core

MERGED = core.Random(per="batch", evaluation="merged")
EXPERTS = [
    core.FFN(12, bias=True),
    core.SwiGLU(12),
    core.ClampedSwiGLU(12, bias=True),
    core.MLP((12, 8), norm="layer"),
    core.LoRA(3, 6.0),
    core.IA3(),
]


def built(expert: core.ExpertConfig, **options):
    """Return a layer of four experts that are unlike each other."""
    layer = core.MoEConfig(4, MERGED, expert, **options).build(8)
    with torch.no_grad():
        for parameter in layer.experts.parameters():
            parameter.add_(torch.randn_like(parameter), alpha=0.5)
    return layer


def test_in_evaluation_the_matrices_are_averaged_and_not_the_outputs():
    layer = core.MoEConfig(2, MERGED, core.LoRA(1)).build(1)
    with torch.no_grad():
        layer.experts.w_a.copy_(torch.tensor([[[1.0]], [[3.0]]]))
        layer.experts.w_b.copy_(torch.tensor([[[2.0]], [[4.0]]]))
    x = torch.full((1, 3, 1), 10.0)
    # The means are 2 and 3: 10 * 2 * 3. The outputs 10 * 1 * 2 and 10 * 3 * 4 have the mean 70.
    assert layer.eval()(x).flatten().tolist() == [60.0] * 3
    assert set(layer.train()(x).flatten().tolist()) <= {20.0, 120.0}
    average = core.MoEConfig(2, core.Random(evaluation="average"), core.LoRA(1)).build(1).eval()
    average.load_state_dict(layer.state_dict())
    assert average(x).flatten().tolist() == [70.0] * 3


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda e: type(e).__name__)
def test_one_expert_is_the_layer_in_evaluation(expert):
    layer = built(expert, num_shared_experts=1, shared_expert=core.FFN(6), shared_gate="mix", output_bias=True).eval()
    nn.init.normal_(layer.output_bias)
    x = torch.randn(2, 5, 8)
    one = core.average_experts(layer)
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


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: core.MoEConfig(4, MERGED, core.Identity()).build(8),
            "IdentityExperts cannot be merged: it has no",
        ),
        (
            lambda: core.MoEConfig(4, MERGED, core.MLP((4,), norm="batch")).build(8, 4),
            "MLPExperts with statistics of its tokens cannot be merged",
        ),
        (lambda: core.MoEConfig(4, MERGED, capacity_factor=1.0), "capacity_factor=1.0 does not apply to Random"),
        (
            lambda: core.MoEConfig(4, MERGED, core.AttentionExperts()),
            "AttentionExperts computes attention: not with",
        ),
        (
            lambda: core.average_experts(core.MoEConfig(4, core.TokenChoice(), core.Identity()).build(8)),
            "IdentityExperts cannot be merged",
        ),
        (lambda: core.average_experts(nn.Linear(2, 2)), "a Linear has no experts to average"),
    ],
)
def test_what_cannot_be_averaged_is_refused(make, message):
    with pytest.raises(ValueError, match=message):
        make()
