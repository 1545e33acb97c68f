"""``NeuronMoE``: the layer of one-neuron experts against a loop over tokens, heads and experts, whatever it runs on."""

from __future__ import annotations

import pytest
import torch
from torch import Tensor

import core
from core import PEER, ProductKeys, RoutingContext, TokenChoice
from core.dispatch import LocalDispatcher
from core.testing.check import step

CONFIG = core.MoEConfig(25, ProductKeys(top_k=3, heads=2), PEER())


def built(config: core.MoEConfig = CONFIG, dim: int = 8, out_dim: int | None = None) -> core.NeuronMoE:
    torch.manual_seed(0)
    layer = config.build(dim, out_dim)
    assert type(layer) is core.NeuronMoE
    return layer


def by_loop(layer: core.NeuronMoE, x_BSD: Tensor, context: RoutingContext | None = None) -> Tensor:
    routing = layer.router(x_BSD, context)
    x_TD = x_BSD.flatten(0, 1)
    rows = [torch.zeros(layer.experts.v.shape[1], dtype=x_BSD.dtype) for _ in x_TD]
    for t, e, gate in zip(routing.token_index_N.tolist(), routing.expert_ids_N.tolist(), routing.gates_N, strict=True):
        if e < layer.num_experts:
            u, v = layer.experts.u[e], layer.experts.v[e]
            rows[t] = rows[t] + gate * torch.nn.functional.gelu(x_TD[t] @ u) * v
    return torch.stack(rows).unflatten(0, x_BSD.shape[:2])


@pytest.mark.parametrize(("row_sparse", "training"), [(False, True), (True, False), (True, True)])
def test_the_layer_is_the_loop_in_output_and_all_gradients(row_sparse, training):
    config = core.MoEConfig(25, ProductKeys(top_k=3, heads=2), PEER(row_sparse=row_sparse))
    layer, alone = (built(config, out_dim=5).double().train(training) for _ in range(2))
    x = torch.randn(3, 6, 8, dtype=torch.float64)
    valid = torch.tensor([[True] * 6, [True] * 4 + [False] * 2, [False] * 6])
    context = RoutingContext(valid_BS=valid)
    x_ours, x_loop = x.clone().requires_grad_(), x.clone().requires_grad_()
    y, expected = layer(x_ours, context), by_loop(alone, x_loop, context)
    torch.testing.assert_close(y, expected)
    weight = torch.randn_like(y)
    (y * weight).sum().backward()
    (expected * weight).sum().backward()
    torch.testing.assert_close(x_ours.grad, x_loop.grad)
    for (name, ours), loop in zip(layer.named_parameters(), alone.parameters(), strict=True):
        assert ours.grad.is_sparse == (row_sparse and name.startswith("experts."))
        torch.testing.assert_close(ours.grad.to_dense(), loop.grad, msg=lambda m, n=name: f"{n}: {m}")


def test_a_token_that_takes_an_expert_by_two_heads_gets_it_twice():
    config = core.MoEConfig(4, ProductKeys(top_k=4, heads=3), PEER())  # every head takes every expert
    layer = built(config).double()
    x = torch.randn(1, 5, 8, dtype=torch.float64)
    torch.testing.assert_close(layer(x), by_loop(layer, x))
    layer.router.keys.data.zero_()  # all gates are 1/4, and there are three of them
    each = layer.experts(x[0], "each")
    torch.testing.assert_close(layer(x)[0], 3 * each.mean(1))


@pytest.mark.parametrize("row_sparse", [False, True])
def test_few_tokens_or_none(row_sparse):
    layer = built(core.MoEConfig(25, ProductKeys(3, 2), PEER(row_sparse=row_sparse))).train()
    for shape in ((0, 4, 8), (2, 0, 8), (1, 1, 8)):
        y = layer(torch.randn(shape, requires_grad=True))
        assert y.shape == shape
        y.sum().backward()
        assert all(p.grad is None or p.grad.to_dense().isfinite().all() for p in layer.parameters())


class Plain(LocalDispatcher):
    """A dispatcher of one's own, which makes the layer move rows."""


