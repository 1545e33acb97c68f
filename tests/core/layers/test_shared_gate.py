"""The gate on the shared experts, its budget, and masked expert outputs: by hand, and against the formula."""

from __future__ import annotations

import copy
import math
from dataclasses import replace

import pytest
import torch
import torch.nn.functional as F
from stepped import assert_exports, assert_same, step
from torch import Tensor
from torch.utils.checkpoint import checkpoint

import core

OFF = {"load_balancing_loss": 0.0, "router_z_loss": 0.0}
# Gates sigmoid(log 3) = 3/4 and sigmoid(0) = 1/2, with w = (1, 0).
TOKENS = [[math.log(3), 1.0], [0.0, 4.0]]


def by_hand(**options: object) -> core.MoE:
    """One routed expert, ``2 x``, and one shared, ``10 x``, of tokens without negative entries."""
    given = {"router": core.TokenChoice(1), "num_shared_experts": 1, **options}
    config = core.MoEConfig(1, expert=core.FFN(2, "relu"), **given)  # type: ignore[arg-type]
    layer = config.build(2)
    with torch.no_grad():
        for experts, factor in ((layer.experts, 2.0), (layer.shared_experts, 10.0)):
            if experts is not None:
                experts.w_in.copy_(torch.eye(2))
                experts.w_out.copy_(factor * torch.eye(2))
        if layer.shared_gate is not None:
            layer.shared_gate.weight.copy_(torch.tensor([[1.0, 0.0]]))
    return layer


def gated(kind: str, **options) -> core.MoEConfig:
    return core.MoEConfig(4, expert=core.FFN(6, bias=True), num_shared_experts=2, shared_gate=kind, **options)


def wide(layer: core.MoE) -> core.MoE:
    """The gate's weights as large as others: its sigmoids spread over (0, 1)."""
    with torch.no_grad():
        layer.shared_gate.weight.normal_()
    return layer


def sums(kind: str, gate: Tensor, routed: Tensor, shared: Tensor) -> Tensor:
    gate = gate.unsqueeze(-1)
    return (1 - gate) * shared + gate * routed if kind == "mix" else routed + gate * shared


def parts(layer: core.MoE, x: Tensor) -> tuple[Tensor, Tensor, Tensor]:
    """The gate, the routed output and that of the shared experts, each by itself."""
    gate = torch.sigmoid(x @ layer.shared_gate.weight[0])
    alone = copy.copy(layer)
    alone._modules = {**layer._modules, "shared_experts": None, "shared_gate": None}
    return gate, alone(x), layer.shared_experts(x, "dense")


# --- the gate ---


def test_mix_and_scale_by_hand():
    # mix: (1 - 3/4) 10 + 3/4 * 2 = 4 and (10 + 2) / 2 = 6 times x. scale: 2 + 3/4 * 10 = 9.5 and 2 + 10 / 2 = 7.
    x = torch.tensor([TOKENS])
    for kind, factors in (("none", [12.0, 12.0]), ("mix", [4.0, 6.0]), ("scale", [9.5, 7.0])):
        torch.testing.assert_close(by_hand(shared_gate=kind)(x), torch.tensor(factors)[:, None] * x)


@pytest.mark.parametrize(
    "kind, backend, shape", [("mix", "cpu", (7, 8)), ("scale", "eager", (2, 5, 8)), ("mix", "cpu", (2, 3, 4, 8))]
)
def test_the_layer_equals_its_written_out_sum_in_output_and_gradients(kind, backend, shape):
    layer = wide(gated(kind, backend=backend).build(8, out_dim=5)).double()
    x = torch.randn(shape, dtype=torch.float64, requires_grad=True)
    y, expected = layer(x), sums(kind, *parts(layer, x))
    assert y.shape == (*shape[:-1], 5)
    inputs, dy = [x, *layer.parameters()], torch.randn_like(y)
    of_layer, of_sum = (torch.autograd.grad(out, inputs, dy) for out in (y, expected))
    for actual, wanted in zip((y, *of_layer), (expected, *of_sum), strict=True):
        torch.testing.assert_close(actual, wanted, rtol=1e-10, atol=1e-10)


