"""Plain LoRA on experts, routers and linear layers: equal to merged weights, also on quantized experts."""

from __future__ import annotations

import copy

import pytest
import torch
from torch import nn

import core
from core.experts.adapters import LowRankUpdate

EXPERTS = [core.FFN(24, bias=True), core.SwiGLU(24), core.ClampedSwiGLU(24, bias=True)]


class Net(nn.Module):
    def __init__(self, expert):
        super().__init__()
        self.attn = nn.Linear(16, 16)
        self.moe = core.MoEConfig(4, core.TokenChoice(2), expert, num_shared_experts=1).build(16)

    def forward(self, x):
        return self.moe(x + self.attn(x))


def net(expert=EXPERTS[1], seed=0):
    torch.manual_seed(seed)
    return Net(expert).eval()


def fill(model, scale=0.3):
    for module in model.modules():
        if isinstance(module, LowRankUpdate):
            nn.init.normal_(module.b, std=scale)
    return model


X = torch.randn(2, 8, 16, generator=torch.Generator().manual_seed(1))
ALL = ["experts", "router", "attn"]


def relative(a, b):
    return float((a - b).detach().abs().max() / b.detach().abs().max())


@pytest.mark.parametrize("expert", EXPERTS, ids=lambda e: type(e).__name__)
def test_adapted_weights_compute_as_merged_ones(expert):
    model = net(expert)
    before, names = model(X), list(model.state_dict())
    core.add_adapters(model, core.LoRA(3, alpha=6), modules=ALL)
    assert relative(model(X), before) < 1e-6  # b starts at zero
    assert set(names) <= set(model.state_dict())
    trained = [name for name, p in model.named_parameters() if p.requires_grad]
    assert trained
    assert all(".lora.default." in name for name in trained)
    after = fill(model)(X)
    assert relative(after, before) > 0.01
    merged = core.merge_adapters(copy.deepcopy(model))
    assert list(merged.state_dict()) == names
    assert relative(merged(X), after) < 1e-5


def test_an_update_is_scale_times_a_b_of_its_own_expert():
    model = core.add_adapters(net(), core.LoRA(2, alpha=8), modules="experts")
    update = model.moe.experts.lora["default"]["w_in"]
    nn.init.ones_(update.a)
    update.b.data[:] = torch.tensor([0.0, 1.0, 2.0, 3.0]).view(4, 1, 1)
    before = model.moe.experts.w_in.detach().clone()
    core.merge_adapters(model)
    # expert e: 8 / 2 * (two ranks of 1 * e)
    added = (model.moe.experts.w_in - before).flatten(1)
    assert torch.allclose(added, 8.0 * torch.arange(4.0)[:, None].expand_as(added), atol=1e-5)


@pytest.mark.parametrize(("bits", "backend"), [(8, "eager"), (4, "cpu"), (8, "grouped")])
def test_gradients_through_quantized_experts_are_those_of_the_dequantized(bits, backend):
    model = core.quantize_experts(net(EXPERTS[0]), bits)
    plain = net(EXPERTS[0])
    experts = [[m for m in one.modules() if isinstance(m, core.Experts)] for one in (plain, model)]
    for own, other in zip(*experts, strict=True):
        for name in ("w_in", "w_out"):
            getattr(own, name).data = getattr(other, name).weight.dequantized()
    grads = []
    for one in (model, plain):
        torch.manual_seed(5)
        core.add_adapters(one, core.LoRA(3), modules=["experts", "attn"])
        fill(one).moe.backend = backend
        one(X).square().sum().backward()
        grads.append({name: p.grad for name, p in one.named_parameters() if ".lora." in name})
    assert grads[0].keys() == grads[1].keys()
    for name, grad in grads[0].items():
        assert relative(grad, grads[1][name]) < 1e-5, name


def test_several_adapters_add_up_and_can_be_chosen():
    model = net()
    before = model(X)
    for seed, name in enumerate(("first", "second")):
        torch.manual_seed(seed)
        core.add_adapters(model, core.LoRA(2), modules=["attn"], name=name)
    fill(model)
    core.use_adapters(model)
    assert torch.equal(model(X), before)
    linear, x = model.attn, X
    parts = []
    for name in ("first", "second"):
        core.use_adapters(model, name)
        parts.append(linear(x))
    core.use_adapters(model, "first", "second")
    core_sum = parts[0] + parts[1] - nn.functional.linear(x, linear.weight, linear.bias)
    assert relative(linear(x), core_sum) < 1e-5
    with pytest.raises(ValueError, match="no adapter 'third'; it has 'first', 'second'"):
        core.use_adapters(model, "third")


def test_a_router_decides_by_the_updated_weight_and_learns():
    model = core.add_adapters(net(), core.LoRA(2), modules="router")
    fill(model, 3.0)
    (gate,) = [m for m in model.moe.router.modules() if "lora" in m._modules]
    update, weight = gate.lora["default"]["weight"], gate.weight
    with core.record(model) as tape:
        model(X)
    x = X + model.attn(X)
    logits = x.flatten(0, 1) @ (weight + (update.a @ update.b).t()).t()
    assert relative(tape.entries[0].routing.evidence.logits_TE, logits) < 1e-5
    model(X).square().sum().backward()
    assert float(update.b.grad.abs().max()) > 0
    assert gate.weight is weight


