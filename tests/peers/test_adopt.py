"""Models of transformers, adopted in place: the same logits, gradients and texts, from the kernels of this engine."""

from __future__ import annotations

import copy

import pytest
import torch
from families import DENSE_FIRST, FAMILIES, IDS, MASK, TWO_SIDED, check_gradients, error, first_layer, made, step
from torch import nn

import apps.hub
import core
from core.adopted import LAYOUTS, Layout, adopt, register_layout, release

OWN_FORWARD = {"Llama4", "Dbrx", "JetMoe"}
"""Families whose experts transformers does not decorate."""


@pytest.mark.parametrize("name", FAMILIES)
def test_an_adopted_model_is_the_model_and_so_is_one_with_our_experts_implementation(name):
    plain = made(name)
    adopted, registered = adopt(copy.deepcopy(plain)), copy.deepcopy(plain)
    assert list(adopted.state_dict()) == list(plain.state_dict())
    kinds = [type(m).__name__ for m in adopted.modules() if type(m).__name__ != "Module"]  # JetMoE's experts
    assert kinds == [type(m).__name__ for m in plain.modules()]
    layers = core.moe_layers(adopted)
    assert len(layers) == (1 if name in DENSE_FIRST else 2)
    if name not in OWN_FORWARD:
        registered.set_experts_implementation(apps.hub.register())
    for training in (False, True):
        expected, gradients = step(plain.train(training))
        with core.record(adopted) as tape:
            logits, own = step(adopted.train(training))
        others = [] if name in OWN_FORWARD else [step(registered.train(training))]
        for found, grads in ((logits, own), *others):
            assert error(found, expected) < 1e-5
            assert grads.keys() == gradients.keys()
            check_gradients(grads, gradients)
        assert [entry.name for entry in tape.entries] == list(layers)
        for entry in tape.entries:
            assert int(entry.routing.chosen_per_expert_E.sum()) == 2 * int(MASK.sum())  # two experts a real token
            assert entry.routing.evidence.logits_TE.shape == (14, layers[entry.name].num_experts)
            stats = core.RoutingStats.from_tape(tape).layers[entry.name]
            gates = entry.routing.gates_N[MASK.flatten().bool().repeat_interleave(2)]
            assert stats.drop_rate == 0  # padding is computed, and is in no figure
            assert float(stats.gates_per_expert.sum()) == pytest.approx(float(gates.sum()), rel=1e-5)
    texts = [net.eval().generate(IDS[:1], max_new_tokens=3, do_sample=False) for net in (plain, adopted)]
    assert torch.equal(*texts)


def test_pairs_of_other_ranks_are_not_computed():
    experts = made("Mixtral").model.layers[0].mlp.experts
    x, gates = torch.randn(3, 16), torch.full((3, 2), 0.5)
    ids = torch.tensor([[0, 4], [4, 4], [1, 2]])  # of 4 experts, so that 4 is none of them
    y = apps.hub.experts.experts_forward(experts, x, ids, gates)
    one = apps.hub.experts.experts_forward(experts, x[:1], torch.tensor([[0]]), gates[:1, :1])
    assert error(y[:1], one) < 1e-6
    assert not y[1].any()
    assert y[2].any()


@pytest.mark.parametrize("name", FAMILIES)
def test_release_gives_the_blocks_back(name):
    plain = made(name)
    adopted = adopt(copy.deepcopy(plain))
    tensors = [p.data_ptr() for p in adopted.parameters()]
    assert release(adopted) is adopted
    assert not core.moe_layers(adopted)
    assert [p.data_ptr() for p in adopted.parameters()] == tensors
    for before, after in zip(plain.modules(), adopted.modules(), strict=True):
        assert type(after) is type(before)
        assert after.__dict__.keys() == before.__dict__.keys()
    with torch.no_grad():
        plain.eval(), adopted.eval()
        assert torch.equal(adopted(IDS, MASK).logits, plain(IDS, MASK).logits)


@pytest.mark.parametrize("name", TWO_SIDED)
@pytest.mark.usefixtures("mended_experts")
def test_experts_of_one_module_each_become_stacked_without_a_copy(name):
    plain = made(name)
    adopted = adopt(copy.deepcopy(plain))
    assert list(adopted.state_dict()) == list(plain.state_dict())
    for training in (False, True):
        expected, gradients = step(plain.train(training))
        with core.record(adopted) as tape:
            logits, own = step(adopted.train(training))
        assert error(logits, expected) < 1e-5
        check_gradients(own, gradients)
        assert all(not own[key].any() for key in own.keys() - gradients.keys())  # experts without tokens
        assert len(tape) == 2
    name = next(name for name in gradients if "expert_" in name)
    with torch.no_grad():
        for net in (plain, adopted):  # the kernels read the parameters themselves
            net.get_parameter(name).add_(1.0)
    changed = step(plain)[0]
    assert error(changed, expected) > 1e-4
    assert error(step(adopted)[0], changed) < 1e-5


def test_an_optimizer_of_before_updates_what_the_experts_compute():
    net = made("Mixtral")
    optimizer = torch.optim.SGD(net.parameters(), lr=0.5)
    adopt(net)
    before, _ = step(net)
    optimizer.step()
    after, _ = step(net)
    assert error(after, before) > 1e-2