@pytest.mark.parametrize(
    "router", [core.SoftSlots(), core.Merge("smear"), core.Merge("lory", segment_length=2)], ids=str
)
@pytest.mark.parametrize("kind", ["mix", "scale"])
def test_slots_and_merged_experts_take_the_gate_and_its_budget(router, kind):
    balance = core.Balance(**OFF, gate_budget=1.0 if kind == "mix" else 0.0, budget=0.3)
    layer = wide(replace(gated(kind), router=router, balance=balance).build(8))
    x, valid = torch.randn(2, 5, 8), torch.arange(5) < torch.tensor([5, 3])[:, None]
    torch.testing.assert_close(layer(x), sums(kind, *parts(layer, x)), rtol=1e-5, atol=1e-6)
    with core.record(layer) as tape:
        layer(x, core.RoutingContext(valid_BS=valid))
    gates = torch.sigmoid(x @ layer.shared_gate.weight[0])[valid]
    torch.testing.assert_close(core.RoutingStats.from_tape(tape).layers[""].shared_gate, gates.mean().item())
    if kind == "mix":
        torch.testing.assert_close(core.aux_loss(tape), (gates - 0.3).abs().mean())


def test_gate_dropout_leaves_a_token_to_the_shared_experts_and_does_not_rescale():
    layer = by_hand(shared_gate="mix", shared_gate_dropout=0.5)
    x = torch.tensor([TOKENS * 8])
    torch.manual_seed(1)
    dropped = torch.rand(1, 16) < 0.5
    assert 0 < dropped.sum() < 16
    torch.manual_seed(1)
    expected = torch.where(dropped, torch.tensor(10.0), torch.tensor([[4.0, 6.0] * 8]))
    torch.testing.assert_close(layer(x), expected.unsqueeze(-1) * x)
    layer.eval()
    before = torch.random.get_rng_state()
    torch.testing.assert_close(layer(x), torch.tensor([[4.0, 6.0] * 8]).unsqueeze(-1) * x)
    assert torch.equal(torch.random.get_rng_state(), before)


# --- the budget ---


def budget_layer(weight: float = 2.0, **options: object) -> core.MoE:
    return by_hand(shared_gate="mix", balance=core.Balance(**OFF, gate_budget=weight, budget=0.8), **options)


@pytest.mark.parametrize("dropout", [0.0, 0.9])
def test_the_budget_loss_by_hand_without_padding_and_its_gradient_are_those_before_dropout(dropout):
    # |0.75 - 0.8| + |0.5 - 0.8| = 0.35 over two real tokens; padding, whose gate is 1/2, would make it 0.65 / 3.
    layer = budget_layer(shared_gate_dropout=dropout)
    x = torch.tensor([[*TOKENS, [math.nan, math.nan]]])
    with core.record(layer) as tape:
        layer(x, core.RoutingContext(valid_BS=torch.tensor([[True, True, False]])))
    losses = core.aux_losses(tape)
    assert losses.terms.keys() == {"gate_budget"}
    assert losses.terms["gate_budget"].item() == pytest.approx(0.175)
    assert losses.total.item() == pytest.approx(0.35)
    assert core.RoutingStats.from_tape(tape).layers[""].shared_gate == pytest.approx(0.625)
    losses.total.backward()
    # Both gates are below: 2 * -1 * (3/16 (log 3, 1) + 1/4 (0, 4)) / 2 with g (1 - g) = 3/16 and 1/4.
    assert layer.shared_gate.weight.grad[0].tolist() == pytest.approx([-3 / 16 * math.log(3), -3 / 16 - 1])


