"""Mixtures of updates beside frozen linear layers: outputs, gradients, names, and what does not fit."""

from __future__ import annotations

import pytest
import torch
from torch import nn

import core

MOE = core.MoEConfig(4, core.TokenChoice(2), core.LoRA(2))


class Block(nn.Module):
    def __init__(self) -> None:
        super().__init__()
        self.qkv, self.proj, self.norm = nn.Linear(6, 18), nn.Linear(6, 6, bias=False), nn.LayerNorm(6)

    def forward(self, x):
        q, k, v = self.qkv(self.norm(x)).chunk(3, -1)
        return x + self.proj((q @ k.transpose(-1, -2)).softmax(-1) @ v)


def model() -> nn.Module:
    torch.manual_seed(0)
    return nn.Sequential(Block(), Block(), nn.Linear(6, 3))


def test_an_update_is_added_to_the_frozen_layer():
    base = nn.Linear(6, 10)
    adapted = core.add_adapters(base, MOE)
    nn.init.normal_(adapted.updates.experts.w_b)
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(adapted(x), base(x) + adapted.updates(x))
    assert adapted(x[0]).shape == (5, 10)
    assert not base.weight.requires_grad
    assert adapted.base is base


def test_scaling_vectors_follow_the_frozen_layer():
    base = nn.Linear(6, 10)
    adapted = core.add_adapters(base, core.MoEConfig(3, core.Dense(), core.IA3()))
    x = torch.randn(2, 5, 6)
    torch.testing.assert_close(adapted(x), base(x))  # vectors of one, at gates that sum to 1
    with torch.no_grad():
        adapted.updates.experts.v.fill_(2.0)
    torch.testing.assert_close(adapted(x), 2 * base(x))


def test_an_adapted_model_begins_as_it_was_and_trains_its_updates_alone():
    net, before = model(), model()
    x = torch.randn(2, 5, 6)
    assert core.add_adapters(net, MOE, modules="*.qkv") is net
    torch.testing.assert_close(net(x), before(x))
    trained = {name for name, p in net.named_parameters() if p.requires_grad}
    parts = ("router.gate.weight", "experts.w_a", "experts.w_b")
    assert trained == {f"{block}.qkv.updates.{part}" for block in (0, 1) for part in parts}
    with core.record(net) as tape:
        loss = net(x).square().mean()
    assert [entry.name for entry in tape.entries] == ["0.qkv.updates", "1.qkv.updates"]
    (loss + core.aux_loss(tape)).backward()
    assert all(net.get_parameter(name).grad.any() for name in trained if not name.endswith("w_a"))
    # The trained model's tensors are all there, under names that say what they are.
    state, old = net.state_dict(), before.state_dict()
    assert all(torch.equal(state[name.replace("qkv.", "qkv.base.")], value) for name, value in old.items())
    assert len(state) == len(old) + len(trained)


def test_several_patterns_and_a_layer_that_stands_in_two_places():
    net = model()
    net[1].proj = net[0].proj
    core.add_adapters(net, MOE, modules=["0.proj", "1.proj", "2"])
    assert net[1].proj is net[0].proj
    assert [type(m) for m in (net[0].proj, net[2], net[0].qkv)] == [core.AdaptedLinear, core.AdaptedLinear, nn.Linear]
    assert net(torch.randn(2, 5, 6)).shape == (2, 5, 3)


def test_updates_have_the_base_s_dtype_device_and_mode():
    adapted = core.add_adapters(nn.Linear(6, 10, dtype=torch.bfloat16).eval(), MOE)
    assert {p.dtype for p in adapted.parameters()} == {torch.bfloat16}
    assert not adapted.updates.training
    assert adapted(torch.randn(2, 5, 6, dtype=torch.bfloat16)).dtype == torch.bfloat16
    assert core.add_adapters(nn.Linear(6, 10, device="meta"), MOE).updates.experts.w_a.is_meta


def test_an_encoder_layer_of_torch_computes_its_updates_in_evaluation_too():
    layer = nn.TransformerEncoderLayer(8, 2, 16, dropout=0.0, batch_first=True).eval()
    x = torch.randn(2, 5, 8)
    before = layer(x)
    core.add_adapters(layer, MOE, modules="linear[12]")
    with torch.no_grad():
        torch.testing.assert_close(layer(x), before)
        nn.init.normal_(layer.linear1.updates.experts.w_b)
        assert not torch.allclose(layer(x), before, atol=1e-3)


@pytest.mark.parametrize(
    ("make", "message"),
    [
        (
            lambda: core.AdaptedLinear(nn.Linear(6, 10), MOE.build(6, 9)),
            r"adapters of out_dim=9 do not fit a base of in_features=6, out_features=10: they need out_dim=10",
        ),
        (lambda: core.AdaptedLinear(nn.Linear(6, 10), MOE.build(5, 10)), r"adapters of dim=5 .* they need dim=6"),
        (lambda: core.AdaptedLinear(nn.Linear(6, 1), MOE.build(6)), r"adapters of out_dim=6 .* they need out_dim=1"),
        (
            lambda: core.AdaptedLinear(
                nn.Linear(6, 10), core.MoEConfig(2, core.Dense(), core.IA3()).build(6), after=True
            ),
            r"adapters of dim=6 .* they need dim=10",
        ),
        (lambda: core.AdaptedLinear(nn.Conv1d(6, 6, 1), MOE.build(6)), "base is a Conv1d: adapters belong to"),
        (lambda: core.add_adapters(nn.LayerNorm(6), MOE), "model is a LayerNorm: adapters belong to an nn.Linear"),
        (lambda: core.add_adapters(model(), MOE, "*.norm"), "module '0.norm' is a LayerNorm"),
        (
            lambda: core.add_adapters(model(), MOE, "*.kqv"),
            r"modules='\*.kqv' names no module; .* 0.qkv, 0.proj, 1.qkv, 1.proj, \.\.\.",
        ),
        (
            lambda: core.add_adapters(core.add_adapters(model(), MOE, "*.qkv"), MOE, "*.qkv"),
            "module '0.qkv' is a AdaptedLinear",
        ),
        (
            lambda: core.add_adapters(model(), core.MoEConfig(2, core.Hash(9)), "*.qkv"),
            r"router Hash .* needs context.token_ids_BS",
        ),
        (lambda: core.add_adapters(model(), core.IA3(), "*.qkv"), r"moe=IA3.* is not of class MoEConfig"),
        (
            lambda: core.add_adapters(nn.MultiheadAttention(6, 2), MOE, "out_proj"),
            "'out_proj' is part of an nn.MultiheadAttention",
        ),
        (lambda: core.add_adapters(model(), core.MoEConfig(2, expert=core.LoRA(4)), "*"), "module '0' is a Block"),
        (
            lambda: core.add_adapters(nn.Linear(6, 3), core.MoEConfig(2, expert=core.LoRA(4))),
            "rank=4 exceeds the smaller of dim=6 and",
        ),
    ],
)
def test_what_does_not_fit_is_refused_and_leaves_the_model_as_it_was(make, message):
    with pytest.raises(ValueError, match=message):
        make()
    net = model()
    with pytest.raises(ValueError, match="rank=4 exceeds"):
        core.add_adapters(net, core.MoEConfig(2, expert=core.LoRA(4)), ["0.qkv", "2"])
    assert type(net[0].qkv) is nn.Linear
    assert all(p.requires_grad for p in net.parameters())