def test_any_router_of_pairs_and_soft_slots_take_these_experts():
    x, layer = torch.randn(2, 6, 8), built()
    expected = layer(x)
    layer.dispatcher = Plain()
    torch.testing.assert_close(layer(x), expected)
    for config in (
        core.MoEConfig(6, TokenChoice(2), PEER(), capacity_factor=0.5),
        core.MoEConfig(6, TokenChoice(1, score_func="sigmoid", gates_on="input"), PEER()),
        core.MoEConfig(6, core.ExpertChoice(), PEER()),
        core.MoEConfig(6, TokenChoice(2), PEER(), expert_output_masking=0.2),
    ):
        assert built(config).train()(x).shape == x.shape
    assert core.MoEConfig(6, core.SoftSlots(2), PEER()).build(8)(x).shape == x.shape
    with pytest.raises(ValueError, match="PEER computes neurons"):
        core.MoEConfig(6, core.Merge("smear"), PEER())


def test_a_shared_ffn_is_added_to_the_neurons():
    config = core.MoEConfig(25, ProductKeys(3, 2), PEER(), num_shared_experts=1, shared_expert=core.SwiGLU(12))
    layer, x = built(config).eval(), torch.randn(2, 6, 8)
    torch.testing.assert_close(layer(x), by_loop(layer, x) + layer.shared_experts(x, "dense"))
    assert config.num_params(8) == sum(p.numel() for p in layer.parameters())
    assert config.active_params(8) == core.active_params(layer)
    assert core.count_flops(layer, x) == 12 * config.flops_per_token(8)
    with pytest.raises(ValueError, match=r"^num_shared_experts=1 with PEER, which computes neurons$"):
        core.MoEConfig(25, ProductKeys(3, 2), PEER(), num_shared_experts=1)


def test_the_tape_has_the_load_of_every_expert():
    config = core.MoEConfig(2**14, ProductKeys(top_k=4, heads=2), PEER())
    layer = built(config)
    with core.record(layer) as tape:
        layer(torch.randn(2, 6, 8))
    (entry,) = tape.entries
    assert entry.routing.chosen_per_expert_E.shape == (2**14,)
    assert entry.routing.chosen_per_expert_E.sum() == 12 * 8
    assert entry.routing.evidence.scores_TE is None  # nothing of (T, E) is made
    stats = core.RoutingStats.from_tape(tape)
    assert stats.layers


def test_costs():
    for options in ({}, {"shared_keys": False}, {"query_norm": "batch", "query_dim": 6}):
        config = core.MoEConfig(25, ProductKeys(3, 2, **options), PEER(), num_shared_experts=0)
        layer = built(config, out_dim=5)
        assert config.num_params(8, 5) == sum(p.numel() for p in layer.parameters())
        assert config.active_params(8, 5) == core.active_params(layer)
        layer.eval()
        counted = core.count_flops(layer, torch.randn(2, 6, 8))
        assert counted == 12 * config.flops_per_token(8, 5)


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_and_exported_it_is_the_same():
    layer, x = built(core.MoEConfig(25, ProductKeys(3, 2), PEER(row_sparse=True))), torch.randn(2, 6, 8)
    expected = step(layer, x, RoutingContext())
    got = step(layer, x, RoutingContext(), run=torch.compile(layer, backend="eager", fullgraph=True))
    for name, value in expected.items():
        dense = value.to_dense() if value.is_sparse else value
        torch.testing.assert_close(got[name], dense, msg=lambda m, n=name: f"{n}: {m}")
    dynamic = torch.export.Dim.DYNAMIC
    program = torch.export.export(layer, (x,), dynamic_shapes=({0: dynamic, 1: dynamic},))
    other = torch.randn(3, 7, 8)
    torch.testing.assert_close(program.module()(other), layer(other))


def test_no_picked_row_is_kept_for_the_backward():
    layer, kept = built().train(), []
    parameters = {p.data_ptr() for p in layer.parameters()}

    def pack(t: Tensor) -> Tensor:
        if t.data_ptr() not in parameters:
            kept.append(t.numel())
        return t

    with torch.autograd.graph.saved_tensors_hooks(pack, lambda t: t):
        layer(torch.randn(2, 20, 8, requires_grad=True))
    assert max(kept) < 40 * 6 * 8  # tokens x pairs x width