def test_a_budget_without_a_gradient_is_refused_as_other_losses_are():
    # Reentrant checkpointing runs the forward without gradients. The router is frozen, the gate is not.
    for weight in (0.0, 2.0):
        layer = budget_layer(weight)
        layer.router.requires_grad_(False)
        with core.record(layer) as tape:
            checkpoint(layer, torch.tensor([TOKENS], requires_grad=True), use_reentrant=True)
        if weight:
            with pytest.raises(RuntimeError, match=r"ran without gradients"):
                core.aux_losses(tape)
        else:
            assert core.aux_losses(tape).terms == {}


# --- what the tape tells ---


def test_the_mean_gate_is_of_real_tokens_and_adds_up_over_passes():
    layer = by_hand(shared_gate="mix")
    with core.record(layer) as tape:
        layer(torch.tensor([TOKENS]), core.RoutingContext(valid_BS=torch.tensor([[True, False]])))
        layer(torch.tensor([[TOKENS[1]]]))
    assert all(not e.shared_gate_T.requires_grad for e in tape.detach().entries)
    stats = core.RoutingStats.from_tape(tape).layers[""]
    assert stats.shared_gate == pytest.approx(0.625)  # 3/4 and 1/2
    assert stats.figures()["shared_gate"] == stats.shared_gate
    layer = by_hand()  # without a gate
    with core.record(layer) as tape:
        layer(torch.tensor([TOKENS]))
    stats = core.RoutingStats.from_tape(tape).layers[""]
    assert "shared_gate" not in stats.figures()
    with pytest.raises(ValueError, match=r"this layer has no gate on its shared experts"):
        _ = stats.shared_gate


# --- masked expert outputs ---


def test_masked_outputs_by_hand():
    # One expert, 2 x, its gate 1: a token comes out as 0 or, divided by 1 - 1/4, as 8/3 x. In evaluation as 2 x.
    layer = by_hand(num_shared_experts=0, expert_output_masking=0.25)
    x = torch.rand(1, 64, 2) + 1
    torch.manual_seed(1)
    kept = F.dropout(torch.ones(64), 0.25) > 0
    assert 0 < kept.sum() < 64
    torch.manual_seed(1)
    torch.testing.assert_close(layer(x), torch.where(kept[:, None], 8 / 3 * x, 0.0))
    layer.eval()
    before = torch.random.get_rng_state()
    torch.testing.assert_close(layer(x), 2 * x)
    assert torch.equal(torch.random.get_rng_state(), before)


def test_each_pair_of_a_token_is_masked_by_itself_without_renormalization():
    layer = core.MoEConfig(4, core.TokenChoice(2), core.FFN(6, bias=True), expert_output_masking=0.5).build(8)
    x = torch.randn(1, 64, 8)
    routing = layer.router(x)
    f_ETD = torch.stack([layer.experts(x[0], "each")[:, e] for e in range(4)])
    pairs_TKD = routing.gates_N.view(64, 2, 1) * f_ETD[routing.expert_ids_N.view(64, 2), torch.arange(64)[:, None]]
    # None, the first, the second, both; divided by 1 - 1/2.
    choices_4TD = 2 * torch.stack((0 * pairs_TKD[:, 0], pairs_TKD[:, 0], pairs_TKD[:, 1], pairs_TKD.sum(1)))
    error_4T = (layer(x)[0] - choices_4TD).abs().amax(-1)
    best_T = error_4T.min(0)
    assert best_T.values.max() < 1e-5
    assert set(best_T.indices.tolist()) == {0, 1, 2, 3}
    torch.testing.assert_close(layer.eval()(x)[0], pairs_TKD.sum(1), rtol=1e-5, atol=1e-6)


def test_where_gates_are_on_the_input_the_output_is_masked_all_the_same():
    # Of a masked input, an expert with biases would still put out f(0).
    router = core.TokenChoice(1, score_func="sigmoid", gates_on="input")
    layer = core.MoEConfig(2, router, core.FFN(6, bias=True), expert_output_masking=0.5).build(8)
    x = torch.randn(1, 32, 8)
    y, plain = layer(x), layer.eval()(x)
    kept = y.abs().amax(-1) > 0
    assert 0 < kept.sum() < 32
    torch.testing.assert_close(y[kept], 2 * plain[kept], rtol=1e-5, atol=1e-6)


