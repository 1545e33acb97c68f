"""A training that records no tape loses the balance losses: it is warned once, with the lines to write."""

from __future__ import annotations

import copy
import warnings

import pytest
import torch
from torch import nn
from torch.utils.checkpoint import checkpoint

import core
from core.layers.base import UNRECORDED_PASSES

D = 4


def model(layers: int = 3, **options) -> nn.Sequential:
    """Return a stack of layers with a load balancing loss of 0.01."""
    config = core.MoEConfig(4, core.TokenChoice(1), core.FFN(4), **options)
    return nn.Sequential(*(config.build(D) for _ in range(layers)))


def warned(run, steps: int = UNRECORDED_PASSES) -> list[str]:
    with warnings.catch_warnings(record=True) as caught:
        warnings.simplefilter("always")
        for _ in range(steps):
            run()
    return [str(w.message) for w in caught]


def step(net: nn.Module) -> None:
    net(torch.ones(3, D)).sum().backward()


def test_a_training_without_a_tape_is_warned_once_for_a_model():
    net = model()
    assert warned(lambda: step(net), UNRECORDED_PASSES - 1) == []
    (text,) = warned(lambda: step(net), 3)  # of three layers
    assert "load_balancing_loss=0.01" in text
    assert "with core.record(model) as tape" in text
    assert "(loss + core.aux_loss(tape)).backward()" in text
    other = copy.deepcopy(net)
    assert len(warned(lambda: step(other))) == 1


@pytest.mark.parametrize("how", ["recorded", "evaluation", "no_grad", "weights of 0", "frozen router", "checkpoint"])
def test_nothing_is_said_where_no_balance_loss_is_lost(how):
    net = model(balance=core.Balance(load_balancing_loss=0.0, router_z_loss=0.0)) if how == "weights of 0" else model()
    net.train(how != "evaluation")
    for layer in net if how == "frozen router" else ():
        layer.router.requires_grad_(False)

    def run() -> None:
        if how == "checkpoint":
            with core.record(net[0]):
                y = checkpoint(net[0], torch.ones(3, D), use_reentrant=False)
            y.sum().backward()  # repeats the pass without the tape
            return
        with core.record(net[0]) if how == "recorded" else torch.set_grad_enabled(how != "no_grad"):
            (net[:1] if how == "recorded" else net)(torch.ones(3, D))

    assert warned(run, 2 * UNRECORDED_PASSES) == []


def test_the_count_does_not_recompile_a_compiled_training():
    torch._dynamo.reset()
    graphs = []
    net = model(1)
    compiled = torch.compile(net, backend=lambda graph, inputs: graphs.append(graph) or graph.forward)
    for _ in range(5):
        step(compiled)
    assert len(graphs) == 1


def test_a_layer_in_place_of_its_tape_is_rejected_with_the_lines_to_write():
    layer = model(1)[0]
    with pytest.raises(ValueError, match=r"takes the tape of a forward, not a MoE: write `with core.record\(model\)"):
        core.aux_loss(layer)
    message = r"MoE\(64, 8\) is made of a router and experts.*core.MoEConfig\(num_experts=8"
    with pytest.raises(ValueError, match=message):
        core.MoE(64, 8)
    assert core.MoE(layer.router, layer.experts).pairs_per_token == 1
