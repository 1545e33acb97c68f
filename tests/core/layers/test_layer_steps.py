"""A layer's step: capacity in evaluation, the bias, accumulated losses, checkpointing."""

from __future__ import annotations

import contextlib
import math

import pytest
import torch
from layered import EVERY_TERM, Net, identity_gate
from torch import Tensor, nn

import core

# --- capacity in evaluation ---


def tokens_computed(layer: core.MoE, x: Tensor) -> list[int]:
    with core.record(layer) as tape:
        layer(x)
    return tape.entries[0].routing.tokens_per_expert_E.tolist()


def test_set_capacity_factor_holds_in_evaluation_inside_the_block_alone():
    layer = identity_gate(core.MoEConfig(2, core.TokenChoice(1), capacity_factor=1.0).build(2))
    free = identity_gate(
        core.MoEConfig(2, core.TokenChoice(1), capacity_factor=1.0, eval_capacity_factor=math.inf).build(2)
    )
    x = torch.tensor([[[1.0, 0.0]] * 8])
    assert tokens_computed(free, x) == [4, 0]  # ceil(1 * 8 / 2)
    assert tokens_computed(free.eval(), x) == [8, 0]
    layer.eval()
    assert tokens_computed(layer, x) == [4, 0]
    with core.set_capacity_factor(layer, 0.5):
        assert tokens_computed(layer, x) == [2, 0]
        with core.set_capacity_factor(layer, None):
            assert tokens_computed(layer, x) == [8, 0]
        assert tokens_computed(layer, x) == [2, 0]
        layer.train()
        assert tokens_computed(layer, x) == [4, 0]
        with core.set_capacity_factor(layer, None):  # dropless in evaluation, and training as before
            assert tokens_computed(layer, x) == [4, 0]
        layer.eval()
    assert tokens_computed(layer, x) == [4, 0]


def test_set_capacity_factor_may_change_the_priority_and_is_undone_after_an_error():
    layer = identity_gate(core.MoEConfig(2, core.TokenChoice(1), capacity_factor=0.25).build(2)).eval()
    x = torch.tensor([[[1.0, 0.0], [2.0, 0.0], [9.0, 0.0], [3.0, 0.0]]])
    before = layer.router.capacity
    with pytest.raises(RuntimeError, match="stop"), core.set_capacity_factor(layer, 0.25, "score"):
        # ceil(0.25 * 4 / 2) = 1: the most certain token, the third.
        assert layer(x)[0].abs().amax(-1).nonzero().flatten().tolist() == [2]
        raise RuntimeError("stop")
    assert layer.router.capacity is before
    assert layer(x)[0].abs().amax(-1).nonzero().flatten().tolist() == [0]


def test_set_capacity_factor_refuses_what_the_config_refuses_and_changes_nothing():
    model = nn.ModuleList([core.MoEConfig(2, core.TokenChoice(1)).build(2) for _ in range(2)])
    before = [layer.router.capacity for layer in model]
    for options in ({"factor": -1.0}, {"factor": 1.0, "priority": "best"}):
        with (
            pytest.raises(ValueError, match=r"eval_factor=-1.0|priority='best'"),
            core.set_capacity_factor(model, **options),
        ):
            pass
        assert [layer.router.capacity for layer in model] == before


# --- the bias ---


def bias_layer(rate: float = 0.125) -> core.MoE:
    return identity_gate(core.MoEConfig(3, core.TokenChoice(1, expert_bias=True, bias_update_rate=rate)).build(3))


LOADED = torch.eye(3)[[0, 0, 0, 1]][None]  # loads 3, 1, 0 around 4/3


def test_update_expert_bias_moves_by_the_sign_of_the_load():
    layer = bias_layer()
    with core.record(layer) as tape:
        layer(LOADED)
    assert layer.router.expert_bias.tolist() == [0.0, 0.0, 0.0]
    core.update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.125, 0.125, 0.125]


def test_update_expert_bias_over_merged_micro_batches_or_passes_is_one_step():
    layer = bias_layer()
    steps = core.Tape()
    for x in (LOADED, torch.eye(3)[[2, 2, 2, 2]][None]):  # together 3, 1, 4 around 8/3
        with core.record(layer) as tape:
            layer(x)
        steps = steps.merge(tape.detach())
    core.update_expert_bias(layer, steps)
    assert layer.router.expert_bias.tolist() == [-0.125, 0.125, -0.125]
    with core.record(layer) as tape:
        layer(LOADED)
        layer(torch.eye(3)[[1, 1, 1]][None])  # together 3, 4, 0 around 7/3
    core.update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.25, 0.0, 0.0]


