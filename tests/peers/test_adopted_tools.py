"""Adapters and quantized experts in models of transformers: equal to merged and rounded weights, and to peft."""

from __future__ import annotations

import copy

import pytest
import torch
from families import EVERY, IDS, KINDS, MASK, adapted, error, first_layer, logits, made, pair, run
from torch import nn

import core

pytestmark = pytest.mark.usefixtures("mended_experts")


@pytest.mark.parametrize("name", KINDS)
def test_adapters_of_experts_and_routers_compute_as_merged_weights(name):
    _, net = pair(name)
    names, before = list(net.state_dict()), logits(net)
    out = logits(adapted(net, "experts", "router", "attention" if name != "Dbrx" else "experts"))
    assert error(out, before) > 1e-2
    with pytest.raises(ValueError, match="has adapters: core"):
        core.release(net)
    core.merge_adapters(net)
    assert list(net.state_dict()) == names
    assert error(logits(net), out) < 1e-4
    assert error(logits(core.release(net)), out) < 1e-4


@pytest.mark.parametrize("name", KINDS)
def test_quantized_experts_compute_as_rounded_weights(name):
    plain, net = pair(name)
    rounded = core.adopt(copy.deepcopy(plain))
    core.quantize_experts(net, 4)
    with torch.no_grad():
        for own, other in zip(core.moe_layers(net).values(), core.moe_layers(rounded).values(), strict=True):
            for to, matrices in zip(other.experts.matrices(), own.experts.matrices(), strict=True):
                if to is not None:
                    to.copy_(matrices.weight.dequantized())
        assert error(logits(net), logits(plain)) > 1e-3
        assert error(logits(net), logits(core.release(rounded))) < 1e-5
    with pytest.raises(ValueError, match="are quantized, which a block of transformers cannot compute"):
        core.release(net)
    adapted(net, "experts").train()(input_ids=IDS, attention_mask=MASK, labels=IDS).loss.backward()
    grads = [p.grad for p in net.parameters() if p.requires_grad]
    assert grads
    assert all(g is not None and bool(g.isfinite().all()) for g in grads)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Olmoe"])
def test_gradients_are_those_of_peft(name):
    peft = pytest.importorskip("peft")
    plain = made(name)
    experts = [f"mlp.experts.{part}_proj" for part in ("gate_up", "down")]
    config = peft.LoraConfig(r=2, lora_alpha=4, target_parameters=experts, target_modules=["q_proj"])
    theirs = peft.get_peft_model(copy.deepcopy(plain), config)
    net = adapted(core.adopt(copy.deepcopy(plain)), "experts", "*.q_proj")
    parameters = {}
    for where, module in theirs.named_modules():
        if hasattr(module, "lora_A"):
            key = getattr(module, "parameter_name", "weight")
            owner = where.removeprefix("base_model.model.").replace(".base_layer", "")
            update = net.get_submodule(owner).lora["default"][key]
            parameters[f"{owner}.{key}"] = (update, module.lora_A["default"].weight, module.lora_B["default"].weight)
    assert len(parameters) == 6
    with torch.no_grad():
        for update, a, b in parameters.values():
            if update.a.ndim == 2:
                a.copy_(update.a.t()), b.copy_(update.b.t())
            else:  # rows by expert and then by rank; columns by rank and then by expert
                a.copy_(update.a.transpose(1, 2).flatten(0, 1))
                b.copy_(update.b.permute(2, 1, 0).flatten(1))
    losses = []
    for one in (theirs.eval(), net.eval()):
        out = one(input_ids=IDS, attention_mask=MASK, labels=IDS)
        out.loss.backward()
        losses.append(out.logits.detach())
    assert error(losses[1], losses[0]) < 1e-5
    for key, (update, a, b) in parameters.items():
        if update.a.ndim == 2:
            expected = a.grad.t(), b.grad.t()
        else:
            E = update.a.shape[0]
            expected = a.grad.unflatten(0, (E, -1)).transpose(1, 2), b.grad.unflatten(1, (-1, E)).permute(2, 1, 0)
        for own, their in zip((update.a.grad, update.b.grad), expected, strict=True):
            assert error(own, their) < 1e-5, key


def saved_again(net, folder):
    """Save a model in transformers' layout, read it with transformers alone, and return it."""
    core.release(net).save_pretrained(folder)
    return type(net).from_pretrained(folder, attn_implementation="eager", experts_implementation="eager").eval()