def test_a_copy_computes_with_its_own_experts():
    net = adopt(made("Mixtral")).eval()
    other = copy.deepcopy(net)
    with torch.no_grad():
        for layer in core.moe_layers(other).values():
            layer.experts.down_proj.zero_()
        assert error(other(IDS).logits, net(IDS).logits) > 1e-2
        assert error(copy.deepcopy(net)(IDS).logits, net(IDS).logits) == 0


def test_balance_losses_reach_the_routers():
    net = adopt(made("Mixtral"), core.Balance(load_balancing_loss=1.0, router_z_loss=0.0)).train()
    with core.record(net) as tape:
        net(IDS, attention_mask=MASK)
    core.aux_loss(tape).backward()
    for layer in core.moe_layers(net).values():
        assert float(layer.router.weight.grad.abs().sum()) > 0


class Wrapped(nn.Module):
    def __init__(self, net):
        super().__init__()
        self.net = net

    def forward(self, batch):
        return self.net(**batch)


def test_padding_is_known_however_the_mask_is_given_and_forgotten_afterwards():
    net, wrapper = adopt(made("Mixtral")), adopt(Wrapped(made("Mixtral")))
    # 14 tokens, 3 of them padding; each takes 2 experts.
    for layers, run, tokens in (
        (net, lambda: net(IDS, MASK), 11),
        (wrapper, lambda: wrapper({"input_ids": IDS, "attention_mask": MASK}), 11),
        (net, lambda: net.model(IDS, attention_mask=MASK), 11),
        (net, lambda: net.model(IDS[:1]), 7),
    ):
        with core.record(layers) as tape:
            run()
        assert [int(e.routing.chosen_per_expert_E.sum()) for e in tape.entries] == [2 * tokens] * 2


def test_two_passes_before_one_backward_may_be_checkpointed():
    nets = [adopt(made("Mixtral")).train() for _ in range(2)]
    nets[1].gradient_checkpointing_enable({"use_reentrant": False})
    grads = []
    for net in nets:
        torch.manual_seed(1)
        first = net(input_ids=IDS, attention_mask=MASK, labels=IDS).loss
        (first + net(input_ids=IDS[:, :4], attention_mask=torch.ones(2, 4), labels=IDS[:, :4]).loss).backward()
        grads.append({n: p.grad for n, p in net.named_parameters()})
    for name, grad in grads[0].items():
        torch.testing.assert_close(grads[1][name], grad)


def test_a_bias_moves_by_the_loads_if_it_is_given_a_rate():
    for rate in (0.0, 0.25):
        net = adopt(made("DeepseekV3"), bias_update_rate=rate).train()
        bias = net.model.layers[1].mlp.gate.e_score_correction_bias
        before = bias.clone()
        with core.record(net) as tape:
            net(IDS)
        core.update_expert_bias(net, tape)
        load = tape.entries[0].routing.chosen_per_expert_E.float()
        assert torch.equal(bias, before + rate * torch.sign(load.mean() - load))


def test_a_block_that_is_not_known_is_rejected_by_name():
    class Odd(nn.Module):
        def __init__(self):
            super().__init__()
            self.gate, self.experts = nn.Linear(4, 2), nn.Linear(4, 4)

    with pytest.raises(ValueError, match="'0', a Odd, has experts and no known layout"):
        adopt(nn.Sequential(Odd()))
    with pytest.raises(ValueError, match="Linear has no MoE block of a known layout"):
        adopt(nn.Linear(2, 2))
    net = adopt(made("Mixtral"))
    with pytest.raises(ValueError, match=r"'model\.layers\.0\.mlp' is adopted already"):
        adopt(net)


def test_a_layout_that_does_not_fit_leaves_the_model_as_it_was(monkeypatch):
    net = made("Mixtral")
    with pytest.raises(ValueError, match="MixtralSparseMoeBlock is registered already"):
        register_layout("MixtralSparseMoeBlock", Layout())
    monkeypatch.setitem(LAYOUTS, "MixtralSparseMoeBlock", Layout(up="wi"))
    with pytest.raises(ValueError, match=r"experts of block 'model\.layers\.0\.mlp', MixtralExperts, have no 'wi'"):
        adopt(net)
    assert not core.moe_layers(net)
    net.model.layers[0].mlp.experts.act_fn = nn.Tanh()
    monkeypatch.setitem(LAYOUTS, "MixtralSparseMoeBlock", Layout())
    with pytest.raises(ValueError, match="activation Tanh, which no kernel has"):
        adopt(net)
    assert not core.moe_layers(net)


@pytest.mark.parametrize("name", ["Mixtral", "GptOss"])
def test_every_token_through_each_expert_is_what_the_block_computes_of_one(name):
    layer = first_layer(adopt(made(name)))
    layer.call.leading, x_TD = (5,), torch.randn(5, 16)
    with torch.no_grad():
        each_TED = layer.experts(x_TD, "each")
        for e in range(layer.num_experts):
            one_TD = layer.experts(x_TD, torch.full((5, 1), e), torch.ones(5, 1))
            assert error(each_TED[:, e], one_TD) < 1e-6
