"""Updates that are the same for every token become a part of the linear layer, with equal outputs."""

from __future__ import annotations

import pytest
import torch
from torch import nn
from torch.testing import assert_close

import core
from core import IA3, Dense, LoRA, MoEConfig, Random, RoutingContext, Task, TokenChoice, add_adapters, merge_adapters

CONSTANT = {
    "one expert": MoEConfig(1, TokenChoice(1), LoRA(2, alpha=6.0)),
    "a scale": MoEConfig(1, TokenChoice(1, scale=2.5), LoRA(2)),
    "dense": MoEConfig(1, Dense(), LoRA(2)),
    "shared updates": MoEConfig(1, TokenChoice(1), LoRA(2), num_shared_experts=2, output_bias=True),
    "outputs averaged": MoEConfig(4, Random(evaluation="average"), LoRA(2)),
    "weights averaged": MoEConfig(4, Random(evaluation="merged"), LoRA(2, alpha=6.0)),
    "all at once": MoEConfig(2, Random(2), LoRA(2)),
    "a vector": MoEConfig(1, TokenChoice(1), IA3()),
    "vectors averaged": MoEConfig(4, Random(evaluation="average"), IA3()),
}


def model() -> nn.Sequential:
    return nn.Sequential(nn.Linear(6, 10), nn.GELU(), nn.Linear(10, 6, bias=False))


def trained(net: nn.Module) -> nn.Module:
    """Move the updates away from their start."""
    with torch.no_grad():
        for name, parameter in net.named_parameters():
            if "updates" in name:
                parameter.normal_()
    return net.eval()


def test_a_low_rank_update_and_a_vector_by_hand():
    base = nn.Linear(1, 1)
    nn.init.constant_(base.weight, 3.0)
    nn.init.constant_(base.bias, 5.0)
    for expert, values, expected in (
        (LoRA(1, alpha=2.0), {"w_a": 7.0, "w_b": 11.0}, (3 + 2 * 7 * 11, 5)),
        (IA3(), {"v": 4.0}, (3 * 4, 5 * 4)),
    ):
        own = add_adapters(base, MoEConfig(1, TokenChoice(1), expert))
        for name, value in values.items():
            nn.init.constant_(getattr(own.updates.experts, name), value)
        merged = merge_adapters(own)
        assert type(merged) is nn.Linear
        assert (merged.weight.item(), merged.bias.item()) == expected
        assert (base.weight.item(), base.bias.item()) == (3, 5)


@pytest.mark.parametrize("moe", CONSTANT.values(), ids=CONSTANT)
def test_a_merged_layer_is_the_adapted_one_in_evaluation(moe):
    net = trained(add_adapters(model(), moe, "0").double())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = net(x)
    assert not torch.allclose(expected, model().double()(x))
    assert merge_adapters(net) is net
    assert_close(net(x), expected, rtol=1e-12, atol=1e-12)
    assert net.state_dict().keys() == model().state_dict().keys()
    assert not any(p.requires_grad for p in net.parameters())


def test_half_precision_and_a_layer_in_two_places():
    net = model()
    net = nn.ModuleList([net, net[0]])
    trained(add_adapters(net, MoEConfig(1, TokenChoice(1), LoRA(2)), ["0.0", "1"]).bfloat16())
    x = torch.randn(2, 5, 6, dtype=torch.bfloat16)
    expected = net[1](x)
    merge_adapters(net)
    assert net[0][0] is net[1]
    assert net[1].weight.dtype == torch.bfloat16
    assert_close(net[1](x), expected, rtol=0.05, atol=0.05)


@pytest.mark.parametrize("expert", [LoRA(2), IA3()], ids=str)
def test_the_updates_of_one_task_are_taken_out_and_merged(expert):
    dim = 10 if isinstance(expert, IA3) else 6
    updates = MoEConfig(4, Task(3, 2), expert).build(dim, 10)
    own = trained(core.AdaptedLinear(nn.Linear(6, 10), updates, after=isinstance(expert, IA3)).double())
    x = torch.randn(2, 5, 6, dtype=torch.float64)
    expected = own(x, RoutingContext(task_ids_B=torch.tensor([1, 1])))
    merged = merge_adapters(core.cut_out(own, task=1))
    assert_close(merged(x), expected, rtol=1e-12, atol=1e-12)


def adapted(moe: MoEConfig, name: str = "0") -> nn.Module:
    return add_adapters(model(), moe, name)


def of_one(**options) -> MoEConfig:
    return MoEConfig(1, TokenChoice(1), LoRA(2), **options)


REFUSED = {
    "none": (model, "a Sequential without adapted layers has no adapters to merge"),
    "by token": (
        lambda: adapted(MoEConfig(4, TokenChoice(2), LoRA(2))),
        "the adapters of '0' cannot be merged: router TokenChoice gives tokens gates of their own",
    ),
    "a gate": (
        lambda: adapted(MoEConfig(1, TokenChoice(1, score_func="sigmoid"), LoRA(2))),
        "gives tokens gates of their own",
    ),
    "positions": (
        lambda: adapted(MoEConfig(4, Random(), LoRA(2))),
        "router Random (arXiv 2110.04260) gives tokens gates of their own",
    ),
    "a capacity": (lambda: adapted(of_one(capacity_factor=0.5)), "with a capacity tokens are dropped"),
    "a shared gate": (
        lambda: adapted(of_one(num_shared_experts=1, shared_gate="scale")),
        "a shared_gate weights the adapters token by token",
    ),
    "no bias": (lambda: adapted(of_one(output_bias=True), "2"), "output_bias is added to a layer without a bias"),
    "no linear updates": (
        lambda: adapted(MoEConfig(1, TokenChoice(1), core.FFN(4))),
        "FFNExperts are no part of a linear layer: LoRA and IA3 are",
    ),
    "the second": (
        lambda: add_adapters(adapted(of_one()), MoEConfig(2, TokenChoice(1), LoRA(2)), "2"),
        "the adapters of '2' cannot be merged",
    ),
}


@pytest.mark.parametrize(("make", "message"), REFUSED.values(), ids=REFUSED)
def test_refused_in_one_line_and_left_as_it_was(make, message):
    net = make()
    kinds = [type(layer) for layer in net]
    with pytest.raises(ValueError) as error:
        merge_adapters(net)
    assert message in str(error.value)
    assert "\n" not in str(error.value)
    assert [type(layer) for layer in net] == kinds


@pytest.mark.parametrize(
    ("router", "E", "gates"),
    [
        (Random(2, evaluation="average"), 3, (1 / 3,) * 3),
        (Random(3), 3, (1 / 3,) * 3),
        (Random(2), 3, None),
        (TokenChoice(1, scale=2.0), 1, (2.0,)),
        (TokenChoice(1, score_func="sigmoid"), 1, None),
        (TokenChoice(3), 3, None),
        (Dense(), 1, (1.0,)),
        (Dense(), 3, None),
    ],
    ids=str,
)
def test_gates_that_a_router_calls_constant_are_those_of_every_token(router, E, gates):
    layer = MoEConfig(E, router, LoRA(2)).build(6).eval()
    assert router.constant_gates(E) == gates
    routing = layer.router(torch.randn(2, 6, 6) * 9)
    gate_TE = torch.zeros(12, E).index_put((routing.token_index_N, routing.expert_ids_N), routing.gates_N)
    every_TE = gate_TE[:1].expand(12, -1) if gates is None else torch.tensor(gates).expand(12, -1)
    assert torch.allclose(gate_TE, every_TE) == (gates is not None)