def test_masking_leaves_routing_losses_and_figures_as_they_are():
    config = core.MoEConfig(4, capacity_factor=0.8, balance=core.Balance(1.0, 0.1, 1.0))
    layers = [replace(config, expert_output_masking=p).build(8) for p in (0.0, 0.9)]
    layers[1].load_state_dict(layers[0].state_dict())
    x = torch.randn(2, 9, 8)
    outputs, actual = [], []
    for layer in layers:
        with core.record(layer) as tape:
            outputs.append(layer(x))
        routing = tape.entries[0].routing
        actual.append((core.aux_loss(tape), routing.gates_N, routing.expert_ids_N, routing.tokens_per_expert_E))
        actual[-1] += (torch.tensor(list(core.RoutingStats.from_tape(tape).layers[""].figures().values())),)
    assert not torch.equal(*outputs)
    for plain, masked in zip(*actual, strict=True):
        assert torch.equal(masked, plain)


# --- both, in a layer as it is used ---

RANDOM = {"shared_gate_dropout": 0.3, "expert_output_masking": 0.3}


def everything(**options: object) -> core.MoE:
    return wide(gated("mix", balance=core.Balance(gate_budget=1.0), **{**RANDOM, **options}).build(8))


def test_the_same_seed_gives_the_same_step_also_for_a_copy_and_under_checkpointing():
    layer, x = everything(), torch.randn(2, 6, 8)
    expected = step(layer, x, seed=5)
    other = copy.deepcopy(layer)
    for name, tensor in step(other, x, seed=5).items():
        assert torch.equal(tensor, expected[name]), name
    again = step(layer, x, run=lambda x, context: checkpoint(layer, x, context, use_reentrant=False), seed=5)
    assert_same(again, expected)
    torch.manual_seed(6)
    assert not torch.equal(layer(x), expected["y"])


def test_padding_of_nan_is_the_same_as_no_token():
    layer, real = everything(shared_gate_dropout=0.0, expert_output_masking=0.0), torch.randn(1, 4, 8)
    x = torch.cat((real, torch.full((1, 2, 8), torch.nan)), 1)
    context = core.RoutingContext(valid_BS=torch.arange(6)[None] < 4)
    alone = step(layer, real)
    padded = step(layer, x, context, run=lambda x, c: layer(x, c)[:, :4])
    assert padded["dx"][:, 4:].abs().max() == 0
    padded["dx"] = padded["dx"][:, :4]
    for name in ("ids", "gates"):
        padded[name] = padded[name][: len(alone[name])]
    assert_same(padded, alone)


@pytest.mark.parametrize("kind", ["mix", "scale"])
def test_no_tokens_run_forward_and_backward(kind):
    balance = core.Balance(gate_budget=1.0 if kind == "mix" else 0.0)
    for shape in ((0, 5, 8), (2, 0, 8), (0, 8)):
        layer = gated(kind, balance=balance, expert_output_masking=0.3).build(8)
        x = torch.zeros(shape, requires_grad=True)
        with core.record(layer) as tape:
            y = layer(x)
        assert y.shape == shape
        (y.sum() + core.aux_loss(tape)).backward()
        assert all(p.grad is not None and p.grad.abs().max() == 0 for p in layer.parameters())
        assert core.RoutingStats.from_tape(tape).layers[""].shared_gate == 0.0