@pytest.mark.parametrize(
    ("lora", "modules", "rule"),
    [
        (core.LoRA(17), "attn", "rank=17 exceeds the smaller side of weight of 16x16"),
        (core.LoRA(2), "attention_of", "modules='attention_of' names no module"),
        (core.LoRA(2), "moe", "module 'moe' is a MoE: low-rank adapters are for an nn.Linear"),
        (core.LoRA(2, dropout=0.1), "experts", "dropout=0.1 is for linear layers"),
        (core.LoRA(2, dropout=0.1), "router", "dropout=0.1 is for linear layers: LinearGate gets the tokens"),
    ],
)
def test_bad_input_leaves_the_model_as_it_was(lora, modules, rule):
    model = net()
    with pytest.raises(ValueError, match=rule):
        core.add_adapters(model, lora, modules=modules)
    assert all(p.requires_grad for p in model.parameters())
    assert not any(".lora" in name for name in model.state_dict())


@pytest.mark.parametrize("how", ["average", "use", "sum", "top_k", "svd"])
def test_means_of_experts_are_taken_after_their_adapters_are_merged(how):
    """Two equal experts, of factors a, b and -a, -b: the means of the factors are 0, and the mean of a b is not."""
    model = core.MoEConfig(2, core.TokenChoice(2), core.FFN(24)).build(16).eval()
    for p in model.experts.parameters():
        p.data[1] = p.data[0]
    fill(core.add_adapters(model, core.LoRA(2), modules="experts"))
    for update in (m for m in model.modules() if isinstance(m, LowRankUpdate)):
        update.a.data[1], update.b.data[1] = -update.a.data[0], -update.b.data[0]
    expected, loads = model(X), [1.0, 1.0] if how == "use" else None
    with pytest.raises(ValueError, match=r"^FFNExperts have adapters: core\.merge_adapters merges them before$"):
        core.densify(model, how, loads)
    assert torch.equal(model(X), expected)
    if how in ("average", "use"):
        assert relative(core.densify(core.merge_adapters(model), how, loads)(X), expected) < 1e-5


def test_one_of_adapted_experts_keeps_its_update_and_is_no_feed_forward_network():
    model = fill(core.add_adapters(core.MoEConfig(3, core.TokenChoice(1)).build(16), core.LoRA(2), modules="experts"))
    one = core.densify(copy.deepcopy(model), "most_used", [0.0, 0.0, 1.0])
    core.merge_adapters(model)
    assert relative(one(X), core.densify(model, "most_used", [0.0, 0.0, 1.0])(X)) < 1e-5
    with pytest.raises(ValueError, match="FFNExperts have adapters"):
        one.feed_forward()


class Tied(nn.Module):
    """``out(embed(ids))`` with one weight for both."""

    def __init__(self):
        super().__init__()
        self.embed, self.out = nn.Embedding(5, 4), nn.Linear(4, 5, bias=False)
        self.out.weight = self.embed.weight

    def forward(self, ids):
        return self.out(self.embed(ids))


def test_merging_into_a_tied_weight_leaves_its_other_module_as_it_was():
    model = fill(core.add_adapters(Tied(), core.LoRA(2), modules="out"))
    before, ids = model.embed.weight.detach().clone(), torch.arange(5)
    expected = model(ids)
    merged = core.merge_adapters(model)
    assert torch.equal(merged.embed.weight, before)
    assert not merged.out.weight.requires_grad
    assert relative(merged(ids), expected) < 1e-6
    pair, x = nn.Sequential(nn.Linear(4, 4), nn.Linear(4, 4)), torch.randn(3, 4)
    pair[1].weight = pair[0].weight
    expected = fill(core.add_adapters(pair, core.LoRA(2), modules=["0", "1"]))(x)
    assert relative(core.merge_adapters(pair)(x), expected) < 1e-6


def test_attention_that_reads_its_output_layer_is_refused():
    model = nn.ModuleDict({"block": nn.TransformerEncoderLayer(8, 2, 16), "moe": core.MoEConfig(2).build(8)})
    for modules in (None, "attention", "*.out_proj"):
        with pytest.raises(ValueError, match=r"'block\.self_attn\.out_proj' is part of an nn\.MultiheadAttention"):
            core.add_adapters(model, core.LoRA(2), modules=modules)
        assert all(p.requires_grad for p in model.parameters())


@pytest.mark.parametrize("rates", [(0.0, 0.9), (0.9, 0.0)])
def test_each_adapter_has_its_own_dropout(rates):
    model = nn.ModuleDict({"a": nn.Linear(8, 8)}).train()
    for name, rate in zip("12", rates, strict=True):
        core.add_adapters(model, core.LoRA(2, dropout=rate), modules="a", name=name)
    fill(model)
    x = torch.randn(64, 8)
    for name, rate in zip("12", rates, strict=True):
        core.use_adapters(model, name)
        assert torch.equal(model["a"](x), model["a"](x)) is (rate == 0.0)


def test_experts_quantized_after_their_adapters_leave_these_to_train():
    model = core.quantize_experts(core.add_adapters(net(EXPERTS[0]), core.LoRA(2), modules="experts"))
    trained = {name for name, p in model.named_parameters() if p.requires_grad}
    assert trained == {name for name, _ in model.named_parameters() if ".lora." in name}
    assert len(trained) == 2 * 2 * 2  # routed and shared experts, w_in and w_out, a and b
    model(X).square().sum().backward()
    assert float(model.moe.experts.lora["default"]["w_in"].b.grad.abs().max()) > 0


def test_what_cannot_be_merged_or_added_twice():
    model = core.add_adapters(core.quantize_experts(net(EXPERTS[0])), core.LoRA(2), modules="experts")
    with pytest.raises(ValueError, match=r"'moe\.experts' is quantized: adapters are merged into floating-point"):
        core.merge_adapters(model)
    with pytest.raises(ValueError, match="has an adapter 'default' already"):
        core.add_adapters(model, core.LoRA(2), modules="experts")
    other = core.MoEConfig(4, core.TokenChoice(2), core.MLP((8,))).build(16)
    with pytest.raises(ValueError, match="take no low-rank adapters: feed-forward experts do"):
        core.add_adapters(other, core.LoRA(2), modules="experts")