@pytest.mark.parametrize("name", [name for name in EVERY if name != "JetMoe"])
def test_pruned_experts_are_gone_and_the_rest_is_what_it_was(name, tmp_path):
    _, net = pair(name)
    statistics = core.expert_statistics(net, [None], run)
    layers = core.moe_layers(net)
    E = first_layer(net).num_experts
    before = {n: [w if w is None else w.detach().clone() for w in layers[n].experts.matrices()] for n in layers}
    kept = core.prune_experts(net, statistics, keep=E // 2, by="use")
    for n, layer in layers.items():
        assert layer.num_experts == E // 2
        for old, new in zip(before[n], layer.experts.matrices(), strict=True):
            assert old is None or torch.equal(old[list(kept[n])], new)
    with core.record(net) as tape:
        out = logits(net)
    assert tape.entries[0].routing.tokens_per_expert_E.shape == (E // 2,)
    assert error(logits(saved_again(net, tmp_path)), out) < 1e-5


@pytest.mark.parametrize("name", ["Mixtral", "Dbrx", "SwitchTransformers"])
@torch.no_grad()
def test_equal_experts_are_merged_without_a_change(name, tmp_path):
    net = core.adopt(made(name).eval())
    for layer in core.moe_layers(net).values():
        weight = next(p for p in layer.router.parameters() if layer.num_experts in p.shape)
        for matrices in (weight, *layer.experts.matrices()):
            if matrices is not None:
                matrices[1::2] = matrices[::2]
    statistics = core.expert_statistics(net, [None], run, every_token=True)
    clusters = core.merge_experts(net, statistics, keep=2)
    assert set(clusters.values()) == {((0, 1), (2, 3))}
    assert error(logits(saved_again(net, tmp_path)), logits(core.adopt(copy.deepcopy(net)))) < 1e-5


@pytest.mark.parametrize("name", ["Mixtral", "Olmoe", "GptOss", "Dbrx", "SwitchTransformers", "GraniteMoe"])
@torch.no_grad()
def test_a_dense_model_of_equal_experts_computes_the_same(name, tmp_path):
    net = core.adopt(made(name).eval())
    for layer in core.moe_layers(net).values():
        for stacked in (*layer.experts.matrices(), *layer.experts.vectors()):
            if stacked is not None:
                stacked.copy_(stacked[:1].expand_as(stacked))
    before, size = logits(net), sum(p.numel() for p in net.parameters())
    core.densify(net, "average")
    again = saved_again(net, tmp_path)
    gates_sum_to_one = name in ("Mixtral", "GptOss", "Dbrx", "GraniteMoe")
    assert (error(logits(again), before) < 1e-5) == gates_sum_to_one
    assert error(logits(again), logits(net)) < 1e-6
    assert sum(p.numel() for p in again.parameters()) < 0.8 * size


@pytest.mark.parametrize("name", ["Mixtral", "GraniteMoe", "Dbrx", "Qwen2Moe", "Qwen3Next"])
@torch.no_grad()
def test_a_block_that_is_cut_to_one_expert_computes_it_and_the_shared_one(name, tmp_path):
    net = core.adopt(made(name).eval())
    x_BSD, expected = torch.randn(1, 5, 16), {}
    for where, layer in core.moe_layers(net).items():
        w_in, w_gate, w_out = (w[2] for w in layer.experts.matrices())
        expected[where] = (nn.functional.silu(x_BSD @ w_gate) * (x_BSD @ w_in)) @ w_out
        if name.startswith("Qwen"):
            expected[where] += layer.shared_expert_gate(x_BSD).sigmoid() * layer.shared_expert(x_BSD)
    assert core.cut_out(net, expert=2) is net
    for where, layer in core.moe_layers(net).items():
        assert layer.num_experts == 1
        out = layer(x_BSD)
        assert error(out[0] if isinstance(out, tuple) else out, expected[where]) < 1e-6
    assert error(logits(saved_again(net, tmp_path)), logits(core.adopt(copy.deepcopy(net)))) < 1e-6


UNSTACKED = ["Dbrx", "SwitchTransformers", "NllbMoe", "JetMoe"]


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", *UNSTACKED])
def test_matrices_start_each_by_itself_and_weights_are_of_one_expert(name):
    net = core.adopt(made(name))
    experts = first_layer(net).experts
    shapes = []

    def fill(matrix):
        shapes.append(tuple(matrix.shape))
        matrix.fill_(len(shapes))

    def stacked():
        return [t.detach() for t in (*experts.matrices(), *experts.vectors()) if t is not None]

    experts.init_each(fill)
    matrices, vectors = ([t for t in stacked() if t.ndim == n] for n in (3, 2))
    F = matrices[-1].shape[1]
    assert shapes == [(16, F)] * 4 * (len(matrices) - 1) + [(F, 16)] * 4
    for i, w in enumerate(matrices):  # the experts 1 to 4, then 5 to 8, ...
        assert torch.equal(w, torch.arange(4 * i + 1.0, 4 * i + 5)[:, None, None].expand_as(w))
    assert not any(b.any() for b in vectors)
    weights = experts.weights_of(2)
    assert sum(w.numel() for w in weights.values()) == sum(t[2].numel() for t in stacked())
    with torch.no_grad():
        for w in weights.values():
            w.fill_(-1.0)
    for t in stacked():
        assert [bool((own == -1).all()) for own in t] == [False, False, True, False]
    with pytest.raises(ValueError, match="expert 4 is not in range"):
        experts.weights_of(4)


@pytest.mark.parametrize("name", UNSTACKED)
def test_experts_that_are_not_stacked_are_offloaded_after_quantization_alone(name):
    net = core.adopt(made(name).eval())
    message = r"the experts .*experts of a \w+ have no first axis that counts them"
    with pytest.raises(ValueError, match=message):
        core.offload_experts(net, 1 << 20)
    core.quantize_experts(net)
    if name == "NllbMoe":  # its biases stay where they are
        with pytest.raises(ValueError, match=message):
            core.offload_experts(net, 1 << 20)
        return
    with torch.no_grad():
        before = logits(net)
        core.offload_experts(net, 1 << 20, prefetch=False)
        assert error(logits(net), before) < 1e-6


@pytest.mark.parametrize("name", ["Mixtral", "Dbrx", "JetMoe"])
def test_parameters_of_a_token_are_all_but_those_of_two_of_four_experts(name):
    net = core.adopt(made(name))
    matrices = [w for layer in core.moe_layers(net).values() for w in layer.experts.matrices()]
    total = sum(p.numel() for p in net.parameters())
    assert core.active_params(net) == total - sum(w.numel() for w in matrices) // 2


@pytest.mark.parametrize("name", ["Mixtral", "Qwen3Moe", "GptOss", "DeepseekV3", "Llama4"])
@torch.no_grad()
def test_offloaded_experts_compute_the_same(name):
    net = core.adopt(made(name).eval())
    before, per_expert = logits(net), sum(w[0].numel() * 4 for w in first_layer(net).experts.parameters())
    assert core.offload_experts(net, budget_bytes=3 * per_expert, prefetch=False).num_slots == 3
    assert error(logits(net), before) < 1e-6


def pruned(net, keep, **options):
    return core.prune_experts(net, core.expert_statistics(net, [None], run), keep=keep, **options)


def every_token_alike(net):
    next(module for module in net.modules() if hasattr(module, "tid2eid")).tid2eid.fill_(1)
    return pruned(net, 3)


def cut(net):
    return core.cut_out(net, expert=0)


TWO = "a token takes 2 experts, and 1 would be left"
ATTENTION = "one number for these experts and for those of attention"


@pytest.mark.parametrize(
    ("name", "change", "message"),
    [
        ("JetMoe", cut, ATTENTION),
        ("JetMoe", lambda net: pruned(net, 2), ATTENTION),
        ("DeepseekV3", cut, "the groups of DeepseekV3MoE's router need 4 experts, and 1 would be left"),
        ("DeepseekV3", lambda net: pruned(net, 3), "keep=3 is not the same number for each of 2 groups"),
        ("Phimoe", cut, TWO),
        (
            "Mixtral",
            lambda net: core.average_experts(first_layer(net)),
            "an adopted MixtralSparseMoeBlock stays one: core",
        ),
        ("Mixtral", lambda net: core.cut_out(first_layer(net), expert=4), r"expert=4 is not in range\(4\)"),
        ("Mixtral", lambda net: pruned(net, 3, constants=True), "constants have no place in it"),
        ("Mixtral", lambda net: core.densify(net, "svd"), "how='svd' is for"),
        ("Mixtral", lambda net: cut(core.quantize_experts(net)), "are quantized: an expert is taken out before"),
        ("DeepseekV4", every_token_alike, "has a table of the experts of each token id: all of them stay"),
    ],
)
def test_what_cannot_be_cut_or_pruned(name, change, message):
    with pytest.raises(ValueError, match=message):
        change(core.adopt(made(name).eval()))


def test_offloaded_experts_do_not_shrink_and_a_block_alone_does():
    net = core.adopt(made("Mixtral").eval())
    layer = first_layer(net)
    assert core.cut_out(copy.deepcopy(layer), expert=3).num_experts == 1
    core.offload_experts(net, 1 << 20)
    for change in (core.densify, cut):
        with pytest.raises(ValueError, match="MixtralExperts are offloaded: a layer shrinks before"):
            change(net)
    assert layer.num_experts == 4


NO_DENSE = {
    **dict.fromkeys(("Phimoe", "NllbMoe", "DeepseekV4"), TWO),
    "Jamba": "a saved JambaSparseMoeBlock has at least 2 experts, and 1 would be left",
    "DeepseekV2": "the groups of DeepseekV2Moe's router need 2 experts, and 1 would be left",
    "DeepseekV3": "the groups of DeepseekV3MoE's router need 4 experts, and 1 would be left",
    "ExaoneMoe": "the groups of ExaoneMoeSparseMoEBlock's router need 2 experts, and 1 would be left",
}


@pytest.mark.parametrize("name", NO_DENSE)
def test_a_block_that_cannot_choose_one_expert_or_be_saved_with_one_stays(name):
    net = core.adopt(made(name).eval())
    before, config = {key: t.clone() for key, t in net.state_dict().items()}, net.config.to_dict()
    with pytest.raises(ValueError, match=NO_DENSE[name]):
        core.densify(net, "average")
    groups = first_layer(net).router.num_groups
    if name != "DeepseekV2":  # scores groups by one expert: two groups of one are enough
        with pytest.raises(ValueError, match=NO_DENSE[name].replace("1 would", f"{groups} would")):
            pruned(net, groups)
    assert net.config.to_dict() == config
    assert all(torch.equal(t, before[key]) for key, t in net.state_dict().items())


@pytest.mark.parametrize("name", KINDS)
def test_recorded_choices_are_replayed_and_tokens_take_fewer_experts(name):
    plain = made(name).eval()
    for module in plain.modules():
        if hasattr(module, "expert_capacity"):
            module.expert_capacity = 64  # of Switch
    server, net = core.adopt(copy.deepcopy(plain)), core.adopt(plain)
    with core.record(server) as tape:
        expected = logits(server)
    with torch.no_grad():
        for layer in core.moe_layers(net).values():
            for p in layer.router.parameters():
                p.copy_(p.flip(0))
    assert error(logits(net), expected) > 1e-2
    if name == "Phimoe":
        with pytest.raises(ValueError, match="does not choose by top-k of 4 experts"), core.replay(net, tape):
            logits(net)
    else:
        with core.replay(net, tape), core.record(net) as again:
            logits(net).sum().backward()
        for entry, other in zip(again.entries, tape.entries, strict=True):
            real = (MASK.flatten() > 0).repeat_interleave(entry.routing.top_k)
            assert torch.equal(entry.routing.expert_ids_N[real], other.routing.expert_ids_N[real])
        for layer in core.moe_layers(net).values():
            assert any(p.grad is not None and float(p.grad.abs().max()) > 0 for p in layer.router.parameters())
        with core.replay(server, tape):
            assert error(logits(server)[MASK > 0], expected[MASK > 0]) < 1e-6
    for layer in core.moe_layers(server).values():
        layer.take_fewer(1)
    with core.record(server) as tape:
        logits(server)
    fixed = {"Phimoe": {2}, "NllbMoe": {2}, "DeepseekV4": {1, 2}}  # V4's first layers choose by a table
    assert {entry.routing.top_k for entry in tape.entries} == fixed.get(name, {1})
    for layer in core.moe_layers(server).values():
        assert layer.pairs_per_token == 1 or not layer.can_take_fewer


@pytest.mark.parametrize("name", ["Mixtral", "GptOss", "Llama4"])
def test_padding_is_in_no_statistics_of_experts(name):
    net = core.adopt(made(name)).eval()
    ids = torch.tensor([[5, 9, 4, 31, 7, 8, 3], [11, 6, 12, 40, 0, 0, 0]])
    padded = [{"input_ids": ids, "attention_mask": (ids != 0).long()}]
    alone = [{"input_ids": ids[:1]}, {"input_ids": ids[1:, :4]}]
    found, expected = (core.expert_statistics(net, batches, every_token=True) for batches in (padded, alone))
    for layer, own in found.items():
        assert own.loads_E.tolist() == expected[layer].loads_E.tolist()
        for field in ("gated_norms_E", "norms_E", "squares_E", "outputs_ED", "every_output_ED"):
            assert error(getattr(own, field), getattr(expected[layer], field)) < 1e-5