@pytest.mark.parametrize("kind", ["mix", "scale"])
def test_in_half_precision_the_gate_stays_in_float32(kind):
    layer, x = wide(gated(kind).build(8)), torch.randn(2, 6, 8)
    with core.record(layer) as tape:
        expected = layer(x)
        with torch.autocast("cpu", torch.bfloat16):
            y = layer(x)
        layer.bfloat16()
        half = layer(x.bfloat16())
    plain, cast, lower = (entry.shared_gate_T for entry in tape.entries)
    assert torch.equal(cast, plain)
    assert lower.dtype == plain.dtype == torch.float32
    assert y.dtype == half.dtype == torch.bfloat16
    # A bfloat16 number is good to 2^-8; two products and a sum of numbers of this size.
    assert (y - expected).abs().max() < 4 * 2**-8 * expected.abs().max()


@pytest.mark.usefixtures("fresh_compiler")
def test_compiled_without_a_graph_break_what_is_random_is_drawn_at_each_call_and_evaluation_is_the_same_step():
    layer, x = everything(), torch.randn(2, 6, 8)
    compiled = torch.compile(layer, backend="aot_eager", fullgraph=True)
    assert not torch.equal(compiled(x), compiled(x))
    layer.eval()
    context = core.RoutingContext(valid_BS=torch.tensor([[True] * 6, [True] * 4 + [False] * 2]))
    assert_same(step(layer, x, context, compiled), step(layer, x, context))


def test_torch_export_goes_through_for_any_number_of_tokens():
    assert_exports(wide(gated("scale", expert_output_masking=0.3).build(8)).eval(), 8)


# --- costs and configuration ---


@pytest.mark.parametrize(
    "router, kind", [(core.TokenChoice(2), "mix"), (core.SoftSlots(), "scale"), (core.Merge("smear"), "mix")], ids=str
)
def test_the_gate_costs_dim_parameters_and_a_product_a_token(router, kind):
    plain = core.MoEConfig(4, router, core.SwiGLU(6), num_shared_experts=1)
    config = replace(plain, shared_gate=kind)
    layer = config.build(8)
    assert config.num_params(8) == plain.num_params(8) + 8 == sum(p.numel() for p in layer.parameters())
    assert config.active_params(8) == plain.active_params(8) + 8 == core.active_params(layer)
    costs = [c.flops_per_token(8, tokens_per_sequence=8) for c in (config, plain)]
    assert costs[0] == costs[1] + 16
    assert core.count_flops(layer, torch.randn(2, 8, 8)) == 16 * costs[0]
    if isinstance(router, core.TokenChoice):
        x = torch.randn(2, 8, 8, requires_grad=True)
        assert core.count_flops(lambda: layer(x).sum().backward()) == 3 * 16 * costs[0]


ONE = {"num_shared_experts": 1}


@pytest.mark.parametrize(
    "options, message",
    [
        ({"shared_gate": "mix"}, r"shared_gate='mix' needs num_shared_experts, which is 0"),
        (
            ONE | {"shared_gate_dropout": 0.1, "shared_gate": "scale"},
            r"shared_gate_dropout=0.1 needs shared_gate='mix', not 'scale'",
        ),
        ({"balance": core.Balance(gate_budget=0.1)}, r"balance.gate_budget=0.1 needs shared_gate='mix', not 'none'"),
        (
            ONE | {"balance": core.Balance(gate_budget=0.1), "shared_gate": "scale"},
            r"balance.gate_budget=0.1 needs shared_gate='mix', not 'scale'",
        ),
        (
            {"expert_output_masking": 0.1, "router": core.SoftSlots()},
            r"expert_output_masking=0.1 does not apply to SoftSlots \(arXiv 2308.00951\)",
        ),
        ({"expert_output_masking": 0.1, "router": core.Merge("smear")}, r"masking=0.1 does not apply to Merge"),
    ],
)
def test_what_does_not_fit_is_refused_in_one_line(options, message):
    with pytest.raises(ValueError, match=message):
        core.MoEConfig(4, **options)
    with pytest.raises(ValueError, match=r"balance.gate_budget=0.1 does not apply to MMoE"):
        core.Balance(gate_budget=0.1).check(frozenset({"importance"}), "MMoE")
