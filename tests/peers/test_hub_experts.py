"""The kernels as transformers' experts implementation: the numbers of its own eager one."""

from __future__ import annotations

import pytest
import torch
from test_adopt import FAMILIES, error, model, step

import apps.hub

pytest.importorskip("transformers")
OWN_FORWARD = {"Llama4", "Dbrx", "JetMoe"}
"""Families whose experts transformers does not decorate."""


@pytest.mark.parametrize("name", [name for name in FAMILIES if name not in OWN_FORWARD])
def test_experts_implementation_moesaic_equals_eager(name):
    net = model(name)
    for training in (False, True):
        net.train(training)
        net.set_experts_implementation("eager")
        expected, gradients = step(net)
        net.set_experts_implementation(apps.hub.register())
        logits, own = step(net)
        assert error(logits, expected) < 1e-5
        assert own.keys() == gradients.keys()
        for key, gradient in gradients.items():
            assert error(own[key], gradient) < 1e-5 or float((own[key] - gradient).abs().max()) < 1e-8, key


def test_pairs_of_other_ranks_are_not_computed():
    net = model("Mixtral")
    experts = net.model.layers[0].mlp.experts
    x, gates = torch.randn(3, 16), torch.full((3, 2), 0.5)
    ids = torch.tensor([[0, 4], [4, 4], [1, 2]])  # of 4 experts, so that 4 is none of them
    y = apps.hub.experts.experts_forward(experts, x, ids, gates)
    one = apps.hub.experts.experts_forward(experts, x[:1], torch.tensor([[0]]), gates[:1, :1])
    assert error(y[:1], one) < 1e-6
    assert not y[1].any()
    assert y[2].any()