def test_a_router_of_two_layers_moves_once_by_the_loads_of_both():
    first, second = bias_layer(), bias_layer()
    second.router = first.router
    model = nn.ModuleList([first, second])
    with core.record(model) as tape:
        first(LOADED)
        second(torch.eye(3)[[2, 2, 2, 2]][None])  # together 3, 1, 4 around 8/3; two steps would leave [0, 0.25, 0]
    core.update_expert_bias(model, tape)
    assert first.router.expert_bias.tolist() == [-0.125, 0.125, -0.125]


def test_the_adaptive_weight_is_reset_with_its_layer():
    balance = core.Balance(load_balancing_loss=0.25, adaptive=True)
    with torch.device("meta"):
        layer = core.MoEConfig(2, balance=balance, capacity_factor=1.0).build(2)
    layer.to_empty(device="cpu").load_balancing_weight.fill_(77.0)
    layer.reset_parameters()
    assert layer.load_balancing_weight.item() == 0.25


def test_update_expert_bias_leaves_padding_frozen_layers_and_other_routers_alone():
    layer = bias_layer()
    context = core.RoutingContext(valid_BS=torch.tensor([[False, False, True, True]]))  # loads 1, 1, 0 around 2/3
    with core.record(layer) as tape:
        layer(LOADED, context)
    layer.eval()
    core.update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [0.0] * 3
    layer.train()
    core.update_expert_bias(layer, tape)
    assert layer.router.expert_bias.tolist() == [-0.125, -0.125, 0.125]
    plain = core.MoEConfig(3).build(3)
    with core.record(plain) as tape:
        plain(LOADED)
    core.update_expert_bias(plain, tape)
    assert plain.router.expert_bias is None


# --- the loss ---


def test_the_aux_loss_reaches_router_and_tokens_and_never_the_experts():
    layer = core.MoEConfig(4, balance=EVERY_TERM).build(8)
    x = torch.randn(2, 6, 8, requires_grad=True)
    with core.record(layer) as tape:
        layer(x)
    core.aux_loss(tape).backward()
    assert layer.router.gate.weight.grad.abs().max() > 0
    assert x.grad.abs().max() > 0
    assert all(p.grad is None for p in layer.experts.parameters())


# --- checkpointing ---


@pytest.mark.parametrize(
    "backend, backward_inside, router",
    [
        ("eager", True, {}),
        ("cpu", False, {"noise": "learned", "second_expert_policy": "random"}),
        ("grouped", True, {}),
        pytest.param("triton", True, {}, marks=pytest.mark.slow),
    ],
    ids=["eager", "random-cpu", "grouped", "triton"],
)
def test_checkpointing_counts_nothing_twice_and_changes_no_gradient(backend, backward_inside, router):
    plain, checkpointed = Net("none", backend, **router), Net("non-reentrant", backend, **router)
    checkpointed.load_state_dict(plain.state_dict())
    x = torch.randn(2, 6, 8)
    actual = []
    for net in (plain, checkpointed):
        torch.manual_seed(5)
        with contextlib.ExitStack() as stack:
            tape = stack.enter_context(core.record(net))
            y = net(x)
            if not backward_inside:
                stack.close()
            losses = core.aux_losses(tape)
            (y.square().mean() + losses.total).backward()
            if backward_inside:
                stack.close()
        assert [entry.name for entry in tape.entries] == ["blocks.0", "blocks.1"]
        grads = {name: p.grad for name, p in net.named_parameters()}
        actual.append({"y": y, "aux": losses.total, **losses.terms, **grads})
    assert actual[0].keys() == actual[1].keys()
    assert len(actual[0]) == 5 + len(list(plain.parameters()))
    for name, tensor in actual[0].items():
        assert torch.equal(actual[1][name], tensor), name


def test_reentrant_checkpointing_is_refused_in_one_line():
    net = Net("reentrant")
    with core.record(net) as tape:
        net(torch.randn(2, 6, 8))
    with pytest.raises(RuntimeError, match=r"'blocks.0' ran without gradients.*use_reentrant=False") as error:
        core.aux_loss(tape)
    assert "\n" not in str(error.value)


def test_passes_without_gradients_have_a_loss_to_log_where_none_are_wanted():
    net = Net()
    x = torch.randn(2, 6, 8)
    with torch.no_grad(), core.record(net) as tape:
        net(x)
    assert core.aux_loss(tape).isfinite()  # the block was opened without gradients
    net.eval()
    with core.record(net) as tape, torch.no_grad():
        net(x)
    assert core.aux_loss(tape).isfinite()  # evaluation
    net.train()
    for p in net.parameters():
        p.requires_grad_(False)
    with core.record(net) as tape:
        net(x)
    assert not core.aux_loss(tape).requires_grad  # a frozen model
