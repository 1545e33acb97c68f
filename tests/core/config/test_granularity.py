"""``MoEConfig.granularity``: more and narrower experts at the same cost (DeepSeekMoE, arXiv 2401.06066)."""

import json
from dataclasses import replace

import pytest
import torch

from core import FFN, GEGLU, MLP, ExpertChoice, Hierarchical, Merge, MoEConfig, SwiGLU, TokenChoice, Zero, active_params
from core.flops import count_flops


def test_costs_by_hand():
    coarse = MoEConfig(4, TokenChoice(2), FFN(24))
    fine = replace(coarse, granularity=3)
    layer = fine.build(8)
    # 12 experts of width 8, 6 a token. An expert has 2 * 8 * 8 = 128 parameters; the gate has 8 * 12 in place of 8 * 4.
    assert (layer.experts.w_in.shape, len(layer.router(torch.randn(1, 5, 8)).gates_N)) == ((12, 8, 8), 5 * 6)
    assert fine.num_params(8) == sum(p.numel() for p in layer.parameters()) == 12 * 128 + 96
    assert fine.active_params(8) == active_params(layer) == 6 * 128 + 96
    assert fine.flops_per_token(8) == 2 * (6 * 128 + 96)
    # But for the gate, all of it is as before.
    assert fine.num_params(8) - coarse.num_params(8) == 8 * (12 - 4)
    assert fine.flops_per_token(8) - coarse.flops_per_token(8) == 2 * 8 * (12 - 4)


CONFIGS = {
    "SwiGLU, default width": MoEConfig(4, expert=SwiGLU(), granularity=2),
    "GEGLU with bias": MoEConfig(4, TokenChoice(1), GEGLU(12, bias=True), granularity=4),
    "shared experts": MoEConfig(4, expert=FFN(12), num_shared_experts=1, granularity=2),
    "shared experts of their own width": MoEConfig(
        4, expert=FFN(12), num_shared_experts=1, shared_expert=FFN(12), granularity=2
    ),
    "hierarchical": MoEConfig(4, Hierarchical(2, 1, top_k=1), FFN(12), granularity=2),
    "capacity": MoEConfig(4, expert=FFN(12), capacity_factor=0.5, granularity=2),
}


@pytest.mark.parametrize("config", CONFIGS.values(), ids=CONFIGS)
def test_costs_are_those_of_the_built_layer(config):
    layer = config.build(12).eval()
    assert config.num_params(12) == sum(p.numel() for p in layer.parameters())
    assert config.active_params(12) == active_params(layer)
    if config.capacity_factor is None:
        assert count_flops(layer, torch.randn(2, 8, 12)) == 16 * config.flops_per_token(12)
    assert MoEConfig.from_dict(json.loads(json.dumps(config.to_dict()))) == config
    # Shared experts are as fine as the routed ones, unless they have a kind of their own.
    if config.num_shared_experts:
        assert layer.shared_experts.w_in.shape == ((1, 12, 6) if config.shared_expert is None else (1, 12, 12))


def test_a_granularity_is_the_layer_that_it_means():
    config = CONFIGS["GEGLU with bias"]
    assert config.split(12) == MoEConfig(16, TokenChoice(4), GEGLU(3, bias=True))
    assert config.split(12).split(12) == config.split(12)
    layers = []
    for c in (config, config.split(12)):
        torch.manual_seed(0)
        layers.append(c.build(12))
    x = torch.randn(2, 5, 12)
    assert torch.equal(layers[0](x), layers[1](x))


def test_all_experts_of_one_are_the_parts_of_one():
    # A wide expert is the sum of its parts: with all parts chosen at the same gate the finer layer is the coarse one.
    coarse, fine = MoEConfig(1, TokenChoice(1), FFN(6)), MoEConfig(1, TokenChoice(1), FFN(6), granularity=3)
    wide, parts = coarse.build(4), fine.build(4)
    with torch.no_grad():
        parts.router.gate.weight.zero_()
        parts.experts.w_in.copy_(wide.experts.w_in[0].unflatten(1, (3, 2)).transpose(0, 1))
        parts.experts.w_out.copy_(wide.experts.w_out[0].unflatten(0, (3, 2)))
    x = torch.randn(1, 7, 4)
    torch.testing.assert_close(3 * parts(x), wide(x))  # each gate is 1/3


@pytest.mark.parametrize(
    ("build", "message"),
    [
        (lambda: MoEConfig(4, expert=FFN(10), granularity=3), "^granularity=3 does not divide hidden_dim=10 of FFN$"),
        (lambda: MoEConfig(4, granularity=3).build(8), "^granularity=3 does not divide hidden_dim=32 of FFN$"),
        (lambda: MoEConfig(4, granularity=3).num_params(8), "^granularity=3 does not divide hidden_dim=32 of FFN$"),
        (lambda: MoEConfig(4, ExpertChoice(), granularity=2),
         r"^granularity=2 multiplies top_k, which ExpertChoice \(arXiv 2202.09368\) does not have$"),
        (lambda: MoEConfig(4, Merge(kind="meo", top_k=2), granularity=2), "^granularity=2 multiplies top_k, which M"),
        (lambda: MoEConfig(4, expert=MLP((8,)), granularity=2), "^granularity=2 divides hidden_dim, which MLP does"),
        (lambda: MoEConfig(4, expert=Zero(), granularity=2), "^granularity=2 divides hidden_dim, which Zero does not"),
        (lambda: MoEConfig(4, TokenChoice(5), granularity=2), "^top_k=10 exceeds num_experts=8"),
    ],
)  # fmt: skip
def test_what_cannot_be_split_is_one_line(build, message):
    with pytest.raises(ValueError, match=message) as error:
        build()
    assert "\n" not in str(error.value)
